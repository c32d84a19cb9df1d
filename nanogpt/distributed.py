"""Processes and devices: where this process runs, how gradients are averaged, what the ranks tell each other.

Started by torchrun, which sets RANK, LOCAL_RANK and WORLD_SIZE; without it, a world of one process.
"""

import base64
import gc
import math
import os
import random
import re
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanogpt import config as options
from nanogpt.config import DEVICES, TrainConfig

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    rank: int
    local_rank: int
    size: int
    device: torch.device
    store: dist.Store | None = None  # shared by the processes, where there are several

    @property
    def main(self) -> bool:
        """The one process that prints and writes."""
        return self.rank == 0


def init(config: TrainConfig) -> World:
    """Joins the process group, if there is one, and picks this process's device.

    Raises:
        ValueError: for a device that is not there, or a backend that cannot serve it.
    """
    rank, local_rank, size, local_size = (int(os.environ.get(name, default)) for name, default in ENVIRONMENT)
    device = pick_device(config.device, local_rank, local_size)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, min(torch.get_num_threads(), cores() // local_size)))
    if size == 1:
        return World(rank, local_rank, size, device)
    backend = config.backend
    if backend == "auto":
        backend = "nccl" if device.type == "cuda" else "gloo"
    if backend == "nccl" and device.type != "cuda":
        raise ValueError(f"backend=nccl: serves GPUs only, and device is {device.type}; use --backend=gloo")
    # Later than the watchdog, which can name who hangs, and than a save for which the others wait; 3 years stand for ever
    patience = timedelta(seconds=min(10 * (config.timeout or math.inf) + 60, 1e8))
    device_id = device if backend == "nccl" else None
    with _ended_by_signals():
        store, rank, size = next(dist.rendezvous("env://"))
        # After a crash, torchrun's store still holds the addresses of the dead, which the living would wait for
        store = dist.PrefixStore(f"nanogpt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, device_id=device_id, timeout=patience)
    sys.excepthook = _end
    return World(rank, local_rank, size, device, store)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Around what waits for the other processes: a signal ends this one. In the main thread, where all of Python's handlers are
    called, none would be before the wait is over."""
    numbers = StopRequest.SIGNALS if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


ENVIRONMENT = (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_WORLD_SIZE", "1"))


def cores() -> int:
    """The CPU cores that this process may use: fewer than the machine has where it is pinned, or in a container with a quota,
    which PyTorch does not look at; threads beyond them make a step many times as slow."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):  # no Linux, or no quotas
        return count
    return count if quota == "max" else min(count, max(1, math.ceil(int(quota) / int(period))))


@contextmanager
def abandoning(code: int) -> Iterator[None]:
    """Around what ends this process while others may go on: in a process group, it then ends at once."""
    try:
        yield
    finally:
        if dist.is_initialized():
            _exit(code)


def fail(error: Exception, prog: str) -> NoReturn:
    """As :func:`nanogpt.config.fail`; in a process group, the line names the rank, and ranks that make the same mistake, as all
    may, say so once."""
    with abandoning(2):
        if not dist.is_initialized():
            options.fail(error, prog)
        said = False
        with suppress(RuntimeError):  # the store is gone with its process
            said = dist.distributed_c10d._get_default_store().add(f"said/{str(error)!a}", 1) > 1
        if not said:
            print(f"{prog}: rank {dist.get_rank()}: {options.one_line(error)}", file=sys.stderr)
        raise SystemExit(2)


def _exit(code: int) -> NoReturn:
    """Ends the process without the interpreter's own end, in which a process group may hang (see :func:`shutdown`)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What an exception that nobody catches comes to in a process group."""
    sys.__excepthook__(kind, error, trace)
    _exit(1)


def shutdown() -> None:
    """Leaves the process group, at the end of a run, after the last reference to what :func:`wrap` returned was dropped.

    Gloo's thread needs the GIL to drop the tensors of its last collective. The group's destructor joins that thread, without
    the GIL if Python drops the last reference to the group, but with it if DDP's reducer does, and then both wait for ever.
    """
    if dist.is_initialized():
        gc.collect()  # DDP is part of cycles
        dist.barrier()
        dist.destroy_process_group()


def pick_device(name: str, local_rank: int = 0, size: int = 1) -> torch.device:
    """The device behind ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``; with several processes, each its own GPU.

    Args:
        name: what the user asked for.
        local_rank: this process, of ``size`` on this machine.

    Raises:
        ValueError: where it is none of these, not there, or not there for each process: the first one, which prints, must fail
            with the last.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device=mps: not available in torch {torch.__version__} on this machine")
    if name in ("cpu", "mps"):
        return torch.device(name)
    if not re.fullmatch(DEVICES, name):
        raise ValueError(f"device={name}: expected auto, cpu, cuda, cuda:N or mps")
    count = torch.cuda.device_count()
    if count == 0:
        raise ValueError(f"device={name}: torch {torch.__version__} sees no GPU; use --device=cpu")
    if ":" in name and size > 1:
        raise ValueError(f"device={name}: {size} processes cannot share one GPU; use --device=cuda")
    if size > count:
        raise ValueError(f"device=cuda: {size} processes on {count} GPUs; lower --nproc_per_node")
    index = int(name[5:]) if ":" in name else local_rank
    if index >= count:
        raise ValueError(f"device=cuda:{index}: there are {count} GPUs here, numbered from 0")
    return torch.device("cuda", index)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute dtype behind ``auto``, ``float32``, ``bfloat16`` or ``float16`` on a device."""
    if name != "auto":
        return getattr(torch, name)
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def wrap(model: nn.Module, world: World, dtype: torch.dtype) -> nn.Module:
    """Averages the gradients over the ranks: in bf16 between GPUs, whose links are the bottleneck, unless dtype is fp32."""
    if world.size == 1:
        return model
    cuda = world.device.type == "cuda"
    ddp = nn.parallel.DistributedDataParallel(
        model, device_ids=[world.device.index] if cuda else None, gradient_as_bucket_view=True
    )
    if cuda and dtype != torch.float32:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

        ddp.register_comm_hook(None, bf16_compress_hook)
    return ddp


def gradient_sync(model: nn.Module, enabled: bool) -> AbstractContextManager:
    """Around forward and backward of a micro-step: only the last one of an update exchanges gradients."""
    if hasattr(model, "set_requires_gradient_sync"):  # sharded
        model.set_requires_gradient_sync(enabled)
    if enabled or not isinstance(model, nn.parallel.DistributedDataParallel):
        return nullcontext()
    return model.no_sync()


def mean(values: Tensor) -> Tensor:
    """Mean over the ranks, in place."""
    return values if not dist.is_initialized() else total(values).div_(dist.get_world_size())


def total(values: Tensor) -> Tensor:
    """Sum over the ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gather(value: Any, world: World) -> list[Any]:
    """What every rank passes, in the order of ranks, on every rank."""
    values = [value] * world.size
    if world.size > 1:
        dist.all_gather_object(values, value)
    return values


def rounds(batches: Sequence[T], world: World) -> Iterator[T | None]:
    """This rank's share of what all do together: batch j is rank j % size's; None where the last round leaves it without."""
    for first in range(0, len(batches), world.size):
        mine = first + world.rank
        yield batches[mine] if mine < len(batches) else None


def assemble(values: Tensor, world: World) -> Tensor:
    """A tensor on the host of which each rank has filled some elements, the others 0: all of them, on every rank, unrounded."""
    return total(values.to(world.device)).cpu() if world.size > 1 else values


def rng_state(device: torch.device) -> dict[str, Any]:
    """This process's random states as JSON can hold them: python, numpy, torch, and the device's."""
    version, words, gauss = random.getstate()
    state = np.random.get_state(legacy=False)
    rng = {
        "python": [version, list(words), gauss],
        "numpy": state | {"state": {"key": state["state"]["key"].tolist(), "pos": state["state"]["pos"]}},
        "torch": _encode(torch.get_rng_state()),
    }
    if device.type in ("cuda", "mps"):
        module = getattr(torch, device.type)
        rng[device.type] = _encode(module.get_rng_state())
    return rng


def restore_rng(rng: dict[str, Any], device: torch.device) -> None:
    version, words, gauss = rng["python"]
    random.setstate((version, tuple(words), gauss))
    state = rng["numpy"]
    key = np.array(state["state"]["key"], dtype=np.uint32)
    np.random.set_state(state | {"state": {"key": key, "pos": state["state"]["pos"]}})
    torch.set_rng_state(_decode(rng["torch"]))
    if device.type in rng:
        getattr(torch, device.type).set_rng_state(_decode(rng[device.type]))


def _encode(t: Tensor) -> str:
    return base64.b64encode(t.numpy().tobytes()).decode()


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


class Readback:
    """Scalars of every step, averaged over the ranks and read by the host one step late on a GPU, so that it never waits for
    the step that runs.

    >>> values = readback.push(it, torch.stack([loss, norm]))  # of step it - 1; [] at first
    """

    def __init__(self, world: World):
        self.world = world
        self.lag = 1 if world.device.type == "cuda" else 0
        self.pending: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def push(self, it: int, values: Tensor) -> list[tuple[int, list[float]]]:
        """Hands in step it's values, a new fp32 device tensor (n,); returns the steps that have arrived meanwhile."""
        return self.put(it, mean(values))

    def put(self, it: int, values: Tensor) -> list[tuple[int, list[float]]]:
        """As :meth:`push`, of values that the ranks share already."""
        event = None
        if self.lag:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            host.copy_(values, non_blocking=True)
            event = torch.cuda.Event(blocking=True)  # to wait for most of a step without keeping a core busy
            event.record()
            values = host
        self.pending.append((it, values, event))
        return self._arrived(self.lag)

    def flush(self) -> list[tuple[int, list[float]]]:
        """Waits for the rest."""
        return self._arrived(0)

    def _arrived(self, left: int) -> list[tuple[int, list[float]]]:
        steps = []
        while len(self.pending) > left:
            it, values, event = self.pending.popleft()
            if event is not None:
                event.synchronize()
            steps.append((it, values.tolist()))
        return steps


class StopRequest:
    """Notes that the process was asked to stop (SIGTERM, SIGUSR1, Ctrl-C); the loop saves and ends at the next step.

    The handler only sets a flag. A second signal ends the process at once, unless it comes within a second of the first: a
    scheduler that signals torchrun's whole process group reaches each worker twice, directly and through the agent.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self):
        self.signal = 0
        self.until = math.inf  # of time.time(): the loop may set when it is to stop by itself
        self._at = 0.0
        for number in self.SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if not self.signal:
            self.signal, self._at = number, now
        elif now - self._at > 1.0:
            os._exit(128 + number)

    def __bool__(self) -> bool:
        return self.signal != 0 or time.time() >= self.until

    @property
    def reason(self) -> str:
        if self.signal:
            return signal.Signals(self.signal).name
        return "--max_hours is nearly over" if self else "another process was asked to stop"


class StopVote:
    """Whether any rank wants to stop, asked after each batch of what the ranks do together, equally often on each; on a GPU the
    answer is one batch late, so that the host never waits."""

    def __init__(self, stop: StopRequest, world: World):
        self.stop, self.readback = stop, Readback(world)

    def __call__(self) -> bool:
        wanted = torch.full((1,), float(bool(self.stop)), device=self.readback.world.device)
        return any(share > 0 for _, (share,) in self.readback.push(0, wanted))
