"""Files of tokens: llm.c's header or nanoGPT's headerless form, and the ``dataset.json`` beside them.

A shard is 256 little-endian int32 (magic, version, number of tokens, zeros), then the tokens: uint16 under magic 20240520
version 1, uint32 under magic 20240801 version 7. nanoGPT's ``train.bin`` and ``val.bin`` are bare uint16; ``meta.pkl`` beside
them holds the character table.
"""

import hashlib
import json
import re
import resource
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from nanogpt.data.meta import read_meta

SPLITS = ("train", "val")
SIDECAR = "dataset.json"
JOURNAL = "preparing.json"  # there as long as a preparation is not finished
HEADER_BYTES = 256 * 4
MAGIC = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}
GPT2_VOCAB = 50257


@dataclass(frozen=True)
class Shard:
    """A file of tokens, its header and size verified."""

    path: Path
    dtype: np.dtype
    offset: int  # bytes before the first token
    count: int  # tokens

    @cached_property
    def tokens(self) -> np.ndarray:
        """(count,) read-only memory map of uint16 or uint32."""
        return np.memmap(self.path, dtype=self.dtype, mode="r", offset=self.offset, shape=(self.count,))


@dataclass(frozen=True)
class Dataset:
    """A directory of shards.

    Attributes:
        path: the directory.
        vocab_size: number of token ids.
        splits: the shards of each split that has any, in order.
        sidecar: the content of ``dataset.json``; empty without one.
    """

    path: Path
    vocab_size: int
    splits: dict[str, list[Shard]]
    sidecar: dict

    def count(self, split: str) -> int:
        return sum(shard.count for shard in self.shards(split))

    def shards(self, split: str) -> list[Shard]:
        if split not in self.splits:
            raise ValueError(f"{self.path}: no shard of the split {split}")
        return self.splits[split]

    def fingerprint(self, split: str) -> str:
        """A digest of the split's content: the size of every shard and up to 64 evenly spaced blocks of 4 KiB of each."""
        digest = hashlib.sha256()
        for shard in self.shards(split):
            digest.update(f"{shard.count} {shard.dtype.itemsize}".encode())
            block = 4096 // shard.dtype.itemsize
            for i in range(64):
                start = i * max(0, shard.count - block) // 63
                digest.update(shard.tokens[start : start + block].tobytes())
        return digest.hexdigest()[:32]


def header(dtype: np.dtype, count: int) -> bytes:
    """Of a shard of `count` tokens of uint16 or uint32."""
    magic, version = next((m, v) for m, (v, kind) in MAGIC.items() if kind == np.dtype(dtype).newbyteorder("<"))
    words = np.zeros(256, dtype="<i4")
    words[:3] = magic, version, count
    return words.tobytes()


def write_shard(path: Path, tokens: np.ndarray) -> dict:
    """Writes tokens (N,) of uint16 or uint32 under the header; returns the shard's entry for the sidecar."""
    body = tokens.astype(tokens.dtype.newbyteorder("<"), copy=False)
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for part in (header(tokens.dtype, len(tokens)), body.data):
            digest.update(part)
            file.write(part)
    return {"file": path.name, "tokens": len(tokens), "sha256": digest.hexdigest()}


def open_shard(path: Path) -> Shard:
    """Reads and verifies the header and the size.

    Raises:
        ValueError: naming file and offset.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = np.frombuffer(file.read(12), dtype="<i4") if size >= 12 else np.zeros(3, dtype="<i4")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    magic, version, count = map(int, head)
    if magic not in MAGIC:
        if path.name not in ("train.bin", "val.bin"):
            raise ValueError(f"{path}: offset 0: magic {magic}: expected {' or '.join(map(str, MAGIC))}")
        if size == 0 or size % 2:
            raise ValueError(f"{path}: offset {size}: {size} bytes are no whole number of uint16 tokens")
        return Shard(path, np.dtype("<u2"), 0, size // 2)
    expected, dtype = MAGIC[magic]
    if version != expected:
        raise ValueError(f"{path}: offset 4: version {version}: expected {expected} under magic {magic}")
    if count <= 0 or size != HEADER_BYTES + count * dtype.itemsize:
        held = max(0, size - HEADER_BYTES) / dtype.itemsize
        raise ValueError(f"{path}: offset 8: the header says {count} tokens, the file of {size} bytes holds {held:g}")
    return Shard(path, dtype, HEADER_BYTES, count)


def open_dataset(path: Path) -> Dataset:
    """Opens a directory: by its ``dataset.json``, else by the names of its files (``[NAME_]train[_000001].bin``).

    Raises:
        ValueError: naming the file, and the offset where there is one.
    """
    path = Path(path)
    sidecar = read_sidecar(path)
    splits = {
        split: [open_listed(path, name, tokens) for name, tokens in found] for split, found in listing(path, sidecar).items()
    }
    _allow_files(path, sum(map(len, splits.values())))
    return Dataset(path, _vocab_size(path, sidecar, splits), splits, sidecar)


def _allow_files(path: Path, count: int) -> None:
    """Has the process open so many files more: a memory map holds one, and the usual limit is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 512
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with suppress(ValueError, OSError):  # the system may have less to give than the limit says
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
            soft = allowed
        if soft <= count:
            raise ValueError(f"{path}: {count} shards are as many open files, of which the process may have {soft} (ulimit -n)")


def read_sidecar(path: Path) -> dict:
    """The content of ``dataset.json``; empty without one. ValueError where a preparation has not finished."""
    if (path / JOURNAL).exists():
        raise ValueError(f"{path}: its preparation has not finished; the command that began it goes on with it")
    return read_json(inside(path, SIDECAR)) if (path / SIDECAR).exists() else {}


def listing(path: Path, sidecar: dict) -> dict[str, list[tuple[str, int | None]]]:
    """The (name, number of tokens if known) of the shards of each split that has any, in order."""
    splits: dict[str, list[tuple[str, int | None]]] = {}
    if "splits" in sidecar:
        if not isinstance(sidecar["splits"], dict):
            raise ValueError(f"{path / SIDECAR}: splits is not an object")
        for split in SPLITS:
            if split in sidecar["splits"]:
                try:
                    entries = sidecar["splits"][split]["shards"]
                    splits[split] = [(str(entry["file"]), int(entry["tokens"])) for entry in entries]
                except (KeyError, TypeError, ValueError, OverflowError) as error:
                    message = f"{path / SIDECAR}: splits.{split}.shards is not a list of files and token counts"
                    raise ValueError(message) from error
    else:
        pattern = re.compile(r"(?:.*_)?(train|val)(?:_\d+)?\.bin")
        names = [(match[1], name) for name in sorted(p.name for p in path.iterdir()) if (match := pattern.fullmatch(name))]
        splits = {split: [(name, None) for s, name in names if s == split] for split in SPLITS}
    splits = {split: found for split, found in splits.items() if found}
    if not splits:
        raise ValueError(f"{path}: no shard (*train*.bin, *val*.bin) in it; python -m nanogpt.data.prepare makes them")
    return splits


def open_listed(path: Path, name: str, tokens: int | None) -> Shard:
    """A shard of a listing, verified against it."""
    shard = open_shard(inside(path, name))
    if tokens is not None and shard.count != tokens:
        raise ValueError(f"{shard.path}: offset 8: {shard.count} tokens, but {SIDECAR} says {tokens}")
    return shard


def inside(path: Path, name: str) -> Path:
    """A file of a directory; ValueError for a name or a link that leads out of it."""
    if Path(name).name != name or name in ("", ".", "..") or "\\" in name:
        raise ValueError(f"{path / SIDECAR}: {name!r} is not the name of a file beside it")
    if not (path / name).resolve().is_relative_to(path.resolve()):
        raise ValueError(f"{path / name}: is a link that leads out of the directory")
    return path / name


def _vocab_size(path: Path, sidecar: dict, splits: dict[str, list[Shard]]) -> int:
    if "vocab_size" in sidecar:
        if type(sidecar["vocab_size"]) is not int or sidecar["vocab_size"] < 1:
            raise ValueError(f"{path / SIDECAR}: vocab_size {sidecar['vocab_size']!r} is not a positive integer")
        return sidecar["vocab_size"]
    if (path / "meta.pkl").exists():
        return read_meta(path / "meta.pkl")["vocab_size"]
    if any(shard.dtype.itemsize > 2 for shards in splits.values() for shard in shards):
        raise ValueError(f'{path}: uint32 tokens of an unknown vocabulary: write {{"vocab_size": N}} to {path / SIDECAR}')
    return GPT2_VOCAB  # what nanoGPT, llm.c and modded-nanogpt write without a table


def read_json(path: Path) -> dict:
    """A JSON file that holds an object; ValueError naming file and offset otherwise."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: offset {error.pos}: {error.msg}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: offset 0: not a JSON object")
    return content
