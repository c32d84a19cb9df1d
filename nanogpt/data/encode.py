"""Blocks to tokens in several processes, in the order of the blocks, whatever the number and the speed of the processes."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nanogpt import tokenizer
from nanogpt.data.sources import Block, texts


class Encoded(NamedTuple):
    """The tokens of a block of P parts, the token that ends a document included."""

    tokens: np.ndarray  # (N,) uint16 or uint32
    counts: np.ndarray  # (P,) int64 tokens of each part
    sizes: np.ndarray  # (P,) int64 bytes of its text
    ends: np.ndarray  # (P,) bool
    splits: list[str]


def dtype_of(vocab_size: int) -> np.dtype:
    """Of the tokens of a vocabulary: uint16 if that holds them all, else uint32."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def encode(block: Block, encoder: tokenizer.Tokenizer, key: str) -> Encoded:
    dtype = dtype_of(encoder.vocab_size)
    eot = np.array([encoder.eot] if encoder.eot is not None else [], dtype=dtype)
    arrays, counts, sizes, all_ends, splits = [np.empty(0, dtype)], [], [], [], []
    for text, ends, split in texts(block, key):
        tokens = encoder.encode_array(text).astype(dtype)
        arrays += [tokens, eot] if ends else [tokens]
        counts.append(len(tokens) + len(eot) * ends)
        sizes.append(len(text.encode()))
        all_ends.append(ends)
        splits.append(split)
    whole = np.concatenate(arrays)
    return Encoded(whole, np.array(counts, np.int64), np.array(sizes, np.int64), np.array(all_ends, bool), splits)


def in_order(blocks: Iterable[Block], folder: Path, key: str, workers: int) -> Iterator[tuple[Block, Encoded]]:
    """Each block, without its parts, and its tokens by the tokenizer of the folder; a few blocks a worker are on the way.

    Raises:
        ValueError: as :func:`sources.texts`.
        ChildProcessError: where a process ended before its work did, as one that is killed does.
    """
    if workers == 1:
        encoder = tokenizer.load(folder)
        for block in blocks:
            yield block._replace(parts=[]), encode(block, encoder, key)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start)
    waiting: deque = deque()
    try:
        for block in blocks:
            waiting.append((block._replace(parts=[]), _submit(pool, _work, block, folder, key)))
            if len(waiting) > 8 * workers:  # some seconds of work, in which the disk may be slow
                block, result = waiting.popleft()
                yield block, result.result()
        while waiting:
            block, result = waiting.popleft()
            yield block, result.result()
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "a process that encodes ended by itself or was killed (out of memory?); the same command goes on"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, *call) -> Future:
    """Processes that the pool starts meanwhile leave the keyboard's signal to this one, from their first instruction on."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(*call)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start() -> None:
    """In a new process: it ends with its parent, however that ends."""
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


@cache
def _tokenizer(folder: Path) -> tokenizer.Tokenizer:
    """Once a process, and not in :func:`_start`, whose errors break the pool without a reason."""
    return tokenizer.load(folder)


def _work(block: Block, folder: Path, key: str) -> Encoded:
    return encode(block, _tokenizer(folder), key)
