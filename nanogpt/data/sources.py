"""Files to blocks of documents, in constant memory: .txt, .md and .jsonl, also as .gz and .zst, and .parquet.

What a document is:

- ``.txt``, ``.md``: what lies between lines that are ``<|endoftext|>``; a file without such a line is one document.
- ``.jsonl``: the string under one key of the object on each line.
- ``.parquet``: one row of one column of strings.

A block is what a process encodes at a time: some megabytes of documents, or a piece of a longer one. A piece of text ends
where no token of GPT-2's pattern can lie: before white space that follows something else. Such a token has white space at its
start only or is all white space, so the pieces encode to the tokens of the whole. Where a piece ends depends on where it starts
alone, so reading can go on from the end of any block.
"""

import gzip
import hashlib
import importlib
import json
import re
import sys
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import BinaryIO, NamedTuple

BLOCK = 1 << 22  # bytes of a block, and the least of a piece; some 0.3 s of encoding
LONGEST = 1 << 24  # bytes of a piece at most: a run without white space is cut there all the same
READ = 1 << 20  # bytes read at a time
KINDS = re.compile(r".+\.(?:(txt|md|jsonl)(?:\.gz|\.zst)?|(parquet))")
# Not after white space: of ASCII, or the UTF-8 of U+0085, 00A0, 1680, 2000-200A, 2028, 2029, 202F, 205F, 3000.
BOUNDARY = re.compile(
    rb"(?<=[^\s\x1c-\x1f])(?<!\xc2[\x85\xa0])(?<!\xe1\x9a\x80)(?<!\xe2\x80[\x80-\x8a\xa8\xa9\xaf])(?<!\xe2\x81\x9f)"
    rb"(?<!\xe3\x80\x80)(?=[ \t\n\r])"
)
SEPARATOR = re.compile(rb"^<\|endoftext\|>\r?(?:\n|\Z)", re.MULTILINE)


@dataclass(frozen=True)
class File:
    """A file of documents.

    Args:
        name: in messages, and in the digest of a source.
        size: bytes.
        sha256: of its bytes.
        path: where it lies; None where it is not here yet, or in `content`.
        content: its bytes, of a text made in memory.
        closes: whether an end-of-text token closes its documents.
        cut: byte offset from which on its text is validation; None where documents are drawn one by one.
    """

    name: str
    size: int
    sha256: str
    path: Path | None = None
    content: bytes | None = None
    closes: bool = True
    cut: int | None = None

    @property
    def form(self) -> str:
        """text, jsonl or parquet; an unknown suffix is text."""
        kind = KINDS.fullmatch(self.name.lower())
        found = kind and (kind[1] or kind[2])
        return found if found in ("jsonl", "parquet") else "text"


class Part(NamedTuple):
    """A document or a piece of one; of .jsonl, lines."""

    start: int  # byte offset in the (decompressed) file; of .parquet the row
    content: bytes | str
    ends: bool  # whether the document ends with it
    split: str  # train or val; empty where its number decides


class Block(NamedTuple):
    """Consecutive parts of a file."""

    file: File
    parts: list[Part]
    after: int  # where the next block starts, as Part.start
    read: int  # bytes of the file read so far
    number: int = 0  # of the file, in a corpus


def list_files(path: Path) -> list[File]:
    """The file, or those of a directory that can be read, in the order of their names; digests by several threads.

    Raises:
        ValueError: for input that is missing, empty, or leads out of the directory through a link.
    """
    if path.is_file():
        found = [(path.name, path)]
    elif path.is_dir():
        root = path.resolve()
        inside = sorted((p.relative_to(path).as_posix(), p) for p in path.rglob("*"))
        found = [(name, p) for name, p in inside if KINDS.fullmatch(p.name.lower()) and p.is_file()]
        for _, file in found:
            if not file.resolve().is_relative_to(root):
                raise ValueError(f"input={path}: {file} is a link that leads out of the directory")
    else:
        raise ValueError(f"input={path}: no such file or directory")
    with ThreadPoolExecutor() as pool:
        files = list(pool.map(lambda item: File(item[0], item[1].stat().st_size, digest(item[1]), item[1]), found))
    files = [file for file in files if file.size]
    if not files:
        readable = " (.txt, .md, .jsonl, also .gz and .zst, and .parquet are read)" if path.is_dir() else ""
        raise ValueError(f"input={path}: no text in it{readable}")
    return files


def digest(path: Path) -> str:
    """sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(files: list[File]) -> str:
    """One sum for several files, of a line each as sha256sum prints it; the file's own for one."""
    if len(files) == 1:
        return files[0].sha256
    return hashlib.sha256("".join(f"{file.sha256}  {file.name}\n" for file in files).encode()).hexdigest()


def read(file: File, start: int, key: str) -> Iterator[Block]:
    """The blocks of a file from `start` on: 0, or the `after` of one of its blocks.

    Args:
        key: which member of .jsonl's objects, which column of .parquet.

    Raises:
        ValueError: naming the file, and the offset or the row, for what cannot be read.
        OSError: for .parquet that memory has no room for.
    """
    parts: list[Part] = []
    held = 0
    for found, after, at in {"text": _text, "jsonl": _jsonl, "parquet": _rows}[file.form](file, start, key):
        parts += found
        held += sum(len(part.content) for part in found)
        if held >= BLOCK:
            yield Block(file, parts, after, at)
            parts, held = [], 0
    if parts:
        yield Block(file, parts, after, at)


def texts(block: Block, key: str) -> Iterator[tuple[str, bool, str]]:
    """(text, whether its document ends with it, its split) of each part, each line of .jsonl being one."""
    name = block.file.name
    for start, content, ends, split in block.parts:
        if block.file.form == "parquet":
            yield content, ends, split
        elif block.file.form == "text":
            try:
                yield content.decode(), ends, split
            except UnicodeDecodeError as error:
                raise ValueError(f"{name}: offset {start + error.start}: not UTF-8 ({error.reason})") from error
        else:
            for line in content.split(b"\n"):
                if line.strip():
                    yield _member(line, key, f"{name}: offset {start}"), ends, split
                start += len(line) + 1


def tail(files: list[File], fraction: float) -> list[File]:
    """The files with their `cut`: the last `fraction` of the characters of all of them are validation."""
    counts = [sum(_characters(part.content) for parts, *_ in _text(file, 0) for part in parts) for file in files]
    left = int(sum(counts) * (1 - fraction))  # characters of training
    cut = []
    for file, count in zip(files, counts):
        cut.append(_place(file, left) if left < count else sys.maxsize)
        left = max(0, left - count)
    return [replace(file, cut=at) for file, at in zip(files, cut)]


def is_one_document(file: File) -> bool:
    """Whether a text file has no ``<|endoftext|>`` line that parts it."""
    return file.form == "text" and sum(part.ends for parts, *_ in _text(file, 0) for part in parts) <= 1


def _place(file: File, characters: int) -> int:
    """The byte offset at which a number of characters have gone by."""
    for parts, *_ in _text(file, 0):
        for part in parts:
            count = _characters(part.content)
            if characters <= count:
                head = part.content.decode(errors="surrogateescape")[:characters]
                return part.start + len(head.encode(errors="surrogateescape"))
            characters -= count
    raise AssertionError("more characters than the file has")


def _characters(content: bytes) -> int:
    return len(content.decode(errors="ignore"))


def _text(file: File, start: int, key: str = "") -> Iterator[tuple[list[Part], int, int]]:
    """([parts of one piece], offset after it, bytes of the file read)."""
    chunks = _chunks(file, start)
    buffer, here, more, at = b"", 0, True, 0  # here: where in the buffer the piece starts, start: its offset in the file
    while True:
        stop = _stop(buffer, here, more)
        if stop is None:
            data, at = next(chunks, (b"", at))
            buffer, here, more = buffer[here:] + data, 0, bool(data)
            continue
        if here == len(buffer):
            return
        separator = SEPARATOR.search(buffer, here, stop + 2)
        content = buffer[here : separator.start() if separator else stop]
        after = separator.end() if separator else stop
        ends = file.closes and bool(separator or stop == len(buffer))
        parts = _cut(Part(start, content, ends, ""), file.cut) if content else []
        start, here = start + after - here, after
        yield parts, start, at


def _stop(buffer: bytes, here: int, more: bool) -> int | None:
    """Where the piece that starts `here` ends at the latest; None if the buffer is too short to know."""
    found = BOUNDARY.search(buffer, here + BLOCK, here + LONGEST + 1)
    if found and (not more or found.start() + 2 <= len(buffer)):
        return found.start()
    if not found and len(buffer) - here > LONGEST + 1:
        stop = here + LONGEST
        while buffer[stop] & 0xC0 == 0x80:  # inside a character
            stop -= 1
        return stop
    return None if more else len(buffer)


def _cut(part: Part, cut: int | None) -> list[Part]:
    if cut is None:
        return [part]
    head = min(max(cut - part.start, 0), len(part.content))
    if head in (0, len(part.content)):
        return [part._replace(split="train" if head else "val")]
    rest = Part(part.start + head, part.content[head:], part.ends, "val")
    return [Part(part.start, part.content[:head], False, "train"), rest]


def _jsonl(file: File, start: int, key: str) -> Iterator[tuple[list[Part], int, int]]:
    held: list[bytes] = []  # of a line whose end is not read yet: searched once, joined once, however long it is
    at = 0
    for data, at in _chunks(file, start):
        if end := data.rfind(b"\n") + 1:
            lines = b"".join([*held, data[:end]])
            yield [Part(start, lines, True, "")], start + len(lines), at
            start, held = start + len(lines), []
        held.append(data[end:])
    if last := b"".join(held):
        yield [Part(start, last, True, "")], start + len(last), at


def _member(line: bytes, key: str, place: str) -> str:
    try:
        content = json.loads(line.decode("utf-8-sig"))  # of bytes it takes a surrogate's three for a character
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get(key), str):
        raise ValueError(f"{place}: no string under the key {key!r} (--text_key names another)")
    text = content[key]
    if b"\\u" in line:  # may be half of a pair, which is no character: made U+FFFD, as tiktoken does
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _rows(file: File, start: int, key: str) -> Iterator[tuple[list[Part], int, int]]:
    pyarrow, parquet = needs("pyarrow", "reads .parquet"), needs("pyarrow.parquet", "reads .parquet")
    try:
        table = parquet.ParquetFile(file.path, buffer_size=READ, pre_buffer=False)
        kinds = {f.name: f.type for f in table.schema_arrow}
        if key not in kinds or not (pyarrow.types.is_string(kinds[key]) or pyarrow.types.is_large_string(kinds[key])):
            names = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
            raise ValueError(f"no column {key!r} of strings among {names} (--text_key names another)")
        total = table.metadata.num_rows
        row = group = 0  # the first row of the first row group that `start` is not beyond
        while group < table.num_row_groups and row + table.metadata.row_group(group).num_rows <= start:
            row, group = row + table.metadata.row_group(group).num_rows, group + 1
        for batch in table.iter_batches(64, row_groups=list(range(group, table.num_row_groups)), columns=[key]):
            batch_start, row = row, row + len(batch)
            values = batch.column(0).cast(pyarrow.large_binary()).to_pylist()
            parts = [Part(i, _value(v, key, i), True, "") for i, v in enumerate(values, batch_start) if i >= start]
            yield parts, row, file.size * row // total
    except (ValueError, OSError, pyarrow.ArrowException) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        kind = OSError if isinstance(error, MemoryError) else ValueError  # no fault of the input: work that is done stays
        raise kind(f"{file.name}: {reason}") from error


def _value(value: bytes | None, key: str, row: int) -> str:
    if value is None:
        raise ValueError(f"row {row}: {key} is null")
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"row {row}: {key} is not UTF-8 ({error.reason} at byte {error.start})") from error


def _chunks(file: File, start: int) -> Iterator[tuple[bytes, int]]:
    """The (decompressed) content from `start` on, and how many bytes of the file are read."""
    if file.content is not None:
        yield file.content[start:], len(file.content)
        return
    kind = file.path.suffix.lower()
    try:
        with open(file.path, "rb") as raw:
            if kind not in (".gz", ".zst"):
                raw.seek(start)
                start = 0
            for data in _zstd(raw) if kind == ".zst" else _read(gzip.GzipFile(fileobj=raw) if kind == ".gz" else raw):
                if start < len(data):
                    yield data[start:], raw.tell()
                start = max(0, start - len(data))
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file.name}: {getattr(error, 'strerror', None) or error}") from error


def _read(stream: BinaryIO) -> Iterator[bytes]:
    while data := stream.read(READ):
        yield data


def _zstd(raw: BinaryIO) -> Iterator[bytes]:
    """Frame after frame; zstandard's own stream takes a truncated file for a whole one."""
    zstandard = needs("zstandard", "reads .zst")
    frame = None
    try:
        while data := raw.read(READ // 16):
            while data:
                frame = frame or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
                yield frame.decompress(data)
                data, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    except zstandard.ZstdError as error:
        raise EOFError(f"not Zstandard's format: {error}") from error
    if frame is not None:
        raise EOFError("Zstandard's frame is cut off")


def needs(module: str, purpose: str) -> ModuleType:
    """An optional dependency; ValueError with the command that installs it where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ValueError(f"{package}, which {purpose}, is not installed: pip install {package}") from error
