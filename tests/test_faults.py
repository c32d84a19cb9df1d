"""What a run must survive: signals, kills, values that are not finite, hangs, a full disk or memory, in real processes."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from nanogpt import anomaly, checkpoint, distributed, faults, goodput, guard, resume, saver, train
from nanogpt.config import TrainConfig, load
from nanogpt.guard import NOT_FINITE, OVERFLOW, SPIKE, UPDATED, DivergenceError, Guard, Step
from nanogpt.optim import AdamW, LossScale
from nanogpt.telemetry import Telemetry
from tests.runs import ROOT, TORCHRUN, arguments, losses, records, run, start, status
from tests.test_train import data  # noqa: F401

INJECTED = {"allow_fault_injection": True}


def environment(**more):
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | more


def launch(command, **more):
    """A run in the background, all its output in one pipe."""
    command = [sys.executable, *map(str, command)]
    return subprocess.Popen(command, env=environment(**more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def until(condition, seconds=180.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def workers(agent):
    """The process ids of torchrun's workers, by rank."""
    found = {}
    for pid in map(int, Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()):
        variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
        found |= {int(v[5:]): pid for v in variables if v.startswith("RANK=")}
    return found


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):  # noqa: F811
    """The losses of two processes that nothing happens to."""
    out = tmp_path_factory.mktemp("undisturbed")
    code, _, err = start([*TORCHRUN, "-m", "nanogpt.train", *arguments(data, out)])
    assert code == 0, err
    return losses(out)


# R13: signals


@pytest.mark.parametrize(("whom", "number"), [("agent", "SIGTERM"), ("agent", "SIGUSR1"), ("worker", "SIGUSR1")])
def test_r13_a_signal_to_the_agent_or_a_worker_saves_and_stops_all(data, tmp_path, whom, number):  # noqa: F811
    handled = ["--signals-to-handle=SIGTERM,SIGINT,SIGUSR1"] if (whom, number) == ("agent", "SIGUSR1") else []
    keys = {"max_iters": 10**6, "eval_interval": 10**6, "checkpoint_minutes": 0, "out_dir": tmp_path}
    with launch([*TORCHRUN, *handled, "-m", "nanogpt.train", *arguments(data, **keys)]) as agent:
        metrics = tmp_path / "metrics.jsonl"
        until(lambda: metrics.exists() and '"iter": 3,' in metrics.read_text())
        os.kill(agent.pid if whom == "agent" else workers(agent)[1], getattr(signal, number))
        out = agent.communicate(timeout=180)[0]
    assert status(tmp_path)["state"] == "preempted", out
    stopped = status(tmp_path)["iter"]
    assert checkpoint.steps(tmp_path) == [stopped]
    checkpoint.verify(tmp_path / f"step-{stopped}")
    assert losses(tmp_path)[-1][0] == stopped - 1  # the last update that was made is the last one that was saved
    reason = "another process was asked to stop" if whom == "worker" else number
    assert status(tmp_path)["reason"] == reason


# R14: a rank killed


def test_r14_a_killed_rank_is_restarted_and_the_losses_are_the_same(data, tmp_path, undisturbed):  # noqa: F811
    keys = INJECTED | {"async_save": False}  # so that step-5 is there when rank 1 dies
    command = [*TORCHRUN, "--max-restarts=2", "-m", "nanogpt.train", *arguments(data, tmp_path, **keys)]
    code, out, err = start(command, NANOGPT_FAULT="kill@8:rank1")
    assert code == 0, err
    assert "failed (exitcode: " in err  # -9, or 1 of the other rank, where its lost connection is noticed first
    assert "resuming from" in out
    assert losses(tmp_path) == undisturbed  # bitwise


def test_r14_the_store_of_a_restarted_group_has_a_prefix_of_its_own(monkeypatch):
    seen = {}
    store = torch.distributed.HashStore()
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda url: iter([(store, 0, 2)]))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, store, **keys: seen.update(store=store))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for attempt in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        distributed.init(TrainConfig(device="cpu"))
        seen["store"].set("address", attempt)
    assert [store.get(f"nanogpt/{attempt}/address") for attempt in "01"] == [b"0", b"1"]


# R15: values that are not finite

PROBE = """
import hashlib, sys
from pathlib import Path
from nanogpt import config, distributed, train
setup, put, runs = train.setup, distributed.Readback.put, []
def remember(config):
    runs.append(setup(config))
    return runs[0]
def probe(self, it, values):
    run = runs[0]
    digest = hashlib.sha256()
    for p in run.optimizer.parameters():
        for t in (p, run.optimizer.state[p]["exp_avg"], run.optimizer.state[p]["exp_avg_sq"]):
            digest.update(t.detach().numpy().tobytes())
    if values.numel() > 1:  # not the votes of an evaluation
        with open(f"{run.out_dir}/digests-{run.world.rank}", "a") as file:
            print(it, digest.hexdigest(), file=file)
    return put(self, it, values)
train.setup, distributed.Readback.put = remember, probe
sys.exit(train.main(config.load(config.TrainConfig, sys.argv[1:])))
"""


def test_r15_all_ranks_skip_what_is_not_finite_on_one(data, tmp_path):  # noqa: F811
    script = tmp_path / "probe.py"
    script.write_text(PROBE)
    command = [*TORCHRUN, script, *arguments(data, tmp_path / "out", timeout=40, **INJECTED)]
    code, out, err = start(command, NANOGPT_FAULT="nan@4:rank1,nangrad@7:rank0,nan@9:rank0")
    assert code == 0, err
    digests = [[line.split()[1] for line in (tmp_path / "out" / f"digests-{rank}").read_text().splitlines()] for rank in "01"]
    assert digests[0] == digests[1]  # the same weights and moments on both ranks after every update
    unchanged = [it for it in range(1, 12) if digests[0][it] == digests[0][it - 1]]
    assert unchanged == [4, 7, 9]
    assert out.count("not finite, update skipped") == 3
    state = checkpoint.load_tensors(tmp_path / "out" / "step-12" / checkpoint.OPTIM)
    assert float(state["step"]) == 9
    assert all(torch.isfinite(t).all() for t in state.values())


def admitted(judge, pairs):
    """The verdicts of a guard on (loss, norm) pairs."""
    verdicts = []
    for loss, norm in pairs:
        update = judge.admits(torch.tensor(loss), torch.tensor(norm))
        verdicts.append(int(judge.verdict))
        assert bool(update) == (verdicts[-1] == UPDATED)
    return verdicts


def test_r15_verdicts():
    nan, inf = math.nan, math.inf
    pairs = [(1.0, 1.0), (nan, 1.0), (1.0, nan), (inf, 1.0), (1.0, inf), (1e30, 1e30)]
    wanted = [UPDATED, NOT_FINITE, NOT_FINITE, NOT_FINITE, NOT_FINITE, UPDATED]
    assert admitted(Guard(torch.device("cpu")), pairs) == wanted
    scale = LossScale(torch.device("cpu"))
    fp16 = Guard(torch.device("cpu"), scale)
    assert admitted(fp16, [(1.0, inf), (nan, inf)]) == [OVERFLOW, NOT_FINITE]
    scale.value.fill_(1.0)  # it cannot get any lower
    assert admitted(fp16, [(1.0, inf)]) == [NOT_FINITE]


def test_r15_a_skipped_update_changes_nothing_but_the_loss_scale():
    scale = LossScale(torch.device("cpu"))
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = AdamW(([p], []), lr=0.1)

    def step(admits):
        p.grad = torch.ones(3) * scale.value
        return optimizer.step(1.0, scale, admits)

    step(lambda norm: norm < 2)
    before = [t.clone() for t in (p, optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"], optimizer.completed)]
    assert before[3] == 1
    assert step(lambda norm: norm > 2) == pytest.approx(math.sqrt(3))  # the true norm is reported
    after = [p, optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"], optimizer.completed]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert scale.value == 2.0**16  # a spike is no overflow


def test_r15_the_verdict_never_waits_for_the_device():
    with FakeTensorMode():  # refuses whatever depends on a value
        device = torch.device("cpu")
        judge = Guard(device, LossScale(device), spikes=True)
        judge.admits(torch.ones(()), torch.ones(()))  # the value of torch.tensor(1.0) is known even there
        with pytest.raises(DataDependentOutputException):
            judge.verdict.item()


def noise(count, seed=0):
    generator = np.random.default_rng(seed)
    return [(float(a), float(b)) for a, b in zip(generator.normal(3, 0.1, count), generator.normal(1, 0.2, count))]


def test_r15_spikes_of_loss_and_norm_are_skipped():
    judge = Guard(torch.device("cpu"), spikes=True)
    quiet = noise(guard.WINDOW)
    assert set(admitted(judge, [(9.0, 9.0), *quiet[1:]])) == {UPDATED}  # nothing is a spike before the window is full
    assert set(admitted(judge, noise(guard.WINDOW, 1))) == {UPDATED}
    before = judge.window.clone()
    mean, std = before.mean(0), before.std(0)
    for column in (0, 1):
        for sigmas, verdict in ((5.9, UPDATED), (6.1, SPIKE)):
            copy = Guard(torch.device("cpu"), spikes=True)
            copy.load_state(json.loads(json.dumps(judge.state())))
            assert torch.equal(copy.window, before)
            value = mean.clone()
            value[column] += sigmas * std[column]
            assert admitted(copy, [tuple(value.tolist())]) == [verdict]
    assert admitted(judge, [(-50.0, 1.0)]) == [UPDATED]  # down is good


def test_r15_a_level_that_stays_up_is_skipped_four_times():
    judge = Guard(torch.device("cpu"), spikes=True)
    admitted(judge, noise(guard.WINDOW))
    assert admitted(judge, [(100.0, 1.0)] * 8) == [SPIKE] * 4 + [UPDATED] * 4


def test_r15_the_spike_window_is_kept(data, tmp_path, monkeypatch):  # noqa: F811
    keys = {"spike_guard": True, "max_iters": 150, "lr_decay_iters": 150, "eval_interval": 100, "log_interval": 50, **INJECTED}
    monkeypatch.setenv("NANOGPT_FAULT", "spike@140")
    run(data, tmp_path / "whole", **keys)
    run(data, tmp_path / "halves", **keys | {"max_iters": 135})
    run(data, tmp_path / "halves", **keys, init_from="resume")
    for name in ("whole", "halves"):
        skipped = [(r["iter"], r["skipped"]) for r in records(tmp_path / name, "train") if "skipped" in r]
        assert skipped == [(140, "spike")]
        window = checkpoint.read_state(tmp_path / name / "step-150")["guard"]
        assert window["seen"] == 150
    off = keys | {"spike_guard": False}
    run(data, tmp_path / "off", **off)
    assert not any("skipped" in r for r in records(tmp_path / "off", "train"))


def test_r15_so_many_in_a_row_end_the_run(data, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setenv("NANOGPT_FAULT", "nan@3,nan@7-40")
    keys = INJECTED | {"max_iters": 60, "max_bad_steps": 6, "eval_interval": 5, "checkpoint_minutes": 1e-9}
    assert run(data, tmp_path, **keys) == 1
    err = capsys.readouterr().err
    position = 7 * 2 * 4
    for expected in (
        "6 updates in a row were skipped, the first was 7: not finite; loss nan, gradient norm [0-9.]+",
        rf"data: samples {position} to {position + 7} of the order of seed 1337 in .*walk",
        rf"last checkpoint: {tmp_path}/step-7 is untouched; the weights in memory are those from before update 7",
        r"  3: nan, [0-9.]+  not finite",
        r"  6: [0-9.]+, [0-9.]+$",
        r"  --learning_rate=0.005 \(now 0.01\), or a longer --warmup_iters",
        "  --spike_guard",
        "  --anomaly_dump=true",
    ):
        assert re.search(expected, err, re.MULTILINE), expected
    assert "grad_clip" not in err
    assert status(tmp_path)["state"] == "failed"
    assert status(tmp_path)["reason"].startswith("6 updates in a row were skipped, the first was 7")
    assert max(checkpoint.steps(tmp_path)) == 7  # none of a state whose loss is not finite
    checkpoint.verify(tmp_path / "step-7")
    assert losses(tmp_path)[-1][0] == 12
    monkeypatch.setenv("NANOGPT_FAULT", "")
    assert run(data, tmp_path, **keys | {"max_iters": 12}, init_from="resume") == 0
    assert losses(tmp_path)[-1][0] == 11


def test_r15_never_ends_where_not_asked(data, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("NANOGPT_FAULT", "nan@0-19")
    assert run(data, tmp_path, **INJECTED, max_bad_steps=0, max_iters=22, eval_interval=30) == 0
    judge = Guard(torch.device("cpu"), limit=2)
    judge.observe(Step(0, math.nan, 1.0, NOT_FINITE))
    judge.observe(Step(1, 1.0, 1.0, UPDATED))
    judge.observe(Step(2, 1.0, 1.0, OVERFLOW))
    judge.observe(Step(3, 1.0, 1.0, SPIKE))
    with pytest.raises(DivergenceError, match="2 updates in a row were skipped, the first was 3: spike"):
        judge.observe(Step(4, math.nan, 1.0, NOT_FINITE))


def test_r15_no_checkpoint_of_weights_that_are_not_finite(data, tmp_path, caplog):  # noqa: F811
    found = train.setup(load(TrainConfig, arguments(data, tmp_path)))
    found.loader.close()
    assert resume.unsound(found) == ""
    p = found.model.transformer.h[1].mlp.c_fc.weight
    found.optimizer.state[p]["exp_avg"][3, 2] = math.inf
    assert resume.unsound(found) == "rank 0: transformer.h.1.mlp.c_fc.weight or its moments are not finite"
    found.optimizer.state[p]["exp_avg"][3, 2] = 0.0
    found.evaluated, found.finite = 0, False
    assert resume.unsound(found) == "the evaluation is not finite"
    found.lock.release()


def test_r15_an_explosion_leaves_the_good_checkpoint(data, tmp_path, caplog, capsys):  # noqa: F811
    run(data, tmp_path, max_iters=5)
    before = {path: path.read_bytes() for path in (tmp_path / "step-5").iterdir()}
    # From here on one update is enough to lose everything
    keys = {"init_from": "resume", "learning_rate": 1e18, "decay_lr": False, "grad_clip": 0, "anomaly_dump": tmp_path / "dump"}
    assert run(data, tmp_path, **keys, max_bad_steps=5, eval_interval=7) == 1
    assert checkpoint.steps(tmp_path) == [5]
    assert {path: path.read_bytes() for path in (tmp_path / "step-5").iterdir()} == before
    assert "checkpoint not written after update 7: it was not finite" in caplog.text
    err = capsys.readouterr().err
    assert "--grad_clip=1.0 (now off)" in err
    assert "--anomaly_dump" not in err
    assert re.search(r"step-6-rank-0\.json: first not finite: activations: transformer\.h\.0\.", err)


def test_anomaly_dump_holds_the_batch_and_names_the_layer(data, tmp_path):  # noqa: F811
    found = train.setup(load(TrainConfig, arguments(data, tmp_path / "out", anomaly_dump="true")))
    batches = [next(found.loader) for _ in range(4)]  # of updates 0 and 1
    found.it = 2
    out = anomaly.directory(found.config)
    assert out == tmp_path / "out" / "anomaly"
    assert anomaly.dump(found, 1, out).endswith("done again, it is finite: an effect of dropout, or of the hardware")
    written = checkpoint.load_tensors(out / "step-1-rank-0.safetensors")
    for i, name in enumerate(("x", "y")):
        assert torch.equal(written[name], torch.stack([batch[i] for batch in batches[2:]]))
    record = json.loads((out / "step-1-rank-0.json").read_text())
    assert [float(loss) for loss in record["losses"]] == pytest.approx([math.log(32)] * 2, abs=0.2)
    weight = found.model.transformer.h[1].attn.c_proj.weight
    assert record["weights"]["transformer.h.1.attn.c_proj.weight"]["rms"] == pytest.approx(weight.square().mean().sqrt().item())
    assert record["weight gradients"].keys() == record["weights"].keys()
    assert next(iter(record["activations"])).startswith("transformer.h.0.ln_1 (micro-step 0)")
    with torch.no_grad():
        weight[0, 0] = math.nan
    assert anomaly.dump(found, 1, out).endswith("first not finite: weights: transformer.h.1.attn.c_proj.weight")
    with torch.no_grad():
        weight[0, 0] = 0.0
        found.model.transformer.h[1].ln_2.weight.fill_(3e38)  # finite, but what it makes is not
    assert "first not finite: activations: transformer.h.1." in anomaly.dump(found, 1, out)
    (tmp_path / "file").touch()
    refused = anomaly.dump(found, 1, tmp_path / "file")
    assert refused.startswith("anomaly_dump=true: rank 0: not written: ")
    assert "File exists" in refused
    found.loader.close()
    found.lock.release()
    assert anomaly.directory(TrainConfig()) is None


# R16: a rank that hangs


def test_r16_a_hung_rank_ends_the_run_and_is_named(data, tmp_path):  # noqa: F811
    command = [*TORCHRUN, "-m", "nanogpt.train", *arguments(data, tmp_path, timeout=6, **INJECTED)]
    code, _, err = start(command, NANOGPT_FAULT="hang@7:rank1")
    assert code == 1
    found = r"no progress for \d+ s, --timeout=6; hangs: rank 1 \(at the forward pass\)"
    assert re.search(r"rank 0: " + found, err), err
    assert re.fullmatch(found, status(tmp_path)["reason"])
    assert (status(tmp_path)["state"], status(tmp_path)["iter"]) == ("failed", 7)


WATCHED = """
import sys, time, torch
import torch.distributed as dist
from nanogpt.distributed import World
from nanogpt.watchdog import Watchdog
rank, port, behaviour = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
store = dist.PrefixStore("x", dist.TCPStore("127.0.0.1", port, 2, is_master=False))
world = World(rank, rank, 2, torch.device("cpu"), store)
watchdog = Watchdog(world, timeout=2.0, report=lambda message: print("report", message, flush=True))
print("ready", flush=True)
for it in range(10**6):
    watchdog.at(f"update {it}")
    if it == 5 and behaviour == "waits":
        time.sleep(1000)
    if it == 30 and behaviour == "leaves":
        watchdog.close()
        break
    time.sleep(0.1)
"""


def await_ready(process):
    """Where names are not resolved, PyTorch warns of that first."""
    assert "ready\n" in iter(process.stdout.readline, "")


@pytest.mark.parametrize("how", ["stopped", "same place"])
def test_r16_a_stopped_process_and_one_that_waits(how):
    store = torch.distributed.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    both = [launch(["-c", WATCHED, rank, store.port, "waits"]) for rank in (0, 1)]
    try:
        for process in both:
            await_ready(process)
        if how == "stopped":
            until(lambda: all(store.get(f"x/watchdog/{rank}").endswith(b"update 5") for rank in (0, 1)))
            both[1].send_signal(signal.SIGSTOP)
        out = both[0].communicate(timeout=180)[0]
        assert both[0].returncode == 1
        who = r"rank 1 \(at update 5\)" if how == "stopped" else r"rank 0 \(at update 5\), rank 1 \(at update 5\): all are at"
        assert re.search(rf"rank 0: no progress for \d+ s, --timeout=2; hangs: {who}", out), out
        assert "report no progress" in out
        assert ("in <module>" in out) == (how == "same place")  # the stack of what hangs
    finally:
        for process in both:
            process.send_signal(signal.SIGKILL)
            process.communicate()


@pytest.mark.parametrize("how", ["no store", "no watchdog"])
def test_r16_a_store_that_is_gone_and_a_process_that_never_came(how):
    store = torch.distributed.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    with launch(["-c", WATCHED, 0, store.port, "waits"]) as process:
        await_ready(process)
        until(lambda: store.get("x/watchdog/0").endswith(b"update 5"))
        if how == "no store":
            del store
        try:
            out = process.communicate(timeout=180)[0]
        finally:
            process.kill()
    assert process.returncode == 1
    why = r"at update 5; the other processes are gone \(" if how == "no store" else r"hangs: rank 1 \(at start-up\)\n"
    assert re.search(rf"rank 0: no progress for \d+ s.* {why}", out), out
    assert "report no progress" in out


SLOW_SAVE = """
import sys, time
from nanogpt import checkpoint, config, train
read, tensors = checkpoint._bytes, 0
def slow(t):
    global tensors
    tensors += 1
    if tensors <= 40:  # of the first save
        time.sleep(0.3)
    return read(t)
checkpoint._bytes = slow
sys.exit(train.main(config.load(config.TrainConfig, sys.argv[1:])))
"""


@pytest.mark.parametrize("how", ["in the loop", "waited for"])
def test_r16_a_long_save_is_no_hang(data, tmp_path, how):  # noqa: F811
    script = tmp_path / "slow.py"
    script.write_text(SLOW_SAVE)
    # A save of 12 s; 4 s without progress, and 3 s more in which others may show that they live
    keys = {"max_iters": 4, "lr_decay_iters": 4, "eval_interval": 2, "timeout": 4, "async_save": how == "waited for"}
    code, _, err = start([*TORCHRUN, script, *arguments(data, tmp_path / "out", **keys)])
    assert code == 0, err
    assert checkpoint.steps(tmp_path / "out") == [2, 4]
    assert "no progress" not in err


# 8 KB a second, for the first 10 seconds or for ever, so that no call of its own may take longer than --timeout
SLOW_DISK = """
import io, os, stat, sys, time
from nanogpt import checkpoint, config, train
what, checkpoint.PIECE, checkpoint.READ = sys.argv[1], 4096, 4096
rate, left, fsync, forced = 8192, 10.0, os.fsync, {}
def wait(size):
    global left
    if left > 0:
        left -= size / rate
        time.sleep(size / rate)
def slow(descriptor):
    found = os.fstat(descriptor)
    if what == "hangs" and stat.S_ISREG(found.st_mode):
        time.sleep(1000)
    elif what == "writes" and stat.S_ISREG(found.st_mode):
        wait(found.st_size - forced.get(found.st_ino, 0))
        forced[found.st_ino] = found.st_size
    fsync(descriptor)
class Slow(io.FileIO):
    def read(self, size=-1):
        data = super().read(size)
        wait(len(data))
        return data
    def readinto(self, buffer):
        count = super().readinto(buffer)
        wait(count)
        return count
os.fsync = slow
if what == "reads":
    checkpoint.open = lambda path, mode: Slow(os.fspath(path)) if mode == "rb" else open(path, mode)
sys.exit(train.main(config.load(config.TrainConfig, sys.argv[2:])))
"""


@pytest.mark.parametrize("what", ["writes", "reads", "hangs"])
def test_r16_a_slow_disk_is_no_hang_and_one_that_stands_still_is(data, tmp_path, what):  # noqa: F811
    script = tmp_path / "slow.py"
    script.write_text(SLOW_DISK)
    keys = {"max_iters": 4, "lr_decay_iters": 4, "eval_interval": 1, "timeout": 2, "async_save": False}
    code, _, err = start([script, what, *arguments(data, tmp_path / "out", **keys)])
    if what == "hangs":
        assert code == 1
        assert re.search(r"rank 0: no progress for \d+ s, --timeout=2; hangs: rank 0 \(at saving\)", err), err
    else:
        assert (code, "no progress" in err) == (0, False), err
        assert len(checkpoint.steps(tmp_path / "out")) < 4


def test_r16_progress_keeps_the_watchdog_quiet():
    store = torch.distributed.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    alone = WATCHED.replace("World(rank, rank, 2", "World(0, 0, 1").replace('"cpu"), store)', '"cpu"))')
    with launch(["-c", alone, 0, store.port, "leaves"]) as process:
        out = process.communicate(timeout=180)[0]
    assert (process.returncode, "no progress" in out, "ready\n" in out) == (0, False, True), out


# R17: the GPU's health


class SickGpu(types.SimpleNamespace):
    """NVML of a GPU on which everything goes wrong at the third reading."""

    class NVMLError(Exception):
        pass

    def __init__(self, lacks=""):
        super().__init__(readings=0, told=threading.Event(), lacks=lacks, xids=[79, 12345], freed=0)
        for i, name in enumerate(("HwSlowdown", "SwThermalSlowdown", "HwThermalSlowdown", "HwPowerBrakeSlowdown")):
            setattr(self, f"nvmlClocksEventReason{name}", 8 << i)

    def __getattr__(self, name):
        if name.startswith("NVML_") or name == "nvmlEventTypeXidCriticalError":
            return 0
        return lambda *args: self.call(name)

    def call(self, name):
        if name == self.lacks:
            raise self.NVMLError("Not Supported")
        if name == "nvmlDeviceGetUtilizationRates":
            self.readings += 1
            if self.readings == 6:
                self.told.set()
        sick = self.readings >= 3
        if name == "nvmlEventSetWait_v2":
            if not sick or not self.xids:
                raise self.NVMLError("Timeout")
            return types.SimpleNamespace(eventData=self.xids.pop(0))
        if name == "nvmlEventSetFree":
            self.freed += 1
        return {
            "nvmlDeviceGetUtilizationRates": types.SimpleNamespace(gpu=1),
            "nvmlDeviceGetMemoryInfo": types.SimpleNamespace(used=0),
            "nvmlDeviceGetTemperatureThreshold": 90,
            "nvmlDeviceGetTemperature": 95 if sick else 60,
            "nvmlDeviceGetTotalEccErrors": 2 if sick else 0,
            "nvmlDeviceGetRemappedRows": (0, 1, 1, 0) if sick else (0, 0, 0, 0),
            "nvmlDeviceGetCurrentClocksEventReasons": 8 | 4 if sick else 4,  # 4: the normal power cap
        }.get(name, 0)


SICKNESSES = {
    "nvmlDeviceGetTotalEccErrors": ["2 uncorrected ECC errors since the driver was loaded"],
    "nvmlDeviceGetRemappedRows": [
        "1 memory rows remapped after uncorrected errors",
        "a row remapping is pending: reset the GPU",
    ],
    "nvmlDeviceGetCurrentClocksEventReasons": ["clocks are throttled by hardware slowdown"],
    "nvmlDeviceGetTemperatureThreshold": ["at 90 C, where it slows down, or above"],
    "nvmlEventSetCreate": ["Xid 79, the GPU has fallen off the bus: reset or replace it", "Xid 12345"],
}


@pytest.mark.parametrize("lacks", ["", *SICKNESSES])
def test_r17_what_is_wrong_with_the_gpu_is_told_once(monkeypatch, lacks):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="abc"))
    nvml, told = SickGpu(lacks), []
    telemetry = Telemetry(torch.device("cuda", 0), nvml, interval=0.001, warn=told.append)
    assert nvml.told.wait(10)
    telemetry.close()
    expected = [f"GPU health: cuda:0: {what}" for name, whats in SICKNESSES.items() if name != lacks for what in whats]
    assert told == expected
    assert nvml.freed == (lacks != "nvmlEventSetCreate")


def test_r17_health_is_printed_and_recorded(tmp_path, capsys):
    from tests.test_monitor import new_monitor

    log = new_monitor(tmp_path)
    log.telemetry.warn("GPU health: cuda:0: Xid 79")
    log.close(0, "failed")
    assert "GPU health: cuda:0: Xid 79\n" in capsys.readouterr().out
    assert [r["message"] for r in records(tmp_path, "health")] == ["GPU health: cuda:0: Xid 79"]


def test_r17_no_nvml_is_one_line(data, tmp_path, capsys):  # noqa: F811
    run(data, tmp_path, max_iters=2)
    assert capsys.readouterr().out.count("GPU sensors: none for device cpu\n") == 1


# R18: out of memory


def test_r18_injected(data, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setenv("NANOGPT_FAULT", "oom@3")
    assert run(data, tmp_path, **INJECTED) == 2
    err = capsys.readouterr().err
    assert re.search(
        r"^train: rank 0: out of memory on cpu with batch_size=4, block_size=16: peak [\d,]{9,} bytes, free [\d,]{9,}; "
        r"try --batch_size=2 --gradient_accumulation_steps=4, or --\S+, or --\S+ \(injected: out of memory\)$",
        err,
        re.MULTILINE,
    ), err
    assert status(tmp_path)["state"] == "failed"
    assert status(tmp_path)["reason"].startswith("out of memory on cpu")


# A run that may take 2 GiB more than PyTorch does, whose CUDA libraries alone may be more than that
LIMITED = """
import resource, sys
from pathlib import Path
from nanogpt import config, train
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30),) * 2)
sys.exit(train.main(config.load(config.TrainConfig, sys.argv[1:])))
"""


@pytest.mark.parametrize(
    ("keys", "flags"),
    [
        ({"batch_size": 200_000}, "--batch_size=100000 --gradient_accumulation_steps=4"),  # in the first step
        ({"n_embd": 200_000, "n_layer": 1}, "--batch_size=2 --gradient_accumulation_steps=4"),  # while the model is made
    ],
    ids=["step", "model"],
)
def test_r18_real(data, tmp_path, keys, flags):  # noqa: F811
    keys = {"sampling": "random", "eval_interval": 100, "eval_iters": 1, **keys}
    code, _, err = start(["-c", LIMITED, *arguments(data, tmp_path, **keys)])
    assert code == 2, err
    pattern = rf"train: rank 0: out of memory on cpu with batch_size={keys.get('batch_size', 4)}, block_size=16: peak .*"
    assert re.search(pattern + re.escape(f"try {flags}, or --"), err), err
    assert "Traceback" not in err


def test_r18_a_save_without_room_for_its_copy_says_how_to_need_none(data, tmp_path, monkeypatch, capsys):  # noqa: F811
    def full(*args):
        raise RuntimeError("CUDA error: out of memory")  # as pinned memory has it

    monkeypatch.setattr(saver.Saver, "_copy", full)
    assert run(data, tmp_path) == 2
    assert "; try --async_save=false, or --batch_size=2 --gradient_accumulation_steps=4, or --" in capsys.readouterr().err
    assert run(data, tmp_path, async_save=False, overwrite=True) == 0


@pytest.mark.parametrize("rank", [0, 1])
def test_r18_during_set_up_every_rank_speaks(data, tmp_path, monkeypatch, capsys, rank):  # noqa: F811
    def full(config):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(train, "setup", full)
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    assert run(data, tmp_path) == 2
    assert capsys.readouterr().err.startswith(f"train: rank {rank}: out of memory on cpu with batch_size=4, block_size=16: ")


@pytest.mark.parametrize(
    ("keys", "flags"),
    [
        ({"batch_size": 12}, ["--batch_size=6 --gradient_accumulation_steps=80", "--recompute=true", "--block_size=512"]),
        ({"batch_size": 1}, ["--recompute=true", "--block_size=512", "--dtype=bfloat16"]),
        ({"batch_size": 1, "recompute": True}, ["--block_size=512", "--dtype=bfloat16", "--async_save=false"]),
        (
            {"batch_size": 3, "init_from": "resume"},
            ["--batch_size=2 --gradient_accumulation_steps=80", "--recompute=true", "--dtype=bfloat16"],
        ),
    ],
)
def test_r18_the_flags_exist(keys, flags):
    config = TrainConfig(**keys)
    message = anomaly.memory_advice(config, torch.device("cpu"), torch.OutOfMemoryError("CUDA out of memory.\nMore"))
    assert re.search(r"try (.*) \(CUDA out of memory\.\)$", message)[1].split(", or ") == flags
    for flag in flags:
        load(TrainConfig, flag.split())


@pytest.mark.parametrize(
    ("error", "lacks"),
    [
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("Storage size calculation overflowed with sizes=[2, 1000000000000000000, 16]"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("shape mismatch"), False),
        (RuntimeError('torch_call_dispatcher("aten::copy_", "") API call failed'), False),
    ],
)
def test_r18_what_is_a_lack_of_memory(error, lacks):
    assert anomaly.out_of_memory(error) == lacks


# R19: injection


def test_r19_grammar():
    found = faults.parse("nan@7:rank1,kill@9,hang@5-6,enospc@save2")
    assert [(f.kind, f.first, f.last, f.rank) for f in found] == [
        ("nan", 7, 7, 1),
        ("kill", 9, 9, 0),
        ("hang", 5, 6, 0),
        ("enospc", 2, 2, 0),
    ]
    for wrong in ("nan", "nan@x", "enospc@2", "kill@save1", "burn@3", "nan@7:rank"):
        with pytest.raises(ValueError, match=re.escape(f"NANOGPT_FAULT={wrong}: expected KIND@N")):
            faults.parse(f"nan@1,{wrong}")


def test_r19_refused_unless_allowed(data, tmp_path, monkeypatch, capsys):  # noqa: F811
    for text, keys, message in (
        ("nan@7", {}, "train: NANOGPT_FAULT=nan@7: refused without --allow_fault_injection\n"),
        ("burn@7", INJECTED, "train: NANOGPT_FAULT=burn@7: expected KIND@N, KIND@N-M or KIND@N:rankR, or enospc@saveN\n"),
    ):
        monkeypatch.setenv("NANOGPT_FAULT", text)
        with pytest.raises(SystemExit) as stop:
            run(data, tmp_path, **keys)
        assert (stop.value.code, capsys.readouterr().err) == (2, message)
    assert list(tmp_path.iterdir()) == []


def test_r19_nothing_is_attached_without(data, tmp_path, monkeypatch):  # noqa: F811
    write = checkpoint._write
    found = train.setup(load(TrainConfig, arguments(data, tmp_path)))
    for text, hooks in (("", 0), ("nan@7:rank1,enospc@save1:rank1", 0), ("nan@7", 1)):
        faults.install(found, faults.parse(text))
        assert len(found.wrapped._forward_hooks) == len(found.wrapped._forward_pre_hooks) == hooks
    assert checkpoint._write is write
    found.loader.close()
    found.lock.release()


def test_r19_a_full_disk(data, tmp_path, monkeypatch, caplog):  # noqa: F811
    monkeypatch.setenv("NANOGPT_FAULT", "enospc@save2")
    monkeypatch.setattr(checkpoint, "_write", checkpoint._write)  # put back afterwards
    assert run(data, tmp_path, **INJECTED) == 0
    assert "No space left on device" in caplog.text
    assert checkpoint.steps(tmp_path) == [5, 12]  # the second one, of 10, is the one that failed


# R20: where the time goes


def test_r20_after_three_kills_the_account_is_the_wall_time(data, tmp_path):  # noqa: F811
    keys = INJECTED | {"max_iters": 40, "eval_interval": 4, "lr_decay_iters": 40, "timeout": 0, "async_save": False}
    begun, exits = time.time(), []
    for _ in range(4):
        resume = {"init_from": "resume"} if checkpoint.steps(tmp_path) else {}
        command = ["-m", "nanogpt.train", *arguments(data, tmp_path, **keys | resume)]
        with launch(command, NANOGPT_FAULT="kill@7,kill@18,kill@31") as process:
            process.communicate(timeout=180)
            exits.append(process.returncode)
        time.sleep(1.0)
    assert exits == [-signal.SIGKILL] * 3 + [0]
    first, end = records(tmp_path, "start")[0], records(tmp_path, "end")[-1]
    started, spent = first["time"] - sum(first["spent"].values()), end["spent"]
    assert begun < started < first["time"] < end["time"] < time.time()
    assert sum(spent.values()) == pytest.approx(end["time"] - started, rel=0.01)
    assert spent["down"] > 3.0  # the pauses
    assert spent["lost"] > 0
    steps = [r["ms"] / 1e3 for r in records(tmp_path, "train")]
    assert len(steps) == 40
    assert spent["training"] == pytest.approx(sum(steps), abs=0.5)
    assert min(spent["startup"], spent["evaluation"], spent["checkpoint"]) > 0


def test_r20_ledger():
    now = types.SimpleNamespace(t=100.0)
    ledger = goodput.Ledger(97.0, clock=lambda: now.t)
    ledger.enter("training")
    past = []
    for it in range(4):  # 2 s an update, a checkpoint of 1 s after the second
        now.t += 2
        past.append({"kind": "train", "iter": it, "time": now.t, "spent": ledger.spent()})
        if it == 1:
            with ledger.spend("checkpoint"):
                now.t += 1
            past.append({"kind": "checkpoint", "iter": 2, "time": now.t, "spent": ledger.spent()})
    assert ledger.spent() == {"startup": 3, "training": 8, "evaluation": 0, "checkpoint": 1, "lost": 0, "down": 0}
    assert ledger.longest("checkpoint") == 1
    now.t = 120.0
    again = goodput.Ledger(118.0, past, start=2, clock=lambda: now.t)
    again.enter("training")
    now.t += 3
    assert again.spent() == {"startup": 5, "training": 4 + 3, "evaluation": 0, "checkpoint": 1, "lost": 4, "down": 118 - 109}
    assert sum(again.spent().values()) == 123 - 97
    assert again.elapsed("training") == 3
    assert again.summary() == (
        "goodput: 26.9% of 26 s; startup 19.2%, evaluation 0.0%, checkpoint 3.8%, lost 15.4%, down 34.6%"
    )


def test_r20_two_threads_count_no_second_twice():
    now = types.SimpleNamespace(t=0.0)
    ledger = goodput.Ledger(0.0, clock=lambda: now.t)
    other = threading.Thread(target=lambda: ledger.enter("evaluation"))

    class Seconds(dict):
        """Lets the other thread in while the account is half done."""

        def __setitem__(self, kind, seconds):
            super().__setitem__(kind, seconds)
            if other.ident is None:
                now.t = 12.0
                other.start()
                other.join(0.5)

    ledger.seconds = Seconds(ledger.seconds)
    now.t = 10.0
    ledger.enter("training")
    other.join()
    now.t = 20.0
    assert ledger.spent() == {"startup": 10, "training": 2, "evaluation": 8, "checkpoint": 0, "lost": 0, "down": 0}


def test_r20_odd_lines_are_named_and_dropped(data, tmp_path, caplog):  # noqa: F811
    run(data, tmp_path, max_iters=5)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines()
    odd = ["[1]", '{"iter": 3}', '{"kind": "train", "iter": "3"}', "\udcff garbage", ""]
    text = "\n".join([*lines[:2], *odd, *lines[2:], '{"kind": "train", "it'])
    path.write_bytes(text.encode(errors="surrogateescape"))
    assert run(data, tmp_path, init_from="resume") == 0
    for number in range(3, 8):
        assert f"{path}:{number}: not a record, dropped" in caplog.text
    assert caplog.text.count("not a record") == 5  # the last line, cut short, is normal
    assert [it for it, _ in losses(tmp_path)] == list(range(12))


# Ends before max_iters


def test_patience(data, tmp_path, capsys):  # noqa: F811
    keys = {"learning_rate": 1e-30, "min_lr": 0, "eval_interval": 2, "patience": 2}
    assert run(data, tmp_path, **keys, max_iters=2, warmup_iters=0) == 0
    assert checkpoint.read_state(tmp_path / "step-2")["stale"] == 1
    assert run(data, tmp_path, **keys, init_from="resume") == 0
    assert status(tmp_path)["iter"] == 4
    assert status(tmp_path)["state"] == "finished"
    assert status(tmp_path)["reason"] == "patience=2: no better validation loss in 2 evaluations"
    assert checkpoint.read_state(tmp_path / "step-4")["final"]
    assert [r["iter"] for r in records(tmp_path, "eval")] == [0, 2, 4]
    assert run(data, tmp_path, **keys | {"patience": 3}, init_from="resume") == 0  # one more
    assert status(tmp_path)["iter"] == 6
    assert run(data, tmp_path / "better", eval_interval=2, patience=1) == 0  # each is better than the one before
    expected = {"state": "finished", "iter": 12, "reason": "", "time": 0, "launch": ""}
    assert status(tmp_path / "better") | {"time": 0} == expected


def test_patience_needs_a_validation_split(data, tmp_path, capsys):  # noqa: F811
    (tmp_path / "train.bin").write_bytes((data / "train.bin").read_bytes())
    (tmp_path / "dataset.json").write_text('{"vocab_size": 32}')
    with pytest.raises(SystemExit):
        run(tmp_path, tmp_path / "out", patience=2)
    assert capsys.readouterr().err == f"train: patience=2: {tmp_path} has no split val to evaluate\n"


def test_max_tokens(data, tmp_path, capsys):  # noqa: F811
    assert run(data, tmp_path, max_tokens=3 * 128 + 1) == 0  # the update in which they are reached is the last
    assert "updates: 0 to 4\n" in capsys.readouterr().out
    assert checkpoint.steps(tmp_path) == [4]
    assert checkpoint.read_state(tmp_path / "step-4")["final"]
    assert run(data, tmp_path, init_from="resume", max_tokens=128 * 6) == 0
    assert [it for it, _ in losses(tmp_path)] == list(range(6))
    assert run(data, tmp_path, init_from="resume", max_tokens=10**9) == 0
    assert status(tmp_path)["iter"] == 12


def test_max_hours(data, tmp_path):  # noqa: F811
    # Ready MARGIN seconds early, which a loaded machine may use up
    keys = {"max_iters": 10**6, "eval_interval": 10**6, "log_interval": 100, "max_hours": (guard.MARGIN + 5) / 3600}
    begun = time.monotonic()
    assert run(data, tmp_path, **keys) == 0
    assert time.monotonic() - begun < keys["max_hours"] * 3600
    stopped = status(tmp_path)["iter"]
    assert stopped > 0
    assert (status(tmp_path)["state"], status(tmp_path)["reason"]) == ("preempted", "--max_hours is nearly over")
    assert checkpoint.steps(tmp_path) == [stopped]
    assert run(data, tmp_path, **keys | {"max_hours": 0, "max_iters": stopped + 2}, init_from="resume") == 0
    assert losses(tmp_path)[-1][0] <= stopped + 1


def test_latest_stop_leaves_time_for_what_is_left():
    now = types.SimpleNamespace(t=1000.0)
    ledger = goodput.Ledger(990.0, clock=lambda: now.t)
    ledger.enter("training")
    now.t += 20
    end = 990 + 3600
    foreground, background = (types.SimpleNamespace(background=b, longest=0.0) for b in (False, True))
    assert guard.latest_stop(1.0, ledger, 10**8, 10, foreground) == end - 12 - 3 * 2 - 10
    assert guard.latest_stop(1.0, ledger, 10**8, 10, background) == end - 2 * 12 - 3 * 2 - 10
    background.longest = 20.0
    assert guard.latest_stop(1.0, ledger, 10**8, 10, background) == end - 2 * 30 - 3 * 2 - 10
    with ledger.spend("checkpoint"):
        now.t += 40
    assert guard.latest_stop(1.0, ledger, 10**8, 10, foreground) == end - 60 - 3 * 2 - 10
    assert guard.latest_stop(1.0, ledger, 10**8, 10, background) == end - 2 * 60 - 3 * 2 - 10


# Threads and the end of a process


def test_threads_are_the_cores_shared_out(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    for quota, expected in (("250000 100000\n", 3), ("50000 100000\n", 1), ("odd", 8), ("max 100000\n", 8)):
        monkeypatch.setattr(Path, "read_text", lambda path, text=quota: text)
        assert distributed.cores() == expected
    set_to = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    for local_size, omp, expected in (("1", None, [6]), ("4", None, [2]), ("16", None, [1]), ("4", "3", [])):
        set_to.clear()
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local_size)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if omp:
            monkeypatch.setenv("OMP_NUM_THREADS", omp)
        distributed.init(TrainConfig(device="cpu"))
        assert set_to == expected


def test_threads_are_in_the_banner(data, tmp_path, capsys, monkeypatch):  # noqa: F811
    for omp, why in (("1", "OMP_NUM_THREADS"), (None, "the cores, shared out")):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if omp:
            monkeypatch.setenv("OMP_NUM_THREADS", omp)
        run(data, tmp_path, max_iters=2, overwrite=True)
        threads = torch.get_num_threads()
        assert f"threads: {threads} a process ({why}), {distributed.cores()} cores\n" in capsys.readouterr().out
