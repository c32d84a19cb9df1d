"""Shards to batches, assembled in a thread and copied to the device while the step runs.

A sample is a window of block_size + 1 tokens: x is all but its last, y all but its first. The order of all samples of all
epochs is one fixed sequence, a function of the seed alone; the position in it is one integer, and rank r of W takes the samples
p + r*B ... p + (r+1)*B - 1 of each W*B. So a run resumes exactly, and another number of processes reads the same sequence.

B batch_size, T block_size.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanogpt.data import order
from nanogpt.data.check import beyond
from nanogpt.data.shards import Dataset, Shard, open_dataset


class Windows:
    """Where each sample lies in the shards of a split.

    Each epoch cuts every shard into windows that do not overlap, from a start within the first 2T tokens that changes from
    epoch to epoch, and visits each window once. What a cut leaves over at either end is seen in other epochs.
    """

    def __init__(self, shards: list[Shard], block_size: int, seed: int, sampling: str):
        self.block_size, self.seed, self.sampling = block_size, seed, sampling
        self.room = np.array([shard.count - block_size for shard in shards])  # starts that leave a whole window
        if sampling == "random":
            self.per_shard = np.maximum(self.room, 0)
        else:
            self.per_shard = np.where(self.room > 0, np.maximum(1, self.room // block_size), 0)
        self.ends = np.cumsum(self.per_shard)
        self.total = int(self.ends[-1])
        if not self.total:
            longest = max(shard.count for shard in shards)
            raise ValueError(
                f"{shards[0].path.parent}: block_size={block_size} needs {block_size + 1} tokens in a row, not {longest}"
            )

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(K,) global sample numbers -> (K,) shard numbers, (K,) first tokens in them."""
        if self.sampling == "random":
            salt = order.keys("random", self.seed)[0]
            index = (order.mix(order.mix(samples.astype(np.uint64)) ^ salt) % np.uint64(self.total)).astype(np.int64)
            shard = np.searchsorted(self.ends, index, side="right")
            return shard, index - (self.ends - self.per_shard)[shard]
        shard, start = np.empty_like(samples), np.empty_like(samples)
        epochs = samples // self.total
        for epoch in np.unique(epochs):
            now = epochs == epoch
            key = order.keys("epoch", self.seed, epoch)
            index = order.permute(samples[now] % self.total, self.total, key)
            shard[now] = np.searchsorted(self.ends, index, side="right")
            spare = self.room - (self.per_shard - 1) * self.block_size
            shift = order.mix(np.arange(len(self.room), dtype=np.uint64) + key[-1]) % np.maximum(spare, 1).astype(np.uint64)
            first = index - (self.ends - self.per_shard)[shard[now]]
            start[now] = shift.astype(np.int64)[shard[now]] + first * self.block_size
        return shard, start


class TokenError(ValueError):
    """A token that the vocabulary does not have, which a model would read as whatever lies beyond its tables."""


def _fill(batch: Tensor, shards: list[Shard], places: tuple[np.ndarray, np.ndarray], vocab_size: int) -> None:
    """Copies windows into a batch (2, B, T) int64: x, then y, which is x one token on; TokenError naming file and offset."""
    out, T = batch.numpy(), batch.shape[2]
    for row, (shard, start) in enumerate(zip(*places)):
        window = shards[shard].tokens[start : start + T + 1]
        out[0, row], out[1, row] = window[:-1], window[1:]
    if out.max(initial=0) >= vocab_size:
        raise TokenError(next(fault for shard in places[0] for fault in beyond(shards[shard], vocab_size)))


class Loader:
    """An endless iterator of training batches.

    Args:
        data_dir: a dataset directory; its headers and sizes are verified here.
        split: "train" or "val".
        batch_size: samples a batch, B.
        block_size: tokens a sample, T.
        rank: this process, of world_size.
        world_size: processes that share the sequence.
        seed: of the order; the same on every rank.
        sampling: "epoch" visits each window once per epoch; "random" draws starts with replacement, as nanoGPT does.
        device: where batches go.

    Raises:
        ValueError: for data that is missing, damaged or too short, and for an unknown sampling.
    """

    def __init__(
        self,
        data_dir: Path,
        split: str,
        batch_size: int,
        block_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 1337,
        sampling: str = "epoch",
        device: str | torch.device = "cpu",
    ):
        if sampling not in ("epoch", "random"):
            raise ValueError(f"sampling={sampling}: expected epoch or random")
        self.data = open_dataset(Path(data_dir))
        self.vocab_size, self.fingerprint = self.data.vocab_size, self.data.fingerprint(split)
        self.shards = self.data.shards(split)
        self.windows = Windows(self.shards, block_size, seed, sampling)
        self.shape = (2, batch_size, block_size)
        self.rank, self.world_size, self.device = rank, world_size, torch.device(device)
        self.position = 0  # global samples that next() has given out, over all ranks
        self._thread = ThreadPoolExecutor(1, "loader")
        # Three pinned buffers: one fills, one is being copied, one may still be. All CUDA calls stay in the caller's thread, so
        # that a graph capture there is not disturbed by this one.
        cuda = self.device.type == "cuda"
        self._stream = torch.cuda.Stream(self.device) if cuda else None
        self._pinned = deque((torch.empty(self.shape, dtype=torch.int64, pin_memory=True), None) for _ in range(3 * cuda))
        self._filling: Future[Tensor] | None = None
        self._restart()

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        """(x, y), each (B, T) int64 on the device, contiguous; TokenError for a token beyond the vocabulary."""
        batch, copied = self._ready
        if copied is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(copied)
            batch.record_stream(current)
        self.position += self._stride
        self._advance()
        return batch[0], batch[1]

    def state(self) -> dict:
        """What :meth:`load_state` takes: plain integers and strings. Batches that wait in the pipeline do not count."""
        return {"position": self.position, **self._identity()}

    def load_state(self, state: dict) -> None:
        """Continues where another loader stood, whatever its number of processes and batch size.

        Raises:
            ValueError: naming each field in which the sequence would differ.
        """
        if differ := self.differences(state):
            raise ValueError("the data order cannot be continued: " + "; ".join(differ))
        position = state.get("position")
        if type(position) is not int or position < 0:
            raise ValueError(f"the data position {position!r} is no count of samples")
        self.position = position
        self._restart()

    def differences(self, state: dict) -> list[str]:
        """``KEY was A and is B`` for each field in which the sequence of another loader's state differs."""
        now = self._identity()
        return [f"{key} was {state.get(key)!r} and is {value!r}" for key, value in now.items() if state.get(key) != value]

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _identity(self) -> dict:
        windows = self.windows
        return {
            "fingerprint": self.fingerprint,
            "block_size": windows.block_size,
            "seed": windows.seed,
            "sampling": windows.sampling,
        }

    @property
    def _stride(self) -> int:
        return self.world_size * self.shape[1]

    def _restart(self) -> None:
        if self._stream is not None and self._filling is not None:
            self._pinned.append((self._filling.result(), None))
        self._next = self.position  # where the thread reads next; ahead of `position` by what the pipeline holds
        self._filling = self._submit()
        self._advance()

    def _advance(self) -> None:
        """Moves the assembled batch towards the device and lets the thread begin the one after it."""
        batch = self._filling.result()
        self._filling = self._submit()
        if self._stream is None:
            self._ready = batch.to(self.device), None
            return
        copied = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            self._ready = batch.to(self.device, non_blocking=True), copied
            copied.record()
        self._pinned.append((batch, copied))

    def _submit(self) -> "Future[Tensor]":
        if self._pinned:
            buffer, copied = self._pinned.popleft()
            if copied is not None:
                copied.synchronize()  # of a copy two steps ago
        else:
            buffer = torch.empty(self.shape, dtype=torch.int64)
        start = self._next + self.rank * self.shape[1]
        self._next += self._stride
        return self._thread.submit(self._assemble, buffer, start)

    def _assemble(self, buffer: Tensor, start: int) -> Tensor:
        places = self.windows.locate(np.arange(start, start + self.shape[1], dtype=np.int64))
        _fill(buffer, self.shards, places, self.vocab_size)
        return buffer


def eval_batches(
    data: Dataset,
    split: str,
    batch_size: int,
    block_size: int,
    n_batches: int,
    rank: int = 0,
    world_size: int = 1,
    device: str | torch.device = "cpu",
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of a fixed set of windows, evenly spaced over the split, that fall to this rank.

    The set depends on the sizes only. It has n_batches batches of batch_size windows, or all that the split gives without
    overlap if those are fewer: whole batches only, unless there is not even one. Batch j goes to rank j % world_size; each rank
    gets equally many, so that they can vote after each; the last one of some may be empty.

    Yields:
        (x, y), each (B, T) int64 on the device, or (0, T).

    Raises:
        ValueError: where no window fits into the split; TokenError for a token beyond the vocabulary.
    """
    shards = data.shards(split)
    per_shard = np.array([max(0, (shard.count - 1) // block_size) for shard in shards])
    ends = np.cumsum(per_shard)
    total = int(ends[-1])
    pinned = torch.device(device).type == "cuda"  # so that the host prepares a batch while the device works on another
    if not total:
        raise ValueError(f"{data.path}: the split {split} has no {block_size + 1} tokens in a row (block_size={block_size})")
    count = min(n_batches, total // batch_size) * batch_size or total
    for first in range(0, count, world_size * batch_size):
        begin = first + rank * batch_size
        index = np.arange(begin, min(begin + batch_size, count)) * total // count
        shard = np.searchsorted(ends, index, side="right")
        start = (index - (ends - per_shard)[shard]) * block_size
        batch = torch.empty((2, len(index), block_size), dtype=torch.int64, pin_memory=pinned)
        _fill(batch, shards, (shard, start), data.vocab_size)
        batch = batch.to(device, non_blocking=pinned)
        yield batch[0], batch[1]
