"""Text to shards: ``python -m nanogpt.data.prepare NAME|PATH [--out DIR] [--tokenizer=gpt2|char|train:N|FILE]``.

A directory is built under a hidden name, synced and renamed when whole, so a killed preparation leaves nothing that looks like
data; the same command goes on with it. The same input and options give the same bytes for any number of processes.
"""

import itertools
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import filelock
import numpy as np

from nanogpt import config, tokenizer
from nanogpt.data import RECIPES, ROOT, check, corpus, encode, hub, sources, splitting
from nanogpt.data.corpus import Corpus
from nanogpt.data.progress import Meter
from nanogpt.data.shards import JOURNAL, SIDECAR, SPLITS, read_json
from nanogpt.data.writer import SplitWriter, read_journal, sync, write_json

USAGE = "python -m nanogpt.data.prepare NAME|PATH"
LOCK = ".lock"
SAVE_SECONDS = 30  # between entries in the journal: what a kill costs at most
UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


@dataclass
class PrepareConfig:
    input: str = config.key("", "text for a NAME of your own: a file, or a directory of files, as PATH", "Data")
    out: str = config.key("", "directory to make (empty: data/NAME)")
    tokenizer: str = config.key("auto", "char, gpt2, train:N, a tokenizer.json; auto: the name's, char for one text, else gpt2")
    text_key: str = config.key("text", "the key in .jsonl, the column in .parquet, that holds the text")
    tokens: str = config.key("", "stop at the end of the document that reaches so many: 500M, 10B (empty: no limit)")
    split: str = config.key(
        "auto",
        "documents: a seeded draw of whole ones; tail: the last characters; auto: tail for one text, else documents",
        "",
        ("auto", "documents", "tail"),
    )
    val_fraction: float = config.key(
        0.0, "share of validation (0: 0.1 of a tail; of documents 0.0005 in openwebtext, else 0.005)"
    )
    shard_tokens: int = config.key(100_000_000, "tokens a file holds at most")
    workers: int = config.key(0, "processes that encode (0: one per core, fewer for a small text)")
    revision: str = config.key("", "commit, tag or branch of a corpus on the hub (empty: the pinned commit)")
    keep_downloads: bool = config.key(False, "keep the hub's files in the cache after use")

    def check(self) -> None:
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"val_fraction={self.val_fraction}: must be between 0 and 1")
        if not 0 < self.shard_tokens < 2**31:
            raise ValueError(f"shard_tokens={self.shard_tokens}: must be between 1 and 2**31 - 1, the header's limit")
        if self.workers < 0:
            raise ValueError(f"workers={self.workers}: must not be negative")
        if not re.fullmatch(r"(\d+(\.\d+)?[KMBT]?)?", self.tokens) or (self.tokens and not self.token_limit):
            raise ValueError(f"tokens={self.tokens}: expected a number of tokens, with K, M, B or T if you like: 10B")
        learn = re.fullmatch(r"train:(\d+)", self.tokenizer)
        if learn and not 257 <= int(learn[1]) <= 1_000_000:
            raise ValueError(f"tokenizer={self.tokenizer}: 257 (each byte, and the end of text) to 1000000 tokens")
        if not learn and self.tokenizer not in ("auto", "char", "gpt2") and not Path(self.tokenizer).is_file():
            raise ValueError(f"tokenizer={self.tokenizer}: expected auto, char, gpt2, train:N, or the path of a tokenizer.json")

    @property
    def token_limit(self) -> int:
        """0 where there is none."""
        unit = self.tokens[-1:] if self.tokens[-1:] in UNITS else ""
        return int(float(self.tokens.removesuffix(unit) or 0) * UNITS[unit])


def prepare(name: str, settings: PrepareConfig) -> Path:
    """Makes a dataset; leaves an equal one as it is, and goes on with one that was interrupted.

    Args:
        name: a key of :data:`RECIPES`, the path of a file or a directory, or a new name with ``settings.input``.
        settings: the options.

    Returns:
        The directory.

    Raises:
        ValueError: for what the user can set right, with the key or the file; nothing is left.
        OSError: for a full disk, a hub that does not answer, a killed process; the same call goes on.
    """
    found = corpus.find(
        name,
        settings.input,
        settings.split,
        settings.val_fraction,
        settings.token_limit,
        settings.revision,
        settings.keep_downloads,
    )
    target = Path(settings.out) if settings.out else ROOT / found.name
    kind = settings.tokenizer if settings.tokenizer != "auto" else found.tokenizer
    named = kind in ("char", "gpt2") or kind.startswith("train:")
    facts = {
        "format": 2,
        "name": found.name,
        "source": found.origin,
        "revision": found.revision,
        "tokenizer": kind if named else f"sha256:{sources.digest(Path(kind))}",
        "text_key": settings.text_key,
        "split": found.split,
        "val_fraction": found.val_fraction,
        "token_limit": settings.token_limit,
        "shard_tokens": settings.shard_tokens,
    }
    if not found.downloads:  # else the commit says as much, and an equal dataset is known without the hub
        facts["source_sha256"] = sources.digest_of(found.files)
    if target.exists() and _ours(target) and _same(target, facts):
        print(f"{target}: already prepared from this text")
        return target
    facts["source_sha256"] = sources.digest_of(found.files)
    with _workplace(target) as partial:
        if (partial / JOURNAL).exists() or not _same(partial, facts):
            _write(partial, facts, found, kind, settings)
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
        sync(target.parent)
    (target / LOCK).unlink(missing_ok=True)
    return target


def _write(folder: Path, facts: dict, found: Corpus, kind: str, settings: PrepareConfig) -> None:
    """Fills the folder, from where its journal says that a run with the same facts stood."""
    state = read_journal(folder)
    fresh = state is None or state.get("facts") != facts or not state["splits"]
    if fresh:
        if state and state.get("facts") != facts:
            print("starting anew: what was begun here is of another text or other options")
        state = {"facts": facts, "file": 0, "after": 0, "documents": 0, "whole": False, "splits": {}}
        write_json(folder / JOURNAL, state)
    if found.downloads:
        found.downloads.place = folder / hub.DOWNLOADS
    for path in folder.iterdir():
        if path.name not in (LOCK, JOURNAL, hub.DOWNLOADS) and (fresh or path.name.startswith(".")):  # half-written
            path.unlink()
    if not (folder / tokenizer.FILE).exists():
        tokenizer.save(corpus.make_tokenizer(kind, found, settings.text_key), folder)
        sync(folder / tokenizer.FILE)
    encoder = tokenizer.load(folder)
    dtype = encode.dtype_of(encoder.vocab_size)
    writers = {split: SplitWriter(folder, split, dtype, settings.shard_tokens, state["splits"].get(split)) for split in SPLITS}
    if not fresh:
        print(f"going on after {_tokens(writers):,} tokens, {state['documents']:,} documents")
    if not state["whole"]:
        _encode(folder, state, writers, found, settings)
    facts = facts | {"vocab_size": encoder.vocab_size, "splits": {}}
    for split, writer in writers.items():
        facts["splits"][split] = entry = writer.finish()
        if not entry["shards"]:
            what = "a character" if found.split == "tail" else f"one of the {state['documents']:,} documents"
            raise ValueError(f"val_fraction={found.val_fraction}: leaves the split {split} without {what}")
        print(f"{split}: {entry['tokens']:,} tokens from {entry['bytes']:,} bytes of text")
    if (folder / hub.DOWNLOADS).exists():
        shutil.rmtree(folder / hub.DOWNLOADS)
    write_json(folder / SIDECAR, facts)
    (folder / JOURNAL).unlink()
    sync(folder)


def _encode(folder: Path, state: dict, writers: dict[str, SplitWriter], found: Corpus, settings: PrepareConfig) -> None:
    """Reads, encodes and writes what the state says is left, and keeps the state."""

    def save() -> None:
        state["splits"] = {split: writer.sync() for split, writer in writers.items()}
        write_json(folder / JOURNAL, state)
        found.release(state["file"])

    save()
    sizes = [file.size for file in found.files]
    workers = settings.workers or min(os.cpu_count() or 1, 1 + sum(sizes) // (4 * sources.BLOCK))
    meter = Meter(found.name, sizes, settings.token_limit, _tokens(writers))
    saved, full = time.monotonic(), False
    blocks = found.blocks(state["file"], state["after"], settings.text_key)
    for block, encoded in encode.in_order(blocks, folder, settings.text_key, workers):
        left = settings.token_limit - _tokens(writers) if settings.token_limit else None
        full, documents = _put(encoded, writers, found.draw, state["documents"], left)
        state |= {"file": block.number, "after": block.after, "documents": documents}
        meter.show(_tokens(writers), block.number, block.read)
        if full:
            break
        if time.monotonic() - saved > SAVE_SECONDS:
            save()
            saved = time.monotonic()
    blocks.close()
    state["whole"] = True
    save()
    meter.done(_tokens(writers))
    if settings.token_limit and not full:
        print(f"{found.name} ends before {settings.token_limit:,} tokens")
    if isinstance(found.draw, splitting.NanoGPTDraw) and not full and state["documents"] != found.draw.documents:
        print(f"{state['documents']:,} documents instead of {found.draw.documents:,}: the split is not nanoGPT's")


def _put(
    encoded: encode.Encoded, writers: dict[str, SplitWriter], draw: splitting.Draw | None, documents: int, left: int | None
) -> tuple[bool, int]:
    """Writes a block, up to the end of the document that reaches what is `left`.

    Args:
        documents: how many ended before the block.

    Returns:
        (whether it was reached, how many documents ended by now).
    """
    after = np.cumsum(encoded.counts)  # (P,) tokens up to the end of each part
    over = np.flatnonzero(encoded.ends & (after >= left)) if left is not None else []
    parts = int(over[0]) + 1 if len(over) else len(after)
    numbers = documents + np.cumsum(encoded.ends) - encoded.ends
    is_val = draw(numbers) if draw else np.array([split == "val" for split in encoded.splits], dtype=bool)
    runs = [0, *(np.flatnonzero(np.diff(is_val[:parts])) + 1).tolist(), parts]  # of parts of one split
    for first, stop in itertools.pairwise(runs):
        if first < stop:
            tokens = encoded.tokens[after[first] - encoded.counts[first] : after[stop - 1]]
            writers["val" if is_val[first] else "train"].write(tokens, int(encoded.sizes[first:stop].sum()))
    return bool(len(over)), documents + int(encoded.ends[:parts].sum())


def _tokens(writers: dict[str, SplitWriter]) -> int:
    return sum(writer.tokens for writer in writers.values())


def _ours(target: Path) -> bool:
    """True for a dataset that this program made; ValueError for anything else, which is not ours to replace."""
    made = re.compile(rf"(train|val)_\d{{6}}\.bin|{re.escape(SIDECAR)}|{re.escape(tokenizer.FILE)}|{re.escape(LOCK)}")
    names = [path.name for path in target.iterdir()] if target.is_dir() else ["."]
    if all(map(made.fullmatch, names)) and (not names or SIDECAR in names):
        return True
    raise ValueError(f"{target}: is no dataset of this program's making; move it away or choose another place with --out")


def _same(target: Path, facts: dict) -> bool:
    """Whether the dataset there has these facts, and its files still the sums it was made with."""
    if not (target / SIDECAR).is_file():
        return False
    try:
        sidecar = read_json(target / SIDECAR)
        return all(sidecar.get(key) == value for key, value in facts.items()) and not list(check.problems(target))
    except ValueError:
        return False


@contextmanager
def _workplace(target: Path) -> Iterator[Path]:
    """The hidden directory beside the target in which it is made, for one process; removed after a mistake in the input."""
    partial = target.parent / f".{target.name}.partial"
    partial.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(partial / LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise ValueError(f"{target}: another process is preparing it") from error
    try:
        yield partial
    except ValueError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        lock.release()


def main(argv: list[str]) -> None:
    config.escape_output()
    names = [word for word in argv[:1] if not word.startswith("--")]
    if {"-h", "--help"} & set(argv):
        names = f"Names: {', '.join(RECIPES)}, a path, or any other with --input"
        config.print_help(f"{config.usage(PrepareConfig, None, USAGE).replace('[FILE.py] ', '')}\n\n{names}")
        return
    try:
        if not names:
            raise ValueError(f"which text? {USAGE}, NAME one of {', '.join(RECIPES)}, or any other with --input FILE")
        settings = config.load(PrepareConfig, argv[1:], None)
        print(prepare(names[0], settings))
    except (ValueError, OSError) as error:
        config.fail(error, "prepare")
    except KeyboardInterrupt:
        print("\nprepare: interrupted; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main(sys.argv[1:])
