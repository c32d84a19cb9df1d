"""Whether a dataset is what it says: headers and sizes, the sums in ``dataset.json``, every token below the vocabulary."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from nanogpt import tokenizer
from nanogpt.data.shards import GPT2_VOCAB, SIDECAR, Dataset, Shard, listing, open_dataset, open_listed, read_sidecar
from nanogpt.data.sources import digest

BLOCK = 1 << 24  # tokens read at a time


def problems(path: Path) -> Iterator[str]:
    """One line per fault, naming the file, and the offset in bytes where there is one.

    Where a header or a size is wrong, all such are named and the content is left unread.

    Raises:
        ValueError: for a sidecar or a tokenizer that cannot be understood.
    """
    path = Path(path)
    broken = False
    for found in listing(path, read_sidecar(path)).values():
        for name, tokens in found:
            try:
                open_listed(path, name, tokens)
            except ValueError as error:
                broken = True
                yield str(error)
    if not broken:
        data = open_dataset(path)
        encoder = tokenizer.load(data.path)
        if encoder is not None and encoder.vocab_size != data.vocab_size:
            yield f"{data.path}: a tokenizer of {encoder.vocab_size} tokens for data of {data.vocab_size}"
        for split in data.splits:
            yield from _split(data, split)


def _split(data: Dataset, split: str) -> Iterator[str]:
    entries = data.sidecar.get("splits", {}).get(split, {}).get("shards", [])
    shards = data.splits[split]
    full = data.sidecar.get("shard_tokens", shards[0].count)
    if type(full) is not int:
        raise ValueError(f"{data.path / SIDECAR}: shard_tokens {full!r} is not an integer")
    for i, shard in enumerate(shards):
        if shard.dtype != shards[0].dtype:
            yield f"{shard.path}: offset 0: {shard.dtype.name} tokens, but {shards[0].path.name} has {shards[0].dtype.name}"
        if i < len(shards) - 1 and shard.count < full:
            yield f"{shard.path}: offset 8: a short shard, {shard.count} tokens instead of {full}, that is not the last"
        if data.vocab_size > 2 ** (8 * shard.dtype.itemsize):
            yield f"{shard.path}: offset 0: {shard.dtype.name} cannot hold a vocabulary of {data.vocab_size}"
        if entries and entries[i].get("sha256") != (actual := digest(shard.path)):
            yield f"{shard.path}: sha256 {actual} instead of {entries[i].get('sha256')}"
        yield from beyond(shard, data.vocab_size)


def beyond(shard: Shard, vocab_size: int) -> Iterator[str]:
    """A line on its first token that the vocabulary does not have, if there is one."""
    for start in range(0, shard.count, BLOCK):
        bad = np.flatnonzero(shard.tokens[start : start + BLOCK] >= vocab_size)
        if len(bad):
            at = start + int(bad[0])
            offset = shard.offset + at * shard.dtype.itemsize
            line = f"{shard.path}: offset {offset}: token {shard.tokens[at]}, but the vocabulary has {vocab_size}"
            named = vocab_size != GPT2_VOCAB or any((shard.path.parent / name).exists() for name in (SIDECAR, "meta.pkl"))
            yield line if named else f'{line} (GPT-2\'s, as none is named; {{"vocab_size": N}} in {SIDECAR} names another)'
            return


def describe(path: Path) -> str:
    """A few lines for people: vocabulary, tokens, files, fingerprint, the text's beginning.

    Raises:
        ValueError: naming the file, and the offset of a token in the beginning that the tokenizer lacks.
    """
    data = open_dataset(path)
    encoder = tokenizer.load(data.path)
    made = f"tokenizer {encoder.kind if encoder else 'unknown'}"
    lines = [f"{data.path}: vocabulary {data.vocab_size:,}, {made}, source {data.sidecar.get('source', 'unknown')}"]
    for split, shards in data.splits.items():
        kind = shards[0].dtype.name
        lines.append(f"{split}: {data.count(split):,} tokens ({kind}) in {len(shards)} file(s)")
        lines.append(f"  fingerprint {data.fingerprint(split)}")
        if encoder:
            head = replace(shards[0], count=min(32, shards[0].count))
            for fault in beyond(head, encoder.vocab_size):
                raise ValueError(fault)
            lines.append(f"  begins {encoder.decode(head.tokens.tolist())!r}")
    return "\n".join(lines)
