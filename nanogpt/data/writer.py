"""Tokens to shards on disk as they come, and the journal by which a killed preparation goes on.

A preparation works in a directory of its own. Until it is finished its journal lies there, and no reader takes such a
directory for a dataset; a shard that is still written to has a header of zero tokens, which no reader takes for a shard.
"""

import json
import os
from pathlib import Path

import numpy as np

from nanogpt.data.shards import HEADER_BYTES, JOURNAL, header, read_json
from nanogpt.data.sources import digest


class SplitWriter:
    """The shards of one split.

    Args:
        folder: where they go.
        split: train or val, the beginning of their names.
        dtype: of the tokens, uint16 or uint32.
        limit: tokens a shard holds.
        state: what :meth:`sync` gave; what was written after it is dropped.

    Raises:
        ValueError: where the files are not those that the state tells of.
    """

    def __init__(self, folder: Path, split: str, dtype: np.dtype, limit: int, state: dict | None = None):
        self.folder, self.split, self.dtype, self.limit = folder, split, dtype, limit
        state = state or {"shards": [], "open": 0, "bytes": 0}
        self.entries: list[dict] = list(state["shards"])
        self.bytes: int = state["bytes"]  # of text
        self.count, self.file = 0, None  # of the open shard
        kept = {entry["file"] for entry in self.entries} | ({self._path.name} if state["open"] else set())
        for path in folder.glob(f"{split}_*.bin"):
            if path.name not in kept:
                path.unlink()
        for entry in self.entries:
            if not (folder / entry["file"]).is_file() or digest(folder / entry["file"]) != entry["sha256"]:
                raise ValueError(f"{folder / entry['file']}: is not what was written")
        if state["open"]:
            size = HEADER_BYTES + state["open"] * dtype.itemsize
            if not self._path.is_file() or self._path.stat().st_size < size:
                raise ValueError(f"{self._path}: is shorter than what was written")
            os.truncate(self._path, size)
            self._open("r+b")
            self.count = state["open"]

    @property
    def tokens(self) -> int:
        return sum(entry["tokens"] for entry in self.entries) + self.count

    @property
    def _path(self) -> Path:
        return self.folder / f"{self.split}_{len(self.entries):06d}.bin"

    def _open(self, mode: str) -> None:
        self.file = open(self._path, mode)  # noqa: SIM115 closed when it is full
        self.file.write(header(self.dtype, 0))
        self.file.seek(0, os.SEEK_END)

    def write(self, tokens: np.ndarray, size: int) -> None:
        """Appends tokens (N,), which come from `size` bytes of text."""
        self.bytes += size
        while len(tokens):
            if self.file is None:
                self._open("w+b")
            taken, tokens = np.split(tokens, [self.limit - self.count])
            self.file.write(taken.astype(self.dtype.newbyteorder("<"), copy=False).data)
            self.count += len(taken)
            if self.count == self.limit:
                self._close()

    def sync(self) -> dict:
        """Everything so far is on disk; returns what continues from here."""
        if self.file is not None:
            self.file.flush()
            os.fsync(self.file.fileno())
        return {"shards": list(self.entries), "open": self.count, "bytes": self.bytes}

    def finish(self) -> dict:
        """Closes the last shard; returns the split's entry of ``dataset.json``."""
        if self.count:
            self._close()
        return {"tokens": self.tokens, "bytes": self.bytes, "shards": self.entries}

    def _close(self) -> None:
        self.file.seek(0)
        self.file.write(header(self.dtype, self.count))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        entry = {"file": self._path.name, "tokens": self.count, "sha256": digest(self._path)}
        self.count, self.file = 0, None
        self.entries.append(entry)


def write_json(path: Path, content: dict) -> None:
    """A file that is whole or not there, on disk when this returns."""
    partial = path.with_name(f".{path.name}")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """A file or a directory is on disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_journal(folder: Path) -> dict | None:
    return read_json(folder / JOURNAL) if (folder / JOURNAL).exists() else None
