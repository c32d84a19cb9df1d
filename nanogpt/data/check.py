"""Whether a dataset is what it says: headers and sizes, the sums in ``dataset.json``, every token below the vocabulary."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from nanogpt import tokenizer
from nanogpt.data.shards import Shard, open_dataset

BLOCK = 1 << 24  # tokens read at a time


def problems(path: Path) -> Iterator[str]:
    """One line per fault of the content, naming the file, and the offset in bytes where there is one.

    Raises:
        ValueError: for a fault of the structure (header, size, sidecar), which leaves the content unread.
    """
    data = open_dataset(path)
    found = tokenizer.load(data.path)
    if found is not None and found.vocab_size != data.vocab_size:
        yield f"{data.path}: a tokenizer of {found.vocab_size} tokens for data of {data.vocab_size}"
    for split, shards in data.splits.items():
        entries = data.sidecar.get("splits", {}).get(split, {}).get("shards", [])
        for i, shard in enumerate(shards):
            if entries and entries[i].get("sha256") != (actual := _sha256(shard.path)):
                yield f"{shard.path}: sha256 {actual} instead of {entries[i].get('sha256')}"
            yield from _too_large(shard, data.vocab_size)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _too_large(shard: Shard, vocab_size: int) -> Iterator[str]:
    for start in range(0, shard.count, BLOCK):
        bad = np.flatnonzero(shard.tokens[start : start + BLOCK] >= vocab_size)
        if len(bad):
            at = start + int(bad[0])
            offset = shard.offset + at * shard.dtype.itemsize
            yield f"{shard.path}: offset {offset}: token {shard.tokens[at]}, but the vocabulary has {vocab_size}"
            return


def describe(path: Path) -> str:
    """A few lines for people: vocabulary, tokens, files, the text's beginning."""
    data = open_dataset(path)
    encoder = tokenizer.load(data.path)
    made = f"tokenizer {encoder.kind if encoder else 'unknown'}"
    lines = [f"{data.path}: vocabulary {data.vocab_size:,}, {made}, source {data.sidecar.get('source', 'unknown')}"]
    for split, shards in data.splits.items():
        if shards:
            kind = shards[0].dtype.name
            lines.append(f"{split}: {data.count(split):,} tokens ({kind}) in {len(shards)} file(s)")
            if encoder:
                lines.append(f"  begins {encoder.decode(shards[0].tokens[:32].tolist())!r}")
    return "\n".join(lines)
