"""Faults on demand, for tests: NANOGPT_FAULT=nan@7:rank1,kill@9,hang@5,enospc@save2 with --allow_fault_injection.

    nan@N       the loss of update N is NaN, its gradients are not          nangrad@N   the other way round
    spike@N     loss and gradients are 1000 times as large
    oom@N       the device is out of memory            hang@N      the process sleeps for ever
    kill@N      SIGKILL                                enospc@saveN   the N-th save of this process finds the disk full

Each happens before or in the first micro-step of update N (from 0) on rank 0, or on another with ``:rankR``; N may be a range
N-M. A kill or a hang happens once in an output directory, so that the run that is started again gets past it. Everything is
attached from outside: without the variable, no line of the trainer is different.
"""

import errno
import os
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nanogpt import checkpoint

if TYPE_CHECKING:
    from nanogpt.train import Run

VARIABLE = "NANOGPT_FAULT"


@dataclass(frozen=True)
class Fault:
    kind: str
    first: int
    last: int
    rank: int

    def __str__(self) -> str:
        return f"{self.kind}@{self.first}:rank{self.rank}"


def parse(text: str) -> list[Fault]:
    """The faults that a text asks for.

    Raises:
        ValueError: naming the word that is not understood.
    """
    faults = []
    for word in filter(None, text.split(",")):
        match = re.fullmatch(r"(?:(nan|nangrad|spike|oom|kill|hang)@|(enospc)@save)(\d+)(?:-(\d+))?(?::rank(\d+))?", word)
        if not match:
            raise ValueError(f"{VARIABLE}={word}: expected KIND@N, KIND@N-M or KIND@N:rankR, or enospc@saveN")
        kind, first = match[1] or match[2], int(match[3])
        faults.append(Fault(kind, first, int(match[4] or first), int(match[5] or 0)))
    return faults


def requested(allowed: bool) -> list[Fault]:
    """The faults of the environment.

    Raises:
        ValueError: where there are any and they are not allowed.
    """
    text = os.environ.get(VARIABLE, "")
    if text and not allowed:
        raise ValueError(f"{VARIABLE}={text}: refused without --allow_fault_injection")
    return parse(text)


def install(run: "Run", faults: list[Fault]) -> None:
    """Attaches the faults of this rank to a run."""
    mine = [fault for fault in faults if fault.rank == run.world.rank]
    on_disk = [fault for fault in mine if fault.kind == "enospc"]
    if on_disk:
        _fill_disk(on_disk)
    if len(mine) > len(on_disk):
        run.wrapped.register_forward_pre_hook(lambda module, args: _before(run, module, mine))
        run.wrapped.register_forward_hook(lambda module, args, out: (out[0], _after(run, module, mine, out[1])))


def _due(run: "Run", module: nn.Module, faults: list[Fault]) -> list[Fault]:
    return [fault for fault in faults if module.training and fault.first <= run.it <= fault.last]


def _before(run: "Run", module: nn.Module, faults: list[Fault]) -> None:
    for fault in _due(run, module, faults):
        if fault.kind == "oom":
            raise torch.OutOfMemoryError("injected: out of memory")
        if fault.kind in ("kill", "hang") and _once(run.out_dir / f".fault-{fault}"):
            if fault.kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(1e6)


def _once(mark: Path) -> bool:
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _after(run: "Run", module: nn.Module, faults: list[Fault], loss: Tensor) -> Tensor:
    for fault in _due(run, module, faults):
        if fault.kind == "nan":
            loss = loss + float("nan")
        elif fault.kind == "spike":
            loss = loss * 1000.0
        elif fault.kind == "nangrad":
            loss.register_hook(lambda grad: grad * float("nan"))
    return loss


def _fill_disk(faults: list[Fault]) -> None:
    write, saves = checkpoint._write, 0

    def full(path: Path, *content: object) -> dict:
        nonlocal saves
        saves += path.name == checkpoint.MODEL  # the first file of each save
        if any(fault.first <= saves <= fault.last for fault in faults):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(path, *content)

    checkpoint._write = full
