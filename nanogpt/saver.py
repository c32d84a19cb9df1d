"""When a run's checkpoints are written and which of them stay: in a thread, by one run at a time, never the last good one away.

Saving stops the training only for a copy of the tensors into host memory. Hashing, writing, forcing to disk and deleting old
checkpoints happen in a thread, in which Python's lock is free, as all of these are long calls into C. There is no fork: a
child of a process with threads and CUDA cannot be relied on.
"""

import copy
import errno
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanogpt import checkpoint
from nanogpt.checkpoint import log
from nanogpt.sharding import is_sharded, whole

LOCK = ".lock"


class Saver:
    """Writes the checkpoints of a run. At most one is under way: the next waits for it, and so does :meth:`close`.

    A save that fails for lack of space, or whatever the operating system refuses, is a warning, and earlier checkpoints are as
    they were; any other failure is raised by the next call of :meth:`poll`, :meth:`save` or :meth:`close`.

    Args:
        out_dir: where the OUT/step-N go.
        keep: newest checkpoints to keep, besides the best and the final one.
        background: write in a thread, from a copy in host memory as large as the tensors (12 bytes a parameter under AdamW),
            which is kept for the next save. Where they are on a GPU it is pinned, and PyTorch rounds each of them up to a power
            of two bytes: 2.5 GB for GPT-2 124M, 28 GB for 1.5B. Else everything happens in :meth:`save`, from the tensors
            themselves, but for sharded ones, which are put together in such a copy all the same.

    Attributes:
        pending: the save under way or, if it has ended, not yet reported; else None.
        longest: seconds of the longest save so far, in the background or not.
        progress: called, from the thread that copies or writes, as a save gets on.
    """

    def __init__(self, out_dir: Path, keep: int, background: bool = True):
        self.out_dir, self.keep, self.background = out_dir, keep, background
        self._thread = ThreadPoolExecutor(1, "saver")  # interpreter exit waits for it too
        self.pending: Future[None] | None = None
        self.longest = 0.0
        self.progress: Callable[[], None] = lambda: None
        self._host: dict[tuple[str, str], Tensor] = {}

    def save(
        self, step: int, model: dict[str, Tensor], optim: dict[str, Tensor], state: dict[str, Any], wait: bool = False
    ) -> bool:
        """Saves the state after ``step`` updates; arguments as for :func:`checkpoint.save`.

        Args:
            wait: return only when it is on disk, for the last save of a process. It needs no copy, then, but of sharded
                tensors, which the ranks put together one by one.

        Returns:
            False where it failed. Without ``wait``, True: see :meth:`poll`.
        """
        self.wait()
        direct = wait or not self.background
        if direct and not any(map(is_sharded, model.values())):
            return _report(lambda: self._write(step, model, optim, state))
        copies = [self._copy(name, tensors) for name, tensors in ((checkpoint.MODEL, model), (checkpoint.OPTIM, optim))]
        if any(t.is_cuda for t in model.values()):
            torch.cuda.current_stream().synchronize()
        if direct:
            return _report(lambda: self._write(step, *copies, state))
        self.pending = self._thread.submit(self._write, step, *copies, copy.deepcopy(state))
        return True

    def poll(self) -> None:
        """Tells of a save that has failed meanwhile. Costs nothing; for every step."""
        if self.pending is not None and self.pending.done():
            self.wait()

    def wait(self) -> bool:
        """Returns when no save is under way; False where the one that was has failed."""
        pending, self.pending = self.pending, None
        return pending is None or _report(pending.result)

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._host.clear()

    def _copy(self, file: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        copies = {}
        for name, t in tensors.items():
            host = self._host.get((file, name))
            if host is None or host.shape != t.shape or host.dtype != t.dtype:
                host = self._host[file, name] = torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda)
            copies[name] = host.copy_(whole(t.detach()), non_blocking=t.is_cuda)
            self.progress()
        return copies

    def _write(self, step: int, model: dict[str, Tensor], optim: dict[str, Tensor], state: dict[str, Any]) -> None:
        begun = time.monotonic()
        checkpoint.save(self.out_dir, step, model, optim, state, self.progress)
        prune(self.out_dir, self.keep, self.progress)
        self.longest = max(self.longest, time.monotonic() - begun)


def _report(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except OSError as error:
        log.warning("checkpoint not written: %s", error)
        return False
    return True


class Lock:
    """Gives an output directory to one run at a time, on whatever machines share it.

    The operating system holds it (``fcntl``), so it ends with the process however that ends: there is no stale one, and what
    torchrun starts again gets it anew. Children do not inherit it.

    Raises:
        ValueError: where another process has it, naming that.
        OSError: where OUT/.lock cannot be made, or is a link.
    """

    def __init__(self, out_dir: Path):
        checkpoint.make_directory(out_dir)
        path = out_dir / LOCK
        self.file = open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644), "r+", encoding="utf-8")  # noqa: SIM115
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ValueError(f"out_dir={out_dir}: {_holder(self.file.read())}; wait, or choose another --out_dir") from None
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            log.warning("%s: not locked (%s): take care that no other run writes there", out_dir, error.strerror)
        self.file.truncate(0)
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "time": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        self.file.write(json.dumps(holder) + "\n")
        self.file.flush()

    def release(self) -> None:
        self.file.close()


def _holder(text: str) -> str:
    try:
        holder = json.loads(text)
        return f"in use by process {holder['pid']} on {holder['host']} since {holder['time']}"
    except (ValueError, KeyError, TypeError):  # caught while it writes
        return "in use by another process"


def remove(out_dir: Path, step: int) -> None:
    """Takes a checkpoint away under its name first, so that no half of it is ever taken for a whole one."""
    path, discarded = out_dir / f"step-{step}", out_dir / f".discarded-step-{step}"
    try:
        path.rename(discarded)
    except OSError as error:
        log.warning("%s: not removed: %s", path, error.strerror)
        return
    checkpoint.tidy(out_dir)


def clear(out_dir: Path) -> None:
    """Removes every checkpoint, for a run that starts over."""
    for step in checkpoint.steps(out_dir):
        remove(out_dir, step)
    _forget(out_dir, 0)


def abandon(out_dir: Path, after: int) -> None:
    """Renames the checkpoints beyond a step from which the run is to take another course, so that none is resumed from.

    Each stays until the new course has got as far.
    """
    for step in checkpoint.steps(out_dir):
        if step > after:
            aside = out_dir / f"abandoned-step-{step}"
            shutil.rmtree(aside, ignore_errors=True)
            (out_dir / f"step-{step}").rename(aside)


def _forget(out_dir: Path, reached: int) -> None:
    """Removes the abandoned checkpoints up to a step; all of them where it is 0."""
    for path in out_dir.glob("abandoned-step-*"):
        number = path.name.removeprefix("abandoned-step-")
        if number.isdecimal() and (not reached or int(number) <= reached):
            checkpoint.discard(path)


def prune(out_dir: Path, keep: int, progress: Callable[[], None] = lambda: None) -> None:
    """Keeps the newest ``keep`` whole checkpoints, the one with the lowest validation loss, and final ones.

    One that is damaged neither counts nor is removed, and nothing is removed before the newest that stays is verified in full.
    """
    whole = {}
    for step in checkpoint.steps(out_dir):
        try:
            checkpoint.check_sizes(out_dir / f"step-{step}")
            whole[step] = checkpoint.read_state(out_dir / f"step-{step}")
        except ValueError as error:
            log.warning("%s", error)
    while True:
        newest = sorted(whole)[-keep:]
        keepers = {*newest, *(step for step, state in whole.items() if state.get("final")), *checkpoint.by_loss(whole)[:1]}
        if keepers == whole.keys():
            break
        try:
            checkpoint.verify(out_dir / f"step-{newest[-1]}", progress)
            break
        except ValueError as error:
            log.warning("%s", error)
            del whole[newest[-1]]
    for step in whole.keys() - keepers:
        remove(out_dir, step)
        progress()
    if whole:
        _forget(out_dir, max(whole))
