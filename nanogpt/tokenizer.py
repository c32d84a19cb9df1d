"""Text to token ids and back: characters, GPT-2's byte pairs, or byte pairs of one's own.

A tokenizer is saved as ``tokenizer.json`` beside the data it made, and copied from there beside the checkpoints trained on it.
"""

import itertools
import json
import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np

from nanogpt.data import assets
from nanogpt.data.meta import read_meta
from nanogpt.data.shards import SIDECAR, open_dataset, read_json

FILE = "tokenizer.json"
EOT_TEXT = "<|endoftext|>"


def _byte_of() -> dict[str, int]:
    """How GPT-2 writes each byte as a printable character: itself where it is one, else the next free one from 256 on."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


BYTE_OF = _byte_of()


def _to_bytes(piece: str) -> bytes:
    return bytes(BYTE_OF[character] for character in piece)


class CharTokenizer:
    """One token per character of a fixed table.

    Args:
        characters: distinct characters; the index of each is its token.
    """

    kind = "char"
    eot = None  # no token ends a document

    def __init__(self, characters: str):
        if len(set(characters)) != len(characters) or not characters:
            raise ValueError("tokenizer: the table of characters is empty or names one twice")
        self.characters = characters

    @classmethod
    def of(cls, text: str) -> "CharTokenizer":
        """The table of the characters in a text, in code point order, as nanoGPT makes it."""
        return cls("".join(sorted(set(text))))

    @property
    def vocab_size(self) -> int:
        return len(self.characters)

    @cached_property
    def _ids(self) -> np.ndarray:
        """Code point -> token, -1 where there is none."""
        points = np.frombuffer(self.characters.encode("utf-32-le"), dtype="<u4")
        ids = np.full(int(points.max()) + 1, -1, dtype=np.int64)
        ids[points] = np.arange(len(points))
        return ids

    def encode_array(self, text: str) -> np.ndarray:
        """(N,) int64; ValueError naming the first character that the table lacks, and its place."""
        points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        ids = np.where(points < len(self._ids), self._ids[np.minimum(points, len(self._ids) - 1)], -1)
        if (ids < 0).any():
            place = int(np.argmax(ids < 0))
            raise ValueError(f"character {text[place]!r} at {place} is not among the {self.vocab_size} of the tokenizer")
        return ids

    def encode(self, text: str) -> list[int]:
        return self.encode_array(text).tolist()

    def decode(self, ids: list[int]) -> str:
        return "".join(self.characters[i] for i in ids)

    def decode_bytes(self, ids: list[int]) -> bytes:
        return self.decode(ids).encode()

    def to_json(self) -> dict:
        return {"kind": self.kind, "characters": self.characters}


class _BytePairs:
    """Byte-level BPE through tiktoken, the text cut by GPT-2's pattern.

    The end of a document, ``<|endoftext|>``, is one token in :meth:`encode` and plain characters in :meth:`encode_array`.
    """

    def _ranks(self) -> dict[bytes, int]:
        """The bytes of each token that text can give -> the token; pairs merge in the order of what they make."""
        raise NotImplementedError

    @cached_property
    def _encoding(self):
        import tiktoken
        from tiktoken_ext.openai_public import r50k_pat_str

        return tiktoken.Encoding("", pat_str=r50k_pat_str, mergeable_ranks=self._ranks(), special_tokens=self.special)

    def encode_array(self, text: str) -> np.ndarray:
        """(N,) uint32. Releases the GIL, so threads encode side by side."""
        return np.asarray(self._encoding.encode_to_numpy(text, disallowed_special=()), dtype=np.uint32)

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode(text, allowed_special="all")

    def decode(self, ids: list[int]) -> str:
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids: list[int]) -> bytes:
        return self._encoding.decode_bytes(ids)


class GPT2Tokenizer(_BytePairs):
    """GPT-2's; the table is fetched once into the cache and verified."""

    kind = "gpt2"
    eot = 50256
    vocab_size = 50257
    special: ClassVar = {EOT_TEXT: eot}

    def _ranks(self) -> dict[bytes, int]:
        table = json.loads(assets.fetch(assets.GPT2_ENCODER).read_bytes())
        return {_to_bytes(piece): rank for piece, rank in table.items() if piece != EOT_TEXT}

    def to_json(self) -> dict:
        return {"kind": self.kind}


class BPETokenizer(_BytePairs):
    """One's own, in the form of Hugging Face's ``tokenizer.json``, which their tools read.

    tiktoken merges a pair if its bytes are a token's, Hugging Face if the pair itself was learned. The two agree wherever the
    merges stand in the order of the tokens they make, every token is a byte, made by a merge or special, and each is reached
    from its own bytes: merging is local, so the only pair that comes to lie over a token's bytes is the one that it was learned
    from. Training ensures this; what others made is checked for it.

    Args:
        content: what ``tokenizer.json`` holds.

    Raises:
        ValueError: for another kind of tokenizer than a byte-level BPE over GPT-2's pattern, or one whose tokens would differ.
    """

    kind = "bpe"

    def __init__(self, content: dict):
        try:
            model, cutter, decoder = content["model"], content["pre_tokenizer"], content["decoder"]
            pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
            made = [model["vocab"][left + right] for left, right in pairs]
            self.special: dict[str, int] = {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
            self._vocab = {_to_bytes(piece): i for piece, i in model["vocab"].items() if piece not in self.special}
            plain = model["type"] == "BPE" and not content.get("normalizer") and decoder["type"] == "ByteLevel"
            like_gpt2 = cutter["type"] == "ByteLevel" and cutter.get("use_regex", True) and not cutter["add_prefix_space"]
            whole = {*BYTE_OF, *(left + right for left, right in pairs)} == model["vocab"].keys() - self.special.keys()
            options = ("ignore_merges", "dropout", "continuing_subword_prefix", "end_of_word_suffix")
            differing = [f"model.{name}" for name in options if model.get(name)]
            flags = ("single_word", "lstrip", "rstrip")
            differing += [
                f"added_tokens.{flag}" for token in content.get("added_tokens") or () for flag in flags if token.get(flag)
            ]
            stray = _not_reached(pairs)
            ids = sorted([*self._vocab.values(), *self.special.values()])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"not a byte-level BPE of Hugging Face's form ({type(error).__name__}: {error})") from error
        if not (plain and like_gpt2 and whole and made == sorted(made)):
            raise ValueError("not a byte-level BPE over GPT-2's pattern with its merges in the order of its tokens")
        if differing:
            raise ValueError(f"{differing[0]} is set: its tokens would be others than those here")
        if stray:
            raise ValueError(f"the merges do not make {stray!r} from its own bytes")
        if ids != list(range(len(ids))):
            raise ValueError("its tokens are not numbered from 0 without a gap")
        self.content = content
        self.vocab_size = len(ids)
        self.eot: int | None = self.special.get(EOT_TEXT)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BPETokenizer":
        """Learns at most `vocab_size` tokens from texts, ``<|endoftext|>`` and the 256 bytes among them.

        Raises:
            ValueError: where Hugging Face's `tokenizers`, which learns, is not installed.
        """
        try:
            from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        except ImportError as error:
            raise ValueError("tokenizers, which learns byte pairs, is not installed: pip install tokenizers") from error
        learner = Tokenizer(models.BPE())
        learner.pre_tokenizer, learner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[EOT_TEXT], initial_alphabet=alphabet, show_progress=False
        )
        learner.train_from_iterator(texts, trainer)
        return cls(json.loads(learner.to_str()))

    def _ranks(self) -> dict[bytes, int]:
        return self._vocab

    def to_json(self) -> dict:
        return self.content


def _not_reached(pairs: list[tuple[str, str]]) -> str:
    """The first piece of which the merges up to its own do not make the pair that its own joins; empty: there is none."""
    ranks = {tuple(pair): rank for rank, pair in enumerate(pairs)}
    for last, (left, right) in enumerate(pairs):
        parts = list(left + right)
        while len(parts) > 2:
            rank, i = min((ranks.get(pair, last), i) for i, pair in enumerate(itertools.pairwise(parts)))
            if rank >= last:
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if parts != [left, right]:
            return left + right
    return ""


Tokenizer = CharTokenizer | GPT2Tokenizer | BPETokenizer


def save(tokenizer: Tokenizer, directory: Path) -> Path:
    """Writes ``tokenizer.json``, whole or not at all."""
    path = Path(directory) / FILE
    partial = path.with_name(f".{FILE}.{os.getpid()}")
    content = tokenizer.to_json()
    if not isinstance(tokenizer, BPETokenizer):  # theirs is a form of its own, which says it already
        content = content | {"vocab_size": tokenizer.vocab_size}
    partial.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)
    return path


def read(path: Path) -> Tokenizer:
    """The tokenizer of a file: ours, or a ``tokenizer.json`` of Hugging Face that is a byte-level BPE.

    Raises:
        ValueError: for a file that cannot be understood.
    """
    content = read_json(path)
    if content.get("kind") == CharTokenizer.kind and isinstance(content.get("characters"), str):
        return CharTokenizer(content["characters"])
    if content.get("kind") == GPT2Tokenizer.kind:
        return GPT2Tokenizer()
    if isinstance(content.get("model"), dict):
        try:
            return BPETokenizer(content)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    raise ValueError(f"{path}: kind {content.get('kind')!r}: expected char with its characters, gpt2, or Hugging Face's form")


def load(directory: Path) -> Tokenizer | None:
    """The tokenizer of a data or checkpoint directory; None where it holds none.

    Found by ``tokenizer.json``, else nanoGPT's ``meta.pkl``; shards with neither are GPT-2's if their vocabulary is.

    Raises:
        ValueError: for a file that cannot be understood.
    """
    directory = Path(directory)
    path = directory / FILE
    if path.exists():
        return read(path)
    if (directory / "meta.pkl").exists():
        itos = read_meta(directory / "meta.pkl")["itos"]
        if any(len(piece) != 1 for piece in itos.values()):
            raise ValueError(f"{directory / 'meta.pkl'}: itos names a piece that is not one character")
        return CharTokenizer("".join(itos[i] for i in range(len(itos))))
    has_shards = (directory / SIDECAR).exists() or any(directory.glob("*.bin"))
    if has_shards and open_dataset(directory).vocab_size == GPT2Tokenizer.vocab_size:
        return GPT2Tokenizer()
    return None


def save_beside(data_dir: Path, checkpoint_dir: Path) -> Path | None:
    """Copies the tokenizer of a dataset beside a checkpoint; returns its path, None where the dataset has none."""
    tokenizer = load(data_dir)
    return save(tokenizer, checkpoint_dir) if tokenizer else None
