"""Text to token ids and back: characters, or GPT-2's byte pairs.

A tokenizer is saved as ``tokenizer.json`` beside the data it made, and copied from there beside the checkpoints trained on it.
"""

import json
import os
from functools import cached_property
from pathlib import Path

import numpy as np

from nanogpt.data import assets
from nanogpt.data.meta import read_meta
from nanogpt.data.shards import SIDECAR, open_dataset, read_json

FILE = "tokenizer.json"
EOT_TEXT = "<|endoftext|>"


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


class GPT2Tokenizer:
    """GPT-2's byte-level BPE, through tiktoken; the table is fetched once into the cache and verified.

    The end of a document, ``<|endoftext|>``, is token 50256 in :meth:`encode` and plain characters in :meth:`encode_array`.
    """

    kind = "gpt2"
    eot = 50256
    vocab_size = 50257

    @cached_property
    def _encoding(self):
        import tiktoken
        from tiktoken_ext.openai_public import r50k_pat_str

        # GPT-2 writes each byte as a printable character: itself where it is one, else the next free one from 256 on.
        printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
        rest = [b for b in range(256) if b not in printable]
        byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}
        table = json.loads(assets.fetch(assets.GPT2_ENCODER).read_bytes())
        ranks = {bytes(byte_of[c] for c in piece): rank for piece, rank in table.items() if piece != EOT_TEXT}
        return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={EOT_TEXT: self.eot})

    def encode_array(self, text: str) -> np.ndarray:
        """(N,) uint32. Releases the GIL, so threads encode side by side."""
        return np.asarray(self._encoding.encode_to_numpy(text, disallowed_special=()), dtype=np.uint32)

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode(text, allowed_special={EOT_TEXT})

    def decode(self, ids: list[int]) -> str:
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids: list[int]) -> bytes:
        return self._encoding.decode_bytes(ids)

    def to_json(self) -> dict:
        return {"kind": self.kind}


Tokenizer = CharTokenizer | GPT2Tokenizer


def save(tokenizer: Tokenizer, directory: Path) -> Path:
    """Writes ``tokenizer.json``, whole or not at all."""
    path = Path(directory) / FILE
    partial = path.with_name(f".{FILE}.{os.getpid()}")
    content = tokenizer.to_json() | {"vocab_size": tokenizer.vocab_size}
    partial.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)
    return path


def load(directory: Path) -> Tokenizer | None:
    """The tokenizer of a data or checkpoint directory; None where it holds none.

    Found by ``tokenizer.json``, else nanoGPT's ``meta.pkl``; shards with neither are GPT-2's if their vocabulary is.

    Raises:
        ValueError: for a file that cannot be understood.
    """
    directory = Path(directory)
    path = directory / FILE
    if path.exists():
        content = read_json(path)
        if content.get("kind") == CharTokenizer.kind and isinstance(content.get("characters"), str):
            return CharTokenizer(content["characters"])
        if content.get("kind") == GPT2Tokenizer.kind:
            return GPT2Tokenizer()
        raise ValueError(f"{path}: kind {content.get('kind')!r}: expected char with its characters, or gpt2")
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
