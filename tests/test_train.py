"""nanogpt.train as its users start it: real processes, one and two, stopped by signals and resumed, on a small text."""

import functools
import logging
import math
import os
import re
import resource
import shutil
import signal
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels.linear import split_products
from nanogpt import checkpoint, distributed, train
from nanogpt.config import TrainConfig, load
from nanogpt.data.loader import Loader
from nanogpt.data.shards import open_dataset, write_shard
from nanogpt.model import GPT
from nanogpt.optim import learning_rate
from tests.runs import KILLED, ROOT, TORCHRUN, arguments, losses, records, run, start, status, walk


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return walk(tmp_path_factory.mktemp("walk"))


def test_exactly_max_iters_updates_the_last_one_evaluated_and_saved(data, tmp_path, capsys):
    assert run(data, tmp_path) == 0
    out = capsys.readouterr().out
    assert [it for it, _ in losses(tmp_path)] == list(range(12))
    assert [r["iter"] for r in records(tmp_path, "eval")] == [0, 5, 10, 12]
    assert status(tmp_path)["state"] == "finished"
    assert status(tmp_path)["iter"] == 12
    assert checkpoint.steps(tmp_path) == [10, 12]
    state = checkpoint.read_state(checkpoint.find(tmp_path))
    assert (state["iter"], state["final"], state["tokens"]) == (12, True, 12 * 2 * 4 * 16)
    assert state["val_loss"] == records(tmp_path, "eval")[-1]["val_loss"]
    assert state["loader"]["position"] == 12 * 2 * 4
    assert float(checkpoint.load_tensors(checkpoint.find(tmp_path) / checkpoint.OPTIM)["step"]) == 12
    for expected in (
        r"device: cpu, float32, 1 process, torch 2\.",
        r"model: 0\.01M parameters, 2 layers",
        r"data: .*walk\d+, tokens: train 20,000, val 3,000, sampling: epoch",
        r"tokens per update: 128 = 2 micro-steps x 4 sequences x 16 tokens; updates: 0 to 12",
        r"kernels: (torch|cpp): .*attention.*\(.*Triton.*\)",
        r"extension: nanogpt_cpu: (loaded \(\w+\)|nanogpt_cpu is not built)",
        r"mfu: n/a, .* --peak_flops",
        r"GPU sensors: none for device cpu",
        r"step 12: train loss \d\.\d{4}, val loss \d\.\d{4}",
        r"iter 11: loss \d\.\d{4}, time \d+\.\d\dms, mfu n/a, lr 1\.\d\de-03, norm \d+\.\d{3}, [\d,]+ tok/s, eta 0s",
    ):
        assert re.search("^" + expected, out, re.MULTILINE), expected
    assert ("products: fp32 as pairs of bfloat16 numbers" in out) == split_products()


def test_learns(data, tmp_path):
    run(data, tmp_path, max_iters=150, lr_decay_iters=150, eval_interval=150)
    first, last = records(tmp_path, "eval")
    assert first["val_loss"] == pytest.approx(math.log(32), abs=0.1)
    assert last["val_loss"] < 2.5  # the walk itself has 1.1


class PlainBlock(nn.Module):
    def __init__(self, C, n_head):
        super().__init__()
        self.n_head = n_head
        self.ln_1, self.ln_2 = (nn.LayerNorm(C, bias=False) for _ in range(2))
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(C, 3 * C, bias=False), "c_proj": nn.Linear(C, C, bias=False)})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(C, 4 * C, bias=False), "c_proj": nn.Linear(4 * C, C, bias=False)})

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (t.view(B, T, self.n_head, -1).transpose(1, 2) for t in self.attn.c_attn(self.ln_1(x)).split(C, dim=2))
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(k.shape[-1])
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        x = x + self.attn.c_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, C))
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x))))


class PlainGPT(nn.Module):
    """GPT-2 as nanoGPT defines it, in plain PyTorch."""

    def __init__(self, c):
        super().__init__()
        blocks = nn.ModuleList(PlainBlock(c.n_embd, c.n_head) for _ in range(c.n_layer))
        tables = {"wte": nn.Embedding(c.vocab_size, c.n_embd), "wpe": nn.Embedding(c.block_size, c.n_embd)}
        self.transformer = nn.ModuleDict(tables | {"h": blocks, "ln_f": nn.LayerNorm(c.n_embd, bias=False)})

    def forward(self, idx, targets):
        t = self.transformer
        x = t.wte(idx) + t.wpe(torch.arange(idx.shape[1]))
        for block in t.h:
            x = block(x)
        logits = t.ln_f(x) @ t.wte.weight.T
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def test_first_100_losses_equal_those_of_plain_pytorch(data, tmp_path):
    keys = {"max_iters": 100, "lr_decay_iters": 100, "eval_interval": 1000, "warmup_iters": 10}
    run(data, tmp_path, **keys)
    config = load(TrainConfig, arguments(data, tmp_path, **keys))
    torch.manual_seed(config.seed)
    weights = dict(GPT(config.model(32), torch.float32).named_parameters())
    model = PlainGPT(config.model(32))
    model.load_state_dict(weights)
    decay = {True: [], False: []}
    for p in model.parameters():
        decay[p.dim() >= 2].append(p)
    groups = [{"params": decay[True], "weight_decay": 0.1}, {"params": decay[False], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    loader = Loader(data, "train", config.batch_size, config.block_size, seed=config.seed)
    for it, ours in losses(tmp_path):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(it, config)
        batches = [next(loader) for _ in range(2)]
        theirs = sum(model(x, y) for x, y in batches) / 2
        theirs.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert abs(ours - theirs.item()) < 1e-4, it
    loader.close()


KILLED_IN_EVALUATION = """
import os, signal, sys
from nanogpt import config, distributed, train
rank = int(sys.argv[1])
batches, made = train.eval_batches, []
def signalled(*args):
    for batch in batches(*args):
        made.append(batch)
        if len(made) == int(sys.argv[2]) and int(os.environ.get("RANK", 0)) == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        yield batch
train.eval_batches = signalled
code = train.main(config.load(config.TrainConfig, sys.argv[3:]))
os.write(1, f"batches: {len(made)}\\n".encode())  # whole, beside the other rank
sys.exit(code)
"""


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_r13_an_evaluation_is_stopped_and_done_again(data, tmp_path, processes):
    keys = {"eval_iters": 9, "gradient_accumulation_steps": 2}
    run(data, tmp_path / "whole", **keys)
    killed, script = tmp_path / "killed", tmp_path / "killed.py"
    script.write_text(KILLED_IN_EVALUATION)
    rounds = 2 * -(-9 // processes)  # of the ranks, over both splits; the second evaluation is the one before update 5
    command = [*TORCHRUN, script] if processes == 2 else [script]
    code, out, err = start([*command, processes - 1, rounds + 2, *arguments(data, killed, **keys)])
    assert code == 0, err
    assert out.count(f"batches: {rounds + 2}\n") == processes  # of 2 * rounds
    assert (status(killed)["state"], status(killed)["iter"]) == ("preempted", 5)
    assert [r["iter"] for r in records(killed, "eval")] == [0]
    run(data, killed, init_from="resume", **keys)
    for kind, value in (("eval", "val_loss"), ("train", "loss")):
        ours, theirs = ([(r["iter"], r[value]) for r in records(path, kind)] for path in (killed, tmp_path / "whole"))
        assert [it for it, _ in ours] == [it for it, _ in theirs]
        assert ours == theirs if processes == 1 else np.abs(np.subtract(ours, theirs)).max() < 1e-4
    code, out, err = start([*command, processes - 1, 2, *arguments(data, killed, init_from="resume", eval_only=True, **keys)])
    assert code == 0, err
    assert out.count("batches: 2\n") == processes
    assert "preempted after 12 updates" in out


@pytest.mark.slow
def test_two_processes_follow_one(data, tmp_path):
    keys = {"gradient_accumulation_steps": 4}
    run(data, tmp_path / "one", **keys)
    code, out, err = start([*TORCHRUN, "-m", "nanogpt.train", *arguments(data, tmp_path / "two", **keys)])
    assert code == 0, err
    assert "2 processes" in out
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two) == 12
    assert max(abs(a - b) for (_, a), (_, b) in zip(one, two, strict=True)) < 1e-4
    evals = [[r["val_loss"] for r in records(tmp_path / name, "eval")] for name in ("one", "two")]
    assert np.abs(np.subtract(*evals)).max() < 1e-4


MISTAKEN = """
import os, sys
from nanogpt import config, train
ranks, find = sys.argv[1].split(","), train.find
def unreadable(dataset):
    if os.environ["RANK"] in ranks:
        raise PermissionError(13, "Permission denied", "train.bin")
    return find(dataset)
train.find = unreadable
sys.exit(train.main(config.load(config.TrainConfig, sys.argv[2:])))
"""


@pytest.mark.parametrize("ranks", ["1", "0,1"])
def test_a_mistake_of_any_rank_is_told_once(data, tmp_path, ranks):
    script = tmp_path / "mistaken.py"
    script.write_text(MISTAKEN)
    code, _, err = start([*TORCHRUN, script, ranks, *arguments(data, tmp_path / "out")])
    told = re.findall(r"train: rank (\d): (.*)\n", err)
    assert (code, [line for _, line in told]) == (1, ["[Errno 13] Permission denied: 'train.bin'"]), err
    assert told[0][0] in ranks


def test_r04_a_damaged_newest_checkpoint_is_passed_over(data, tmp_path, caplog):
    run(data, tmp_path)
    reference = losses(tmp_path)
    with open(tmp_path / "step-12" / checkpoint.MODEL, "r+b") as file:
        file.seek(-1000, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1000, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    with caplog.at_level(logging.WARNING):
        assert run(data, tmp_path, init_from="resume") == 0
    assert re.search(r"step-12/model.safetensors: tensor \S+ was altered; passing over step-12", caplog.text)
    assert losses(tmp_path) == reference
    checkpoint.verify(tmp_path / "step-12")  # written anew


def mistake(capsys, *args, **keys):
    with pytest.raises(SystemExit) as stop:
        run(*args, **keys)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def test_r04_nothing_to_resume_is_an_error(data, tmp_path, capsys):
    assert "no checkpoint in it" in mistake(capsys, data, tmp_path, init_from="resume")
    run(data, tmp_path)
    capsys.readouterr()
    assert "no checkpoint step-3; it has steps 10, 12" in mistake(capsys, data, tmp_path, resume=3)
    for step in (10, 12):
        (tmp_path / f"step-{step}" / checkpoint.STATE).unlink()
    before = sorted(tmp_path.rglob("*"))
    assert "none of its 2 checkpoints can be read" in mistake(capsys, data, tmp_path, init_from="resume")
    assert sorted(tmp_path.rglob("*")) == before


def test_another_run_is_not_written_over(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    run(data, tmp_path)
    capsys.readouterr()
    assert "holds step-12 of another run" in mistake(capsys, data, tmp_path)
    assert "dataset=nowhere" in mistake(capsys, "nowhere", tmp_path, overwrite=True)
    assert "tensorboard=True: not installed" in mistake(capsys, data, tmp_path, overwrite=True, tensorboard=True)
    assert checkpoint.steps(tmp_path) == [10, 12]  # nothing is deleted for a command that cannot run
    assert run(data, tmp_path, overwrite=True, max_iters=3) == 0
    assert checkpoint.steps(tmp_path) == [3]
    assert [it for it, _ in losses(tmp_path)] == [0, 1, 2]


def test_restarted_by_torchrun_continues(data, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # its default; the agent is this process's parent
    run(data, tmp_path, max_iters=6)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert run(data, tmp_path, overwrite=True) == 0
    assert [r["iter"] for r in records(tmp_path, "start")] == [0, 6]
    assert [it for it, _ in losses(tmp_path)] == list(range(12))
    assert run(data, tmp_path, resume=6, max_iters=13) == 0  # from the newest: it went back to 6 when it was first started
    assert [r["iter"] for r in records(tmp_path, "start")] == [0, 6, 12]


@pytest.mark.parametrize("key", ["TORCHELASTIC_RUN_ID", "agent", "none"])
def test_restarted_by_torchrun_takes_no_other_run_for_its_own(data, tmp_path, monkeypatch, capsys, key):
    if key != "none":
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "first")
    run(data, tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "first" if key == "agent" else "second")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    if key == "agent":
        monkeypatch.setattr(os, "getppid", lambda: 1)
    (tmp_path / "step-10" / checkpoint.STATE).unlink()
    capsys.readouterr()
    assert "holds step-12 of another run" in mistake(capsys, data, tmp_path)
    assert "step-10/state.json: missing" in mistake(capsys, data, tmp_path, resume=10)
    assert checkpoint.steps(tmp_path) == [10, 12]
    assert run(data, tmp_path, overwrite=True, max_iters=3) == 0  # the attempt before this one may have died ahead of it
    assert checkpoint.steps(tmp_path) == [3]
    assert records(tmp_path, "end")[-1]["spent"]["down"] == 0


def test_torchrun_s_restarts_do_not_turn_a_refusal_into_a_resumption(data, tmp_path):
    run(data, tmp_path)
    command = [*TORCHRUN, "--max-restarts=1", "-m", "nanogpt.train", *arguments(data, tmp_path, max_iters=14)]
    code, _, err = start(command)
    assert code == 1
    assert err.count("holds step-12 of another run") >= 2  # by both attempts
    assert checkpoint.steps(tmp_path) == [10, 12]


def test_preempted_in_its_first_evaluation_it_keeps_its_account(data, tmp_path, monkeypatch):
    batches = train.eval_batches

    def signalled(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        yield from batches(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "eval_batches", signalled)
        assert run(data, tmp_path) == 0
    assert checkpoint.steps(tmp_path) == [0]
    time.sleep(0.3)
    assert run(data, tmp_path, init_from="resume") == 0
    assert [r["iter"] for r in records(tmp_path, "start")] == [0, 0]
    assert records(tmp_path, "end")[-1]["spent"]["down"] > 0.25


def test_a_skipped_update_costs_no_last_checkpoint(data, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("NANOGPT_FAULT", "nan@11")  # the last one: its evaluation shows that the weights are sound
    assert run(data, tmp_path / "finished", allow_fault_injection=True) == 0
    assert status(tmp_path / "finished")["state"] == "finished"
    assert checkpoint.read_state(checkpoint.find(tmp_path / "finished"))["final"]

    put = train.distributed.Readback.put

    def signalled(self, it, values):
        if it == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return put(self, it, values)

    monkeypatch.setenv("NANOGPT_FAULT", "nan@8")
    with monkeypatch.context() as patch:
        patch.setattr(train.distributed.Readback, "put", signalled)
        assert run(data, tmp_path / "preempted", allow_fault_injection=True) == 0
    assert status(tmp_path / "preempted")["state"] == "preempted"
    assert checkpoint.steps(tmp_path / "preempted") == [5, 9]
    assert "skipped" in records(tmp_path / "preempted", "train")[-1]
    assert "checkpoint not written" not in caplog.text
    # On the way it is not saved, as there is a later chance
    assert run(data, tmp_path / "running", allow_fault_injection=True, checkpoint_minutes=1e-9, keep_checkpoints=20) == 0
    assert checkpoint.steps(tmp_path / "running") == [1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12]


def test_tokens_are_counted_where_the_batch_changes(data, tmp_path):
    run(data, tmp_path, max_iters=4)
    keys = {"batch_size": 8, "max_tokens": 4 * 128 + 2 * 256 + 1}  # in the third update of 256 they are reached
    assert run(data, tmp_path, init_from="resume", **keys) == 0
    assert status(tmp_path)["iter"] == 7
    assert checkpoint.read_state(tmp_path / "step-7")["tokens"] == 4 * 128 + 3 * 256
    assert [r["tokens"] for r in records(tmp_path, "train")] == [128, 256, 384, 512, 768, 1024, 1280]
    assert run(data, tmp_path, init_from="resume", **keys | {"batch_size": 2}) == 0  # nothing left to do
    assert status(tmp_path)["iter"] == 7


def test_the_end_is_told_where_the_last_save_raises(data, tmp_path, monkeypatch):
    def failing(*args):
        time.sleep(0.5)  # until the run has ended
        raise RuntimeError("a mistake in the program")

    def another(self, it, values):
        assert it < 5  # while the save of the evaluation before it is under way
        return put(self, it, values)

    put = train.distributed.Readback.put
    monkeypatch.setattr(checkpoint, "save", failing)
    monkeypatch.setattr(train.distributed.Readback, "put", another)
    with pytest.raises(RuntimeError, match="a mistake in the program"):
        run(data, tmp_path)
    assert status(tmp_path)["state"] == records(tmp_path, "end")[-1]["state"] == "failed"


def test_a_finished_run_is_left_as_it_is(data, tmp_path):
    run(data, tmp_path)
    before = (tmp_path / "step-12" / checkpoint.MANIFEST).stat()
    assert run(data, tmp_path, init_from="resume") == 0
    assert status(tmp_path)["state"] == "finished"
    assert (tmp_path / "step-12" / checkpoint.MANIFEST).stat() == before
    assert run(data, tmp_path, init_from="resume", max_iters=14) == 0
    assert checkpoint.read_state(tmp_path / "step-14")["final"]


def test_compiled_16_bit_starts_with_the_shadows_of_what_it_resumes(data, tmp_path):
    run(data, tmp_path, dtype="bfloat16")
    config = load(TrainConfig, arguments(data, tmp_path, dtype="bfloat16", init_from="resume", compile=True))
    found = train.setup(config)
    found.loader.close()
    for p in (found.model.lm_head.weight, found.model.transformer.h[1].mlp.c_fc.weight):
        assert torch.equal(p.shadow, p.detach().bfloat16())


def test_resume_takes_the_shape_from_the_checkpoint_and_tells_what_changed(data, tmp_path, capsys):
    run(data, tmp_path, max_iters=5)
    run(data, tmp_path, init_from="resume", n_layer=1, block_size=8, dropout=0.1, learning_rate=0.02)
    out = capsys.readouterr().out
    assert (
        f"resuming from {tmp_path}/step-5; changed: dropout 0.0 -> 0.1, learning_rate 0.01 -> 0.02, max_iters 5 -> 12\n" in out
    )
    assert out.count("2 layers") == 2
    state = checkpoint.read_state(tmp_path / "step-12")
    assert (state["model"]["n_layer"], state["model"]["dropout"]) == (2, 0.1)
    assert run(data, tmp_path, init_from="resume", max_iters=7, lr_decay_iters=7) == 0  # nothing left to do
    assert status(tmp_path)["iter"] == 12


def test_resume_from_an_earlier_step_abandons_the_later_ones(data, tmp_path):
    run(data, tmp_path)
    reference = losses(tmp_path)
    assert run(data, tmp_path, resume=10, max_iters=11, lr_decay_iters=12) == 0
    assert checkpoint.steps(tmp_path) == [10, 11]
    assert (tmp_path / "abandoned-step-12").is_dir()
    assert losses(tmp_path) == reference[:11]


def test_r11_resume_on_other_data_is_refused(data, tmp_path, capsys):
    run(data, tmp_path / "out")
    other = tmp_path / "other"
    other.mkdir()
    np.arange(9000, dtype=np.uint16).__mod__(32).tofile(other / "train.bin")
    (other / "dataset.json").write_text('{"vocab_size": 32}')
    capsys.readouterr()
    error = mistake(capsys, other, tmp_path / "out", init_from="resume")
    assert "the data order cannot be continued: tokens was 20000 and is 9000; fingerprint was" in error
    assert run(other, tmp_path / "out", init_from="resume", max_iters=14, allow_data_change=True) == 0
    assert "another data order, from its beginning: tokens was 20000 and is 9000" in capsys.readouterr().out
    state = checkpoint.read_state(checkpoint.find(tmp_path / "out"))
    assert (state["iter"], state["loader"]["position"]) == (14, 2 * 8)
    keys = {"init_from": "resume", "max_iters": 15, "allow_data_change": True}
    assert run(other, tmp_path / "out", **keys) == 0  # the same data by now: it goes on
    assert checkpoint.read_state(checkpoint.find(tmp_path / "out"))["loader"]["position"] == 3 * 8


def test_r11_losses_on_other_data_are_not_compared(data, tmp_path):
    keys = {"eval_interval": 2, "patience": 2, "always_save_checkpoint": False}
    run(data, tmp_path / "out", **keys)
    other = tmp_path / "other"
    other.mkdir()
    for split, count in (("train", 9000), ("val", 900)):  # noise: none of its losses is below those of before
        np.random.default_rng(1).integers(0, 32, count).astype(np.uint16).tofile(other / f"{split}.bin")
    (other / "dataset.json").write_text('{"vocab_size": 32}')
    assert run(other, tmp_path / "out", **keys, init_from="resume", max_iters=20, allow_data_change=True) == 0
    evaluated = {r["iter"]: r["val_loss"] for r in records(tmp_path / "out", "eval")}
    assert list(evaluated) == list(range(0, 21, 2))  # patience did not end it
    assert min(loss for it, loss in evaluated.items() if it < 12) < (best := min(evaluated[it] for it in range(12, 21, 2)))
    found = checkpoint.find(tmp_path / "out", best=True)
    assert evaluated[int(found.name[5:])] == checkpoint.read_state(found)["best_val_loss"] == best


def test_the_best_is_of_the_newest_data():
    state = lambda loss, name: {"val_loss": loss, "loader": {"fingerprint": name}}  # noqa: E731
    states = {1: state(1.0, "a"), 2: state(3.0, "b"), 3: state(2.0, "b"), 4: state(None, "b")}
    assert checkpoint.by_loss(states) == [3, 2]
    assert checkpoint.by_loss(states | {5: state(None, "c")}) == []
    assert checkpoint.by_loss({1: {"val_loss": 1.0, "loader": []}, 2: {"val_loss": 0.5}}) == [2, 1]


def test_data_that_goes_away_is_not_missed(data, tmp_path, monkeypatch):
    shutil.copytree(data, tmp_path / "data")
    evaluate = train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda *args: (evaluate(*args), shutil.rmtree(tmp_path / "data", True))[0])
    assert run(tmp_path / "data", tmp_path / "out") == 0
    run(data, tmp_path / "undisturbed")
    assert losses(tmp_path / "out") == losses(tmp_path / "undisturbed")


def test_a_validation_split_that_is_too_short_is_told_at_once(data, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "val.bin").write_bytes(bytes(2 * 16))
    error = mistake(capsys, tmp_path / "data", tmp_path / "out")
    assert error == f"train: {tmp_path / 'data'}: block_size=16 needs 17 tokens in a row, not 16\n"


@pytest.mark.parametrize("split", ["train", "val"])
def test_r21_a_token_beyond_the_vocabulary_is_named(data, tmp_path, capsys, split):
    shutil.copytree(data, tmp_path / "data")
    tokens = np.fromfile(data / f"{split}.bin", dtype=np.uint16)
    tokens[-1500:] = 32  # beyond the beginning, which is looked at when the run is set up
    tokens.tofile(tmp_path / "data" / f"{split}.bin")
    assert run(tmp_path / "data", tmp_path / "out", eval_interval=100, max_iters=100) == 2
    message = f"{tmp_path / 'data' / split}.bin: offset {2 * (len(tokens) - 1500)}: token 32, but the vocabulary has 32"
    assert capsys.readouterr().err == f"train: rank 0: {message}\n"
    assert (status(tmp_path / "out")["state"], status(tmp_path / "out")["reason"]) == ("failed", message)


def test_more_files_than_the_usual_limit(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    for i in range(60):
        write_shard(tmp_path / "data" / f"train_{i:06d}.bin", (np.arange(600) % 32).astype(np.uint16))
    (tmp_path / "data" / "dataset.json").write_text('{"vocab_size": 32}')
    code = (
        "import resource, sys; from nanogpt import config, train; resource.setrlimit(resource.RLIMIT_NOFILE, (50, 700));"
        "sys.exit(train.main(config.load(config.TrainConfig, sys.argv[1:])))"
    )
    done = start(["-c", code, *arguments(tmp_path / "data", tmp_path / "out", max_iters=2)])
    assert done[0] == 0, done
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (50, 60))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: None)
    with pytest.raises(ValueError, match=r"data: 60 shards are as many open files, of which .* may have 60 \(ulimit -n\)"):
        open_dataset(tmp_path / "data")


def test_a_system_that_grants_no_more_files(data, monkeypatch):
    """As where fs.nr_open is below the hard limit: what needs no more is read all the same."""
    tried = []

    def refuse(*args):
        tried.append(args)
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda kind: (256, 1 << 20))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert open_dataset(data).count("train") == 20000
    assert tried == [(resource.RLIMIT_NOFILE, (514, 1 << 20))]


def test_the_reason_of_a_failure_is_told(data, tmp_path, monkeypatch):
    def broken(*args):
        raise RuntimeError("connection closed by peer")

    with monkeypatch.context() as patch:
        patch.setattr(distributed, "gradient_sync", broken)
        with pytest.raises(RuntimeError):
            run(data, tmp_path)
    assert (status(tmp_path)["state"], status(tmp_path)["reason"]) == ("failed", "RuntimeError('connection closed by peer')")
    try:
        raise KeyError("of the caller's")
    except KeyError:  # which says nothing about a run that it starts then
        run(data, tmp_path / "other")
    assert (status(tmp_path / "other")["state"], status(tmp_path / "other")["reason"]) == ("finished", "")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"dataset": "nowhere"}, "dataset=nowhere: "),
        ({"block_size": 30_000}, "block_size=30000 needs 30001 tokens in a row"),
        ({"device": "cuda:99"}, "device=cuda:99: "),
        ({"kernels": "triton"}, "kernels=triton: attention on cpu: "),
        ({"wandb_log": True}, "wandb_log=True: not installed"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_mistakes_found_after_the_command_line(data, tmp_path, capsys, monkeypatch, keys, message):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert message in mistake(capsys, data, tmp_path, **keys)


def test_unknown_key_answers_without_importing_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise RuntimeError('imported')")
    code, out, err = start(["-m", "nanogpt.train", "--learning_rat=1"], PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert (code, out, err) == (2, "", "train: unknown key --learning_rat; did you mean --learning_rate?\n")


def test_eval_only_changes_nothing(data, tmp_path, capsys):
    run(data, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert run(data, tmp_path, init_from="resume", eval_only=True, eval_iters=2) == 0
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert "step 12: train loss" in capsys.readouterr().out


def test_only_a_new_best_is_saved_where_asked(data, tmp_path):
    # A learning rate this high undoes what the first evaluation found
    run(data, tmp_path, always_save_checkpoint=False, eval_interval=2, learning_rate=3.0, decay_lr=False, keep_checkpoints=9)
    evals = [(r["iter"], r["val_loss"]) for r in records(tmp_path, "eval")]
    best, expected = evals[0][1], []
    for it, val_loss in evals[1:]:
        if val_loss < best or it == 12:
            expected.append(it)
        best = min(best, val_loss)
    assert len(expected) < len(evals) - 1
    assert checkpoint.steps(tmp_path) == expected


def test_r09_saves_by_the_clock(data, tmp_path):
    run(data, tmp_path, eval_interval=100, checkpoint_minutes=1e-9, keep_checkpoints=9, max_iters=4)
    assert checkpoint.steps(tmp_path) == [1, 2, 3, 4]


def test_r06_training_goes_on_where_a_save_fails(data, tmp_path, monkeypatch, caplog):
    save = checkpoint.save

    def full(out_dir, step, *args):
        if step == 5:
            raise OSError(28, "No space left on device", "out")
        return save(out_dir, step, *args)

    monkeypatch.setattr(checkpoint, "save", full)
    assert run(data, tmp_path) == 0
    assert "checkpoint not written: [Errno 28] No space left on device: 'out'" in caplog.text
    assert checkpoint.steps(tmp_path) == [10, 12]
    monkeypatch.setattr(checkpoint, "save", lambda *args: full(tmp_path, 5))
    assert run(data, tmp_path / "last", max_iters=3) == 1  # nothing of this run was saved
    assert status(tmp_path / "last")["state"] == "failed"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit(data, tmp_path, dtype):
    run(data, tmp_path, dtype=dtype, max_iters=30, lr_decay_iters=30, eval_interval=30)
    first, last = records(tmp_path, "eval")
    assert last["val_loss"] < first["val_loss"] - 0.3
    optim = checkpoint.load_tensors(checkpoint.find(tmp_path) / checkpoint.OPTIM)
    assert ("loss_scale" in optim) == (dtype == "float16")


def test_evaluation_does_not_disturb_the_training(data, tmp_path):
    for interval in (3, 100):
        run(data, tmp_path / str(interval), eval_interval=interval, dropout=0.1)
    assert losses(tmp_path / "3") == losses(tmp_path / "100")


def test_sampling_with_replacement_is_another_order(data, tmp_path):
    for sampling in ("epoch", "random"):
        run(data, tmp_path / sampling, sampling=sampling, max_iters=3)
    assert losses(tmp_path / "epoch") != losses(tmp_path / "random")


def test_compiled_follows_eager(data, tmp_path, monkeypatch):
    # Inductor itself would take a minute, and is PyTorch's to test
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    run(data, tmp_path / "eager", max_iters=3)
    run(data, tmp_path / "compiled", max_iters=3, compile=True)
    eager, compiled = (losses(tmp_path / name) for name in ("eager", "compiled"))
    assert np.abs(np.subtract(eager, compiled)).max() < 1e-5
    names = checkpoint.load_tensors(tmp_path / "compiled" / "step-3" / checkpoint.MODEL).keys()
    assert not any(name.startswith("_orig_mod") for name in names)


def test_a_deterministic_run_does_not_fill_new_memory(data, tmp_path):
    assert run(data, tmp_path, deterministic=True, max_iters=2) == 0
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.gpu
def test_the_host_waits_for_no_update_on_a_gpu(data, tmp_path, monkeypatch):
    begin = train.train

    def strict(*args):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return begin(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(train, "train", strict)
    monkeypatch.setattr(train, "evaluate", lambda *args: {})  # it waits once for its sums
    monkeypatch.setattr(train.resume, "save", lambda *args: True)
    monkeypatch.setattr(train.resume, "unsound", lambda *args: "")
    assert run(data, tmp_path, device="cuda", spike_guard=True, dropout=0.1) == 0
    assert len(losses(tmp_path)) == 12


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_r10_deterministic_on_a_gpu_stopped_and_resumed(data, tmp_path, dtype):
    keys = {"device": "cuda", "dtype": dtype, "deterministic": True, "dropout": 0.1, "n_embd": 64}
    code, _, err = start(["-m", "nanogpt.train", *arguments(data, tmp_path / "whole", **keys)])
    assert code == 0, err
    code, _, err = start(["-c", KILLED, "SIGTERM", 0, 6, *arguments(data, tmp_path / "killed", **keys)])
    assert code == 0, err
    code, _, err = start(["-m", "nanogpt.train", *arguments(data, tmp_path / "killed", init_from="resume", **keys)])
    assert code == 0, err
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    for name in (checkpoint.MODEL, checkpoint.OPTIM):
        ours, theirs = (checkpoint.load_tensors(tmp_path / run / "step-12" / name) for run in ("killed", "whole"))
        assert all(torch.equal(ours[key], theirs[key]) for key in ours.keys() | theirs.keys())
