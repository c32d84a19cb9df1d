"""What a run must survive, by its numbers in docs/RELIABILITY.md: kills, full disks, hostile files. More of r01 to r06 in
test_checkpoint.py, on single functions."""

import ast
import json
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from nanogpt import checkpoint, saver, train
from nanogpt.checkpoint import MANIFEST, MODEL, OPTIM, STATE
from nanogpt.config import TrainConfig, check_data, load, parse
from nanogpt.data.loader import Loader
from nanogpt.saver import Lock, Saver
from tests.runs import (
    KILLED,
    ROOT,
    TORCHRUN,
    arguments,
    losses,
    records,
    run,
    save_forever,
    save_until,
    start,
    status,
    walk,
)

PYTHON = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return walk(tmp_path_factory.mktemp("walk"))


@pytest.fixture(scope="module")
def processes():
    """Starts processes with PyTorch imported already, in milliseconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.runs"])
    return context


def weights(value):
    return {"w": torch.full((5, 3), float(value)), "b": torch.full((), float(value))}


def write(out_dir, step, **state):
    return checkpoint.save(out_dir, step, weights(step), weights(-step), {"iter": step, **state})


def rewrite_manifest(path, change):
    """As whoever can write the files would: with a digest that fits."""
    manifest = json.loads((path / MANIFEST).read_text())
    manifest.pop("sha256")
    change(manifest)
    manifest["sha256"] = checkpoint.digest(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest))


def mistake(capsys, function, *args, **keys):
    with pytest.raises(SystemExit) as stop:
        function(*args, **keys)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def same_end(one, other, step):
    """Weights, optimizer and loss log, bitwise."""
    assert losses(one) == losses(other)
    for name in (MODEL, OPTIM):
        ours, theirs = (checkpoint.load_tensors(Path(path) / f"step-{step}" / name) for path in (one, other))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name


def test_r01_nothing_unpickles_or_runs_text():
    """By the syntax tree of every file; the one importer of nanoGPT's ckpt.pt reads it with weights_only=True."""
    loads, found = [], []
    for path in [*ROOT.glob("nanogpt/**/*.py"), *ROOT.glob("kernels/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                found += [f"{path}: import {n}" for n in names if n in ("dill", "marshal", "shelve", "joblib", "_pickle")]
                if isinstance(node, ast.ImportFrom) and node.module == "pickle":
                    found.append(f"{path}: from pickle import")
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle" and node.attr != "UnpicklingError":
                found.append(f"{path}:{node.lineno}: pickle.{node.attr}")
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called == "torch.load":
                    loads.append((path.name, {k.arg: ast.unparse(k.value) for k in node.keywords}.get("weights_only")))
                elif called in ("exec", "eval", "torch.save", "__import__"):
                    found.append(f"{path}:{node.lineno}: {called}")
    assert found == []
    assert set(loads) <= {("pretrained.py", "True")}


def test_r02_a_new_directory_is_entered_in_its_parents(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(checkpoint, "_sync", synced.append)
    write(tmp_path / "a" / "b", 1)
    out_dir = tmp_path / "a" / "b"
    assert synced == [tmp_path, tmp_path / "a", out_dir / ".partial-step-1", out_dir]


def test_r03_killed_20_times_while_it_saves(tmp_path, processes):
    random.seed(3)
    saved = 0
    for _ in range(20):
        ours, theirs = processes.Pipe(duplex=False)
        process = processes.Process(target=save_forever, args=(tmp_path, theirs))
        process.start()
        theirs.close()
        resumed = ours.recv()
        assert resumed >= saved  # what was said to be saved is there
        saved = resumed
        begin, whole = time.monotonic(), random.randrange(3)
        for _ in range(whole):
            saved = ours.recv()
        time.sleep(random.uniform(0, 1) * ((time.monotonic() - begin) / whole if whole else 0.03))
        process.kill()
        process.join()
        while ours.poll():
            try:
                saved = ours.recv()
            except EOFError:
                break
    path = checkpoint.find(tmp_path)
    step = int(path.name[5:])
    assert step >= saved > 10
    assert checkpoint.load_tensors(path / MODEL)["b"].tolist() == [float(step)] * 7
    checkpoint.recover(tmp_path)
    checkpoint.tidy(tmp_path)
    assert all(p.name.startswith("step-") for p in tmp_path.iterdir())


@pytest.mark.parametrize("step", [3, 2], ids=["new", "replaced"])
def test_r03_killed_at_every_call_of_a_save(tmp_path, processes, step):
    original = tmp_path / "original"
    write(original, 1)
    write(original, 2)
    codes, found = [], set()
    while 0 not in codes:
        out_dir = tmp_path / str(len(codes))
        shutil.copytree(original, out_dir)
        process = processes.Process(target=save_until, args=(out_dir, step, len(codes) + 1))
        process.start()
        process.join()
        codes.append(process.exitcode)
        checkpoint.recover(out_dir)
        checkpoint.tidy(out_dir)
        path = checkpoint.find(out_dir)
        found.add((path.name, checkpoint.load_tensors(path / MODEL)["w"].numel()))
        assert {p.name for p in out_dir.iterdir()} <= {"step-1", "step-2", "step-3"}
    assert codes[:-1] == [-signal.SIGKILL] * (len(codes) - 1)
    assert len(codes) > 8
    assert found == {("step-2", 15), (f"step-{step}", 1000)}  # the earlier one whole, or the new one whole


def test_r04_a_run_whose_checkpoints_are_all_bad_overwrites_nothing(data, tmp_path, capsys):
    run(data, tmp_path)
    with open(tmp_path / "step-12" / MODEL, "r+b") as file:
        file.seek(-50, os.SEEK_END)
        file.write(b"\xff")
    (tmp_path / "step-10" / MANIFEST).write_text("{")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != saver.LOCK}
    capsys.readouterr()
    assert "none of its 2 checkpoints can be read" in mistake(capsys, run, data, tmp_path, init_from="resume")
    assert re.search("step-12/model.safetensors: tensor .* was altered", mistake(capsys, run, data, tmp_path, resume=12))
    assert "holds step-12 of another run" in mistake(capsys, run, data, tmp_path)  # nor does it start at 0
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != saver.LOCK} == before


def test_r04_a_manifest_of_any_form_is_one_line(tmp_path):
    path = write(tmp_path, 5)
    whole = (path / MANIFEST).read_text()
    changes = [
        lambda m: m.pop("files"),
        lambda m: m.pop("step"),
        lambda m: m.pop("tensors"),
        lambda m: m["files"].pop(STATE),
        lambda m: m["files"].update({MODEL: 7}),
        lambda m: m["files"][MODEL].pop("sha256"),
        lambda m: m["files"][MODEL].pop("size"),
        lambda m: m["tensors"].update({MODEL: []}),
        lambda m: m["tensors"][MODEL].update(w=None),
    ]
    for change in changes:
        (path / MANIFEST).write_text(whole)
        rewrite_manifest(path, change)
        with pytest.raises(ValueError, match=f"^{path}/"):
            checkpoint.verify(path)
    (path / MANIFEST).write_text(whole)
    checkpoint.verify(path)


def test_r04_a_state_of_any_form_is_one_line(data, tmp_path, capsys):
    run(data, tmp_path, spike_guard=True)
    path = tmp_path / "step-12"
    whole = checkpoint.read_state(path)
    rng = whole["rng"][0]
    changes = [{key: None} for key in checkpoint.RUN_STATE if "val_loss" not in key]  # None: without it
    changes += [{"val_loss": None}, {"best_val_loss": None}, {"val_loss": "low"}, {"iter": True}, {"final": 1}, {"tokens": 1.5}]
    changes += [
        {"rng": [value]} for value in ({}, 7, rng | {"torch": "AAAA"}, rng | {"torch": "?"}, rng | {"python": [3, [-1], None]})
    ]
    changes += [{"rng": [rng | {"numpy": {}}]}, {"guard": {"seen": 3}}, {"guard": {"seen": 3, "window": [[1.0]] * 3}}]
    changes += [{"loader": whole["loader"] | {"position": -1}}]
    for change in changes:
        state = {key: value for key, value in (whole | change).items() if value is not None}
        (path / STATE).write_text(json.dumps(state))
        content = (path / STATE).read_bytes()
        entry = {"size": len(content), "sha256": checkpoint.hashlib.sha256(content).hexdigest()}
        rewrite_manifest(path, lambda manifest, entry=entry: manifest["files"].update({STATE: entry}))
        error = mistake(capsys, run, data, tmp_path, init_from="resume", spike_guard=True)
        assert error.startswith(f"train: {path / STATE}: "), (change, error)


def test_r05_the_last_that_verifies_is_never_deleted(tmp_path, caplog):
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    for step in (3, 4):  # damage that sizes do not show
        with open(tmp_path / f"step-{step}" / OPTIM, "r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x01")
    saver.prune(tmp_path, keep=2)
    assert checkpoint.steps(tmp_path) == [1, 2, 3, 4]
    assert checkpoint.find(tmp_path).name == "step-2"
    for step in (5, 6):
        write(tmp_path, step)
    saver.prune(tmp_path, keep=2)
    assert checkpoint.steps(tmp_path) == [5, 6]


def test_r05_abandoned_ones_go_when_the_new_course_has_got_as_far(data, tmp_path):
    run(data, tmp_path, keep_checkpoints=9)
    assert run(data, tmp_path, resume=5, max_iters=11, lr_decay_iters=12) == 0
    assert sorted(p.name for p in tmp_path.glob("abandoned-*")) == ["abandoned-step-12"]
    assert run(data, tmp_path, init_from="resume") == 0
    assert list(tmp_path.glob("abandoned-*")) == []
    saver.abandon(tmp_path, 10)
    run(data, tmp_path, overwrite=True, max_iters=3)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["step-3"]


def test_r05_what_cannot_be_deleted_is_a_warning(tmp_path, monkeypatch, caplog):
    write(tmp_path, 1)
    write(tmp_path, 2)
    saver.abandon(tmp_path, 1)

    def refuse(path, **keys):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    saver.clear(tmp_path)
    assert caplog.text.count("not removed: Permission denied") == 2
    assert checkpoint.steps(tmp_path) == []


# A run on a file system of its own, which another program fills during update 3 and frees during update 8
FULL = """
import os, sys
from pathlib import Path
from nanogpt import checkpoint, config, distributed, train
put = distributed.Readback.put
filler = Path(sys.argv[1], "filler")
def disturbed(self, it, values):
    if it == 3:
        running.saver.wait()
        with open(filler, "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass
    if it == 8:
        running.saver.wait()
        for step in checkpoint.steps(running.out_dir):
            checkpoint.verify(running.out_dir / f"step-{step}")
        print("intact:", checkpoint.steps(running.out_dir))
        filler.unlink()
    return put(self, it, values)
distributed.Readback.put = disturbed
setup = train.setup
def remembered(config):
    global running
    running = setup(config)
    return running
train.setup = remembered
sys.exit(train.main(config.load(config.TrainConfig, sys.argv[2:])))
"""


def test_r06_a_full_disk(data, tmp_path):
    """A file system of 2 MB, full for a while: the run ends as it would have, and misses only checkpoints."""
    keys = {"checkpoint_minutes": 1e-9, "eval_interval": 100}
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    mount = "mount -t tmpfs -o size=2m tmpfs $0"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount, disk], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here; test_r06_training_goes_on_where_a_save_fails injects the error")
    script = f'{mount} && "$@"; code=$?; cp -r $0 {kept}; exit $code'
    command = [sys.executable, "-c", FULL, disk, *arguments(data, disk / "out", **keys)]
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, disk, *map(str, command)],
        env=os.environ | PYTHON,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    message = (
        r"checkpoint not written: \[Errno 28\] No space left on device; the checkpoint needs ([\d,]+) bytes, ([\d,]+) are free"
    )
    missed = re.findall(message + rf": '{disk}/out/step-(\d+)'", done.stderr)
    assert [step for *_, step in missed] == ["4", "5", "6", "7", "8"]
    assert all(int(needed.replace(",", "")) > 10 * int(free.replace(",", "")) for needed, free, _ in missed)
    assert "intact: [2, 3]" in done.stdout
    assert checkpoint.steps(kept / "out") == [11, 12]
    assert status(kept / "out")["state"] == "finished"
    run(data, tmp_path / "undisturbed", **keys)
    same_end(kept / "out", tmp_path / "undisturbed", 12)


@pytest.fixture
def slow_disk(monkeypatch):
    """Writing a file waits until the event is set."""
    go, write = threading.Event(), checkpoint._write

    def waiting(*args):
        assert go.wait(60)
        return write(*args)

    monkeypatch.setattr(checkpoint, "_write", waiting)
    return go


def test_r07_a_save_holds_what_was_when_it_was_asked_for(tmp_path, slow_disk):
    writer = Saver(tmp_path, keep=2)
    live, state = weights(1), {"iter": 1, "window": [1.0]}
    assert writer.save(1, live, live, state)
    writer.poll()  # nothing to tell yet
    live["w"].fill_(7.0)
    state["window"].append(2.0)
    assert checkpoint.steps(tmp_path) == []
    slow_disk.set()
    writer.close()
    path = checkpoint.find(tmp_path)
    assert torch.equal(checkpoint.load_tensors(path / MODEL)["w"], weights(1)["w"])
    assert checkpoint.read_state(path)["window"] == [1.0]


def test_r07_the_next_save_waits_for_the_one_under_way(tmp_path, slow_disk):
    writer = Saver(tmp_path, keep=2)
    writer.save(1, weights(1), weights(1), {})
    copy = writer._host[MODEL, "w"]
    threading.Timer(0.2, slow_disk.set).start()
    writer.save(2, weights(2), weights(2), {})
    assert copy is writer._host[MODEL, "w"]  # one copy in memory, not two
    assert checkpoint.steps(tmp_path)[0] == 1
    writer.close()
    for step in (1, 2):
        checkpoint.verify(tmp_path / f"step-{step}")
        assert torch.equal(checkpoint.load_tensors(tmp_path / f"step-{step}" / MODEL)["w"], weights(step)["w"])


@pytest.mark.parametrize("way", ["wait", "foreground"])
def test_r07_a_save_that_is_waited_for_needs_no_copy(tmp_path, way):
    writer = Saver(tmp_path, keep=2, background=way != "foreground")
    assert writer.save(1, weights(1), weights(1), {}, wait=way == "wait")
    assert checkpoint.steps(tmp_path) == [1]
    assert writer._host == {}


def test_r07_a_saver_knows_how_long_the_disk_takes(tmp_path, monkeypatch):
    write = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *args: (time.sleep(0.3), write(*args)))
    writer = Saver(tmp_path, keep=2)
    writer.save(1, weights(1), weights(1), {})
    assert writer.longest == 0  # nobody has waited for it
    writer.close()
    assert writer.longest >= 0.3


def test_r07_async_save_false_saves_before_it_goes_on(data, tmp_path, monkeypatch):
    threads = set()
    write_tensors = checkpoint._write_tensors
    monkeypatch.setattr(
        checkpoint, "_write_tensors", lambda *args: (threads.add(threading.current_thread().name), write_tensors(*args))[1]
    )
    run(data, tmp_path / "a", max_iters=6, async_save=False)
    assert threads == {"MainThread"}
    run(data, tmp_path / "b", max_iters=6)
    assert threads == {"MainThread", "saver_0"}
    same_end(tmp_path / "a", tmp_path / "b", 6)


def test_r07_a_failure_shows_at_the_next_step(tmp_path, monkeypatch, caplog):
    def failing(error):
        def fail(*args):
            raise error

        return fail

    writer = Saver(tmp_path, keep=2)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write", failing(OSError(28, "No space left on device")))
        assert writer.save(1, weights(1), weights(1), {})
        writer.pending.exception()  # has failed by now
        assert caplog.text == ""
        writer.poll()
        assert "checkpoint not written: [Errno 28] No space left on device; the checkpoint needs 128 bytes" in caplog.text
        assert not writer.save(1, weights(1), weights(1), {}, wait=True)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write", failing(RuntimeError("a mistake in the program")))
        writer.save(2, weights(2), weights(2), {})
        with pytest.raises(RuntimeError, match="a mistake"):
            writer.wait()
    assert writer.save(3, weights(3), weights(3), {})
    writer.close()
    assert checkpoint.steps(tmp_path) == [3]


def test_r07_training_goes_on_and_sigterm_waits_for_what_is_under_way(data, tmp_path, slow_disk, monkeypatch):
    """SIGTERM during update 8, while step-5 is being written since the evaluation before update 5."""
    saves, writer_save = [], Saver.save

    def noted(self, step, *args, wait=False):
        saves.append((step, wait, checkpoint.steps(tmp_path)))
        if wait:
            threading.Timer(0.1, slow_disk.set).start()
        return writer_save(self, step, *args, wait=wait)

    put = train.distributed.Readback.put

    def signalled(self, it, values):
        if it == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return put(self, it, values)

    with monkeypatch.context() as patch:
        patch.setattr(Saver, "save", noted)
        patch.setattr(train.distributed.Readback, "put", signalled)
        assert run(data, tmp_path) == 0
    (first, wait_first, _), (last, wait_last, before) = saves
    assert (first, wait_first, wait_last, before) == (5, False, True, [])
    assert last in (9, 10)
    assert status(tmp_path)["state"] == "preempted"
    assert checkpoint.steps(tmp_path) == [5, last]
    for step in (5, last):
        checkpoint.verify(tmp_path / f"step-{step}")


@pytest.mark.gpu
def test_r07_copies_from_a_gpu_are_pinned_and_in_order(tmp_path, slow_disk):
    writer = Saver(tmp_path, keep=2)
    live = {"w": torch.ones(1 << 24, device="cuda")}
    writer.save(1, live, live, {})
    live["w"].zero_()
    assert writer._host[MODEL, "w"].is_pinned()
    slow_disk.set()
    writer.close()
    assert checkpoint.load_tensors(tmp_path / "step-1" / MODEL)["w"].min() == 1


HOLDER = """
import sys, time
from pathlib import Path
from nanogpt.saver import Lock
lock = Lock(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(600)
"""


def test_r08_a_second_run_on_the_same_directory_is_refused(data, tmp_path, capsys):
    run(data, tmp_path, max_iters=5)
    files = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != saver.LOCK}
    capsys.readouterr()
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path], env=os.environ | PYTHON, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "locked\n"
        expected = rf"out_dir={tmp_path}: in use by process {holder.pid} on {os.uname().nodename} since \d{{4}}-.*; wait, or"
        for keys in ({}, {"overwrite": True}, {"init_from": "resume"}):
            assert re.search(expected, mistake(capsys, run, data, tmp_path, **keys))
        assert run(data, tmp_path, init_from="resume", eval_only=True) == 0  # writes nothing
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != saver.LOCK} == files
        assert run(data, tmp_path / "beside", max_iters=1, warmup_iters=0) == 0
        holder.kill()
    assert run(data, tmp_path, init_from="resume") == 0  # the lock has died with its holder
    assert status(tmp_path)["state"] == "finished"


def test_r08_a_holder_that_has_not_yet_written_its_name():
    for text in ("", "{", "{}", "7"):
        assert saver._holder(text) == "in use by another process"


def test_r08_a_directory_that_cannot_be_locked_is_used_with_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(*args):
        raise OSError(38, "Function not implemented")  # some network file systems

    monkeypatch.setattr(saver.fcntl, "lockf", refuse)
    Lock(tmp_path).release()
    assert "not locked (Function not implemented): take care that no other run writes there" in caplog.text


def test_r09_every_ten_minutes_by_default():
    assert TrainConfig().checkpoint_minutes == 10.0


@pytest.mark.parametrize(("world", "accumulation"), [(1, 3), (2, 4)], ids=["world1", "world2"])
def test_r10_stopped_at_10_of_20_and_resumed(data, tmp_path, world, accumulation):
    """With dropout, by SIGTERM to the last rank: bitwise what it would have been. Two processes under torchrun, with gloo."""
    keys = {"gradient_accumulation_steps": accumulation, "dropout": 0.2, "max_iters": 20, "lr_decay_iters": 20}
    launcher = TORCHRUN if world == 2 else []
    whole, killed, script = tmp_path / "whole", tmp_path / "killed", tmp_path / "killed.py"
    script.write_text(KILLED)
    code, out, err = start([*launcher, "-m", "nanogpt.train", *arguments(data, whole, **keys)])
    assert code == 0, err
    code, out, err = start([*launcher, script, "SIGTERM", world - 1, 9, *arguments(data, killed, **keys)])
    assert code == 0, err
    stopped = status(killed)["iter"]
    assert status(killed)["state"] == checkpoint.read_state(killed / f"step-{stopped}")["status"] == "preempted"
    assert stopped in (10, 11)  # at most one step later
    assert [it for it, _ in losses(killed)] == list(range(stopped))
    code, out, err = start([*launcher, "-m", "nanogpt.train", *arguments(data, killed, init_from="resume", **keys)])
    assert code == 0, err
    assert f"resuming from {killed}/step-{stopped}\n" in out
    evals = [[(r["iter"], r["val_loss"]) for r in records(path, "eval")] for path in (killed, whole)]
    assert evals[0] == evals[1]
    same_end(tmp_path / "whole", tmp_path / "killed", 20)
    states = [checkpoint.read_state(tmp_path / name / "step-20") for name in ("whole", "killed")]
    for key in ("rng", "loader", "tokens", "best_val_loss", "val_loss", "evaluated"):
        assert states[0][key] == states[1][key], key
    assert len(states[0]["rng"]) == world


def test_r11_what_a_checkpoint_holds(data, tmp_path):
    run(data, tmp_path, dtype="float16")
    state = checkpoint.read_state(tmp_path / "step-12")
    assert (state["iter"], state["tokens"], state["evaluated"]) == (12, 12 * 2 * 4 * 16, 12)
    assert state["best_val_loss"] == min(r["val_loss"] for r in records(tmp_path, "eval"))
    assert [rng.keys() for rng in state["rng"]] == [{"python", "numpy", "torch"}]
    assert state["loader"].keys() == {"position", "fingerprint", "block_size", "seed", "sampling"}
    assert state["loader"]["position"] == 12 * 2 * 4
    assert state["dataset"] == {"vocab_size": 32, "shards": 1, "tokens": 20_000, "dtype": "uint16"}
    optim = checkpoint.load_tensors(tmp_path / "step-12" / OPTIM)
    assert optim["step"] == 12
    assert optim["loss_scale"] == 2.0**16
    assert optim["loss_scale.good_steps"] == 12


def test_r11_random_states_come_back_with_the_run(data, tmp_path):
    run(data, tmp_path, dropout=0.2, max_iters=6)
    stream = [random.random(), np.random.rand(), torch.rand(1).item()]
    found = train.setup(load(TrainConfig, arguments(data, tmp_path, dropout=0.2, init_from="resume")))
    assert [random.random(), np.random.rand(), torch.rand(1).item()] == stream
    found.loader.close()
    found.saver.close()


def test_r12_another_model_is_named_field_by_field(data, tmp_path, capsys):
    run(data, tmp_path / "out")
    other = walk(tmp_path)
    (other / "dataset.json").write_text('{"vocab_size": 40}')
    capsys.readouterr()
    error = mistake(capsys, run, other, tmp_path / "out", init_from="resume", allow_data_change=True)
    assert "step-12: of another model: vocab_size was 32 and is 40\n" in error
    tensors = {"a": torch.zeros(3), "b": torch.zeros(2), "c": torch.zeros(1)}
    with pytest.raises(
        ValueError, match=r"here: tensor a has shape \(2,\), the model \(3,\); tensor c is missing; tensor d is no"
    ):
        checkpoint._restore(tensors, {"a": torch.zeros(2), "b": torch.zeros(2), "d": torch.zeros(1)}, "here")


# A run that notes the rows of tokens of every update
NOTED = """
import json, os, sys
from nanogpt import config, train
from nanogpt.data.loader import Loader
take = Loader.__next__
def noted(self):
    x, y = take(self)
    with open(sys.argv[1] + os.environ.get("RANK", "0"), "a") as file:
        file.write("".join(json.dumps(row) + "\\n" for row in x.tolist()))
    return x, y
Loader.__next__ = noted
code = train.main(config.load(config.TrainConfig, sys.argv[2:]))
"""


def test_r12_one_two_and_one_processes_read_one_sequence(data, tmp_path, monkeypatch):
    keys = {"gradient_accumulation_steps": 4}

    def noted_run(prefix, out_dir, **more):
        monkeypatch.setattr(sys, "argv", ["noted.py", str(prefix), *arguments(data, out_dir, **keys | more)])
        with monkeypatch.context() as patch:
            patch.setattr(Loader, "__next__", Loader.__next__)  # so that it is put back
            exec(NOTED, {})

    noted_run(tmp_path / "whole", tmp_path / "one")
    noted_run(tmp_path / "first", tmp_path / "changing", max_iters=4)
    script = tmp_path / "noted.py"
    script.write_text(NOTED)
    options = arguments(data, tmp_path / "changing", init_from="resume", max_iters=8, **keys)
    code, _, err = start([*TORCHRUN, script, tmp_path / "second", *options])
    assert code == 0, err
    noted_run(tmp_path / "third", tmp_path / "changing", init_from="resume")

    rows = (tmp_path / "whole0").read_text().splitlines()
    per_update = [sorted(rows[i * 16 : i * 16 + 16]) for i in range(12)]  # 4 micro-steps of 4
    assert len(set(rows)) > 150
    seen = []
    for part, world in (("first", 1), ("second", 2), ("third", 1)):
        ranks = [(tmp_path / f"{part}{rank}").read_text().splitlines() for rank in range(world)]
        share = 16 // world
        seen += [sorted(row for rank in ranks for row in rank[i * share : i * share + share]) for i in range(4)]
    assert seen == per_update
    one, other = losses(tmp_path / "one"), losses(tmp_path / "changing")
    assert len(one) == len(other) == 12
    assert max(abs(a - b) for (_, a), (_, b) in zip(one, other, strict=True)) < 1e-5


class Malicious:
    """Unpickled, writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch '{self.path}'",))


def test_r23_hostile_files_do_nothing(data, tmp_path):
    mark = tmp_path / "MARK"
    evil = pickle.dumps(Malicious(mark))
    pickle.loads(evil)
    assert mark.exists()  # it would
    mark.unlink()

    config = tmp_path / "evil.py"
    config.write_text(f"__import__('pathlib').Path({str(mark)!r}).touch()\nbatch_size = open({str(mark)!r}, 'w').write('x')\n")
    code, out, err = start(["-m", "nanogpt.train", config])
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"{config}:1: only `key = value` lines are understood" in err
    config.write_text(f"batch_size = open({str(mark)!r}, 'w').write('x')\n")
    code, out, err = start(["-m", "nanogpt.train", config])
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "config files are not run" in err

    dataset = tmp_path / "dataset"
    dataset.mkdir()
    shutil.copy(data / "train.bin", dataset)
    (dataset / "meta.pkl").write_bytes(evil)
    code, out, err = start(["-m", "nanogpt.train", f"--dataset={dataset}"])
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert re.search("meta.pkl: offset .*: only dicts, strings and integers are read", err)

    ckpt = tmp_path / "nanogpt" / "ckpt.pt"
    ckpt.parent.mkdir()
    torch.save({"model": {}, "model_args": Malicious(mark), "iter_num": 0, "config": {}}, ckpt)
    torch.load(ckpt, weights_only=False)
    assert mark.exists()
    mark.unlink()
    for module, options in (("train", [f"--dataset={data}"]), ("sample", [])):
        code, out, err = start(["-m", f"nanogpt.{module}", f"--init_from={ckpt}", "--device=cpu", *options])
        assert (code, err.count("\n")) == (2, 1), err
        assert f"{ckpt}: " in err

    run(data, tmp_path / "out")
    path = tmp_path / "out" / "step-12"
    (path / MODEL).write_bytes(evil)
    entry = {"size": len(evil), "sha256": checkpoint.hashlib.sha256(evil).hexdigest()}
    rewrite_manifest(path, lambda manifest: manifest["files"].update({MODEL: entry}))
    checkpoint.verify(path)
    with pytest.raises(ValueError, match=r"model.safetensors: "):
        checkpoint.load_model(path, "cpu", torch.float32)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "sub/file"])
def test_r24_a_manifest_names_no_other_files(tmp_path, name):
    path = write(tmp_path, 5)
    (tmp_path / "outside").write_text("x")
    rewrite_manifest(path, lambda manifest: manifest["files"].update({name: {"size": 1, "sha256": "0" * 64}}))
    with pytest.raises(ValueError, match=f"^{path / MANIFEST}: its files are .*{name}"):
        checkpoint.verify(path)


def test_r24_links_that_lead_elsewhere_are_not_followed(data, tmp_path, capsys, caplog):
    elsewhere = write(tmp_path / "elsewhere", 9)
    out_dir = tmp_path / "out"
    write(out_dir, 5)
    (out_dir / "step-9").symlink_to(elsewhere)
    assert checkpoint.find(out_dir).name == "step-5"
    assert "step-9: a link that leads out of" in caplog.text
    saver.prune(out_dir, keep=2)
    saver.clear(out_dir)
    checkpoint.verify(elsewhere)  # nothing was deleted through it

    path = write(out_dir, 6)
    shutil.move(path / MODEL, tmp_path / "weights")
    (path / MODEL).symlink_to(tmp_path / "weights")
    with pytest.raises(ValueError, match=r"model.safetensors: a link, not a file"):
        checkpoint.verify(path)

    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / saver.LOCK).symlink_to(victim)
    assert ".lock" in mistake(capsys, run, data, tmp_path / "new")
    assert victim.read_text() == "precious"


# Trains, resumes and samples; every socket that Python opens to somewhere else raises
OFFLINE = """
import sys
def guard(event, args):
    if event in ("socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"):
        address = args[1] if event in ("socket.connect", "socket.bind", "socket.sendto") else args[0]
        host = address[0] if isinstance(address, tuple) else address
        if host not in ("127.0.0.1", "::1", "localhost") and not isinstance(address, (bytes, str)):
            print("socket:", event, address, file=sys.stderr, flush=True)
            raise PermissionError(event)
        sockets.append((event, address))
sockets = []
sys.addaudithook(guard)
from nanogpt import config, sample, train
code = train.main(config.load(config.TrainConfig, sys.argv[2:]))
code = code or train.main(config.load(config.TrainConfig, [*sys.argv[2:], "--init_from=resume", "--max_iters=14"]))
options = [f"--out_dir={sys.argv[1]}", "--num_samples=1", "--max_new_tokens=5", "--device=cpu", "--start=ab"]
sample.main(options)
print("sockets:", sockets)
sys.exit(code)
"""

SECRETS = {"WANDB_API_KEY": "wandb-key-4711", "HF_TOKEN": "hf-token-4712", "MY_SECRET": "secret-4713"}


def test_r24_offline_and_without_secrets(tmp_path):
    data = walk(tmp_path)
    characters = "".join(chr(ord("a") + i) for i in range(26)) + "012345"
    (data / "tokenizer.json").write_text(json.dumps({"kind": "char", "characters": characters, "vocab_size": 32}))
    out_dir = tmp_path / "out"
    code, out, err = start(["-c", OFFLINE, out_dir, *arguments(data, out_dir)], **SECRETS)
    assert code == 0, err
    assert "socket:" not in err
    assert out.rstrip().endswith("sockets: []")
    written = [path.read_bytes() for path in out_dir.rglob("*") if path.is_file()] + [out.encode(), err.encode()]
    assert len(written) > 8
    for name, value in SECRETS.items():
        assert not any(value.encode() in content or name.encode() in content for content in written)


def test_r24_no_key_is_for_a_secret():
    """What --help lists is saved with every checkpoint, so none of it may be a credential."""
    assert not [f.name for f in fields(TrainConfig) if re.search("(key|token|secret|password)$", f.name)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--learning_rat=1"], "unknown key --learning_rat; did you mean --learning_rate?"),
        (["--n_heads=3"], "unknown key --n_heads; did you mean --n_head?"),
        (["shakespeare_cpuu"], "shakespeare_cpuu: neither a preset nor a file; did you mean shakespeare_cpu?"),
        (["--batch_size=many"], "batch_size=many: expected an integer"),
        (["--dtype=fp16"], "dtype=fp16: expected one of auto, float32, bfloat16, float16"),
        (["--block_size"], "--block_size needs a value: --block_size=VALUE"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_r25_a_wrong_option_is_one_line(capsys, options, message):
    assert mistake(capsys, parse, TrainConfig, options, prog="train") == f"train: {message}\n"


def test_r25_an_integer_is_a_number():
    config = load(TrainConfig, ["--learning_rate=1", "--weight_decay", "0"])
    assert (config.learning_rate, config.weight_decay) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset=nowhere"], "dataset=nowhere: .* is not there; make it with: python -m nanogpt.data.prepare nowhere"),
        (["--dataset=/no/such/place"], "dataset=/no/such/place: no such directory"),
        (
            ["--dataset=DATA", "--block_size=30000"],
            r"block_size=30000 needs 30001 tokens in a row, not 20000 .*train\)",
        ),
        (["--dataset=DATA", "--block_size=3000"], r"block_size=3000 needs 3001 tokens in a row, not 3000 .*val\)"),
    ],
    ids=["unknown", "path", "too-short", "too-short-to-evaluate"],
)
def test_r25_data_is_looked_at_before_torch_is_imported(data, tmp_path, options, message):
    (tmp_path / "torch.py").write_text("raise RuntimeError('imported')")
    options = [option.replace("DATA", str(data)) for option in options]
    code, out, err = start(["-m", "nanogpt.train", *options], PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert re.match(f"train: {message}", err)


def test_r25_a_resumed_run_has_its_own_block_size(data):
    check_data(load(TrainConfig, [f"--dataset={data}", "--block_size=30000", "--init_from=resume"]))


def test_r03_a_short_soak(tmp_path):
    """What `scripts/soak.sh --minutes=15` does, for seconds."""
    code, out, err = start([ROOT / "scripts" / "soak.py", "--minutes=0.1", f"--folder={tmp_path / 'soak'}", "--seed=3"])
    assert code == 0, err
    counts = re.search(r"(\d+) kills .* (\d+) runs ended bitwise .* (\d+) files fuzzed, none lost, none restarted at 0\n$", out)
    assert all(int(count) > 0 for count in counts.groups()), out
    assert not (tmp_path / "soak").exists()
