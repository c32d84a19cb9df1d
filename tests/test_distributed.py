"""nanogpt.distributed: devices, gradient averaging on the last micro-step only, random states, signals to real processes."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist

from nanogpt import distributed
from nanogpt.config import TrainConfig
from nanogpt.distributed import Readback, World, pick_device, pick_dtype
from tests.runs import ROOT

CPU = World(0, 0, 1, torch.device("cpu"))


def gpus(monkeypatch, count):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)


@pytest.mark.parametrize(
    ("count", "name", "local_rank", "size", "device"),
    [
        (0, "auto", 0, 1, "cpu"),
        (0, "auto", 1, 2, "cpu"),
        (2, "auto", 0, 1, "cuda:0"),
        (2, "auto", 1, 2, "cuda:1"),
        (2, "cuda", 1, 2, "cuda:1"),
        (2, "cuda:1", 0, 1, "cuda:1"),
        (2, "cpu", 1, 2, "cpu"),
    ],
)
def test_device(monkeypatch, count, name, local_rank, size, device):
    gpus(monkeypatch, count)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device(name, local_rank, size) == torch.device(device)


@pytest.mark.parametrize(
    ("count", "name", "local_rank", "size", "message"),
    [
        (0, "cuda", 0, 1, "device=cuda: torch .* sees no GPU; use --device=cpu"),
        (2, "cuda:2", 0, 1, "device=cuda:2: there are 2 GPUs"),
        (2, "cuda", 0, 3, "device=cuda: 3 processes on 2 GPUs"),  # on the first process, which prints
        (2, "cuda", 2, 3, "device=cuda: 3 processes on 2 GPUs"),
        (2, "cuda:1", 0, 2, "device=cuda:1: 2 processes cannot share one GPU"),
        (0, "mps", 0, 1, "device=mps: not available"),
    ],
)
def test_device_that_is_not_there(monkeypatch, count, name, local_rank, size, message):
    gpus(monkeypatch, count)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        pick_device(name, local_rank, size)


def test_dtype(monkeypatch):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert pick_dtype("auto", cpu) == torch.float32
    assert pick_dtype("bfloat16", cpu) == torch.bfloat16
    for supported, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation, s=supported: s and not including_emulation
        )
        assert pick_dtype("auto", cuda) == dtype
    assert pick_dtype("float32", torch.device("mps")) == torch.float32


WAITS = """
from nanogpt import distributed
from nanogpt.config import TrainConfig
stop = distributed.StopRequest()
rendezvous = distributed.dist.rendezvous
def told(url):
    print("waits", flush=True)
    yield from rendezvous(url)
distributed.dist.rendezvous = told
distributed.init(TrainConfig(device="cpu"))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_process_that_waits_for_others(number):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", WAITS], env=os.environ | where, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "waits\n"
    time.sleep(1.0)
    process.send_signal(number)
    try:
        assert process.wait(30) == -number
    finally:
        process.kill()


@pytest.mark.parametrize(("timeout", "seconds"), [(600, 6060), (0, 1e8), (1e12, 1e8)])
def test_collectives_wait_longer_than_the_watchdog(monkeypatch, timeout, seconds):
    seen = {}
    monkeypatch.setattr(dist, "rendezvous", lambda url: iter([(dist.HashStore(), 0, 2)]))
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **keys: seen.update(keys))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setenv("WORLD_SIZE", "2")
    distributed.init(TrainConfig(device="cpu", timeout=timeout))
    assert seen["timeout"].total_seconds() == seconds


def test_a_process_group_is_joined_in_any_thread(monkeypatch):
    seen = []
    monkeypatch.setattr(dist, "rendezvous", lambda url: iter([(dist.HashStore(), 0, 2)]))
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **keys: seen.append(signal.getsignal(signal.SIGINT)))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setenv("WORLD_SIZE", "2")
    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=distributed.init, args=(TrainConfig(device="cpu"),))
    thread.start()
    thread.join()
    assert seen == [before]
    distributed.init(TrainConfig(device="cpu"))
    assert seen == [before, signal.SIG_DFL]
    assert signal.getsignal(signal.SIGINT) is before


def test_readback_averages_over_the_ranks(monkeypatch):
    readback = Readback(World(0, 0, 2, torch.device("cpu")))
    monkeypatch.setattr(distributed, "total", lambda values: values.mul_(2))  # an equal partner
    assert readback.push(7, torch.tensor([1.5, 0.0])) == [(7, [1.5, 0.0])]
    assert readback.flush() == []


@pytest.mark.gpu
def test_readback_is_one_step_late_on_a_gpu():
    readback = Readback(World(0, 0, 1, torch.device("cuda")))
    assert readback.push(0, torch.tensor([1.0], device="cuda")) == []
    assert readback.push(1, torch.tensor([2.0], device="cuda")) == [(0, [1.0])]
    assert readback.flush() == [(1, [2.0])]


@pytest.fixture
def group(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # PyTorch puts its own there
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_gradients_are_exchanged_on_the_last_micro_step_only():
    model = torch.nn.Linear(3, 2)
    wrapped = distributed.wrap(model, World(0, 0, 2, torch.device("cpu")), torch.float32)
    exchanges = []

    def count(state, bucket):
        exchanges.append(bucket.index())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    wrapped.register_comm_hook(None, count)
    for micro_step in range(3):
        assert not exchanges
        with distributed.gradient_sync(wrapped, enabled=micro_step == 2):
            wrapped(torch.ones(4, 3)).sum().backward()
    assert exchanges == [0]
    torch.testing.assert_close(model.weight.grad, torch.full((2, 3), 12.0))


def test_one_process_is_not_wrapped():
    model = torch.nn.Linear(3, 2)
    assert distributed.wrap(model, CPU, torch.float32) is model
    assert distributed.gather("x", CPU) == ["x"]


def test_random_states_come_back_through_json():
    random.gauss(0, 1)  # leaves half a pair behind, which is part of the state
    np.random.standard_normal()
    state = json.loads(json.dumps(distributed.rng_state(torch.device("cpu"))))
    expected = [random.gauss(0, 1), np.random.standard_normal(), random.random(), np.random.rand(), torch.rand(3).tolist()]
    distributed.restore_rng(state, torch.device("cpu"))
    assert [
        random.gauss(0, 1),
        np.random.standard_normal(),
        random.random(),
        np.random.rand(),
        torch.rand(3).tolist(),
    ] == expected


WAIT = """
import sys, time
from nanogpt.distributed import StopRequest
stop = StopRequest()
print("ready", flush=True)
while not stop:
    time.sleep(0.01)
print(stop.signal, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=lambda n: n.name)
def test_first_signal_asks_second_ends(number):
    with subprocess.Popen([sys.executable, "-c", WAIT], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.stdout.readline() == f"{int(number)}\n"
        process.send_signal(number)  # the same request, through torchrun's agent
        time.sleep(1.1)
        assert process.poll() is None
        process.send_signal(number)
        assert process.wait(60) == 128 + number
