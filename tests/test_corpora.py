"""Corpora: formats, splitting, resuming after real kills, a local hub, own byte pairs; R21, R22 and the paths of R24."""

import gzip
import hashlib
import http.server
import itertools
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt import export, sample, tokenizer, train
from nanogpt.config import TrainConfig, load
from nanogpt.data import __main__ as command
from nanogpt.data import assets, check, encode, find, hub, prepare, sources, splitting
from nanogpt.data.prepare import PrepareConfig
from nanogpt.data.progress import Meter
from nanogpt.data.shards import JOURNAL, SIDECAR, open_dataset, open_shard, write_shard

ROOT = Path(__file__).parents[1]
pa = pytest.importorskip("pyarrow", reason="the extra `data` is not installed")
pq = pytest.importorskip("pyarrow.parquet")
zstandard = pytest.importorskip("zstandard")


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def documents(count, seed=0):
    """Texts of 0 to 60 words, some of several lines, with letters beyond ASCII."""
    rng = np.random.default_rng(seed)
    words = ["the", "kings", "naïve", "東京", "don't", "12", "speak", "\n", "\n\n", "—", "a", "<|endoftext|>", "émigré", "it's"]
    return [" ".join(rng.choice(words, rng.integers(60))) for _ in range(count)]


def made(name, *options):
    return prepare.prepare(str(name), load(PrepareConfig, options, None))


def tokens(path, split):
    return np.concatenate([shard.tokens for shard in open_dataset(path).shards(split)])


def contents(path):
    return {file.name: file.read_bytes() for file in Path(path).iterdir()}


def shards_of(path):
    return {name: content for name, content in contents(path).items() if name.endswith(".bin")}


def run(*argv):
    """Exit code of the command, in this process."""
    try:
        command.main(list(map(str, argv)))
    except SystemExit as stopped:
        return stopped.code
    return 0


def jsonl(texts, key="text"):
    return "".join(json.dumps({key: text, "n": i}, ensure_ascii=i % 2 == 0) + "\n" for i, text in enumerate(texts)).encode()


def write_parquet(path, texts, kind=pa.string(), rows=7, key="text"):  # noqa: B008
    pq.write_table(pa.table({"n": list(range(len(texts))), key: pa.array(texts, kind)}), path, row_group_size=rows)


def expected(texts, encoder, draw):
    """The splits' tokens by the plain loop that the recipe describes."""
    is_val = draw(np.arange(len(texts)))
    result = {"train": [], "val": []}
    for text, val in zip(texts, is_val):
        result["val" if val else "train"] += [*encoder.encode_array(text).tolist(), encoder.eot]
    return result


# Formats


def test_every_format_gives_the_tokens_of_the_plain_loop(gpt2, monkeypatch):
    monkeypatch.setattr(sources, "BLOCK", 300)
    monkeypatch.setattr(sources, "READ", 100)
    texts = documents(200)
    raw = jsonl(texts)
    Path("a.jsonl").write_bytes(raw)
    Path("b.jsonl.gz").write_bytes(gzip.compress(raw[:999]) + gzip.compress(raw[999:]))
    pack = zstandard.ZstdCompressor().compress
    Path("c.jsonl.zst").write_bytes(pack(raw[:999]) + pack(raw[999:]))
    write_parquet("d.parquet", texts)
    write_parquet("e.parquet", texts, pa.large_string(), 1000)
    Path("f.jsonl").write_bytes(raw.replace(b"\n", b"\r\n\r\n").removesuffix(b"\r\n\r\n"))
    want = expected(texts, gpt2, splitting.Draw(0.1))
    assert len(want["val"]) > 100
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet", "e.parquet", "f.jsonl"):
        path = made(name, "--val_fraction=0.1")
        assert path == Path("data", name[0])
        assert {split: tokens(path, split).tolist() for split in want} == want, name
        sizes = [json.loads((path / SIDECAR).read_text())["splits"][split]["bytes"] for split in want]
        assert sum(sizes) == sum(len(text.encode()) for text in texts)
        assert not list(check.problems(path))


def test_a_path_is_not_taken_for_the_text_of_that_name(gpt2):
    texts = documents(200)
    Path("plays.jsonl").write_bytes(jsonl(texts))
    want = expected(texts, gpt2, splitting.Draw(0.005))
    assert tokens(made("plays.jsonl"), "train").tolist() == want["train"]


def test_directory_of_all_formats_in_the_order_of_names(gpt2):
    texts = [text + "\n" for text in documents(300, 1) if text and "<|endoftext|>" not in text][:24]
    Path("in/sub").mkdir(parents=True)
    Path("in/1.jsonl").write_bytes(jsonl(texts[:6], "content"))
    write_parquet("in/2.parquet", texts[6:12], key="content")
    Path("in/3.txt").write_bytes("<|endoftext|>\n".join(texts[12:16]).encode())
    Path("in/sub/4.md").write_bytes(texts[16].encode())
    Path("in/sub/5.txt.gz").write_bytes(gzip.compress("<|endoftext|>\r\n".join(["", *texts[17:], ""]).encode()))
    Path("in/6.csv").write_text("not read")
    Path("in/7.txt").write_text("")
    path = made("in", "--text_key=content", "--val_fraction=0.3")
    want = expected(texts, gpt2, splitting.Draw(0.3))
    assert {split: tokens(path, split).tolist() for split in want} == want


def test_half_a_surrogate_pair_is_replaced(gpt2):
    Path("a.jsonl").write_bytes(b'{"text": "a\\ud800b \\ud83d\\ude00"}\n' * 9)
    assert gpt2.decode(tokens(made("a.jsonl", "--val_fraction=0.5"), "train").tolist()).startswith("a\ufffdb \U0001f600<|")


PIECES = [
    "a",
    "Bc",
    "7",
    "'s",
    "'",
    " ",
    "  ",
    "\n",
    "\t",
    "\r\n",
    "é",
    "東",
    "!",
    "\u3000",
    "\u00a0",
    "\u0085",
    "\x1c",
    "\u2003",
]


@given(st.lists(st.sampled_from([*PIECES, "\n<|endoftext|>\n", "<|endoftext|>"]), max_size=60), st.sampled_from([1, 3, 8]))
@settings(max_examples=150, deadline=None)
def test_pieces_of_a_text_encode_to_the_tokens_of_the_whole(gpt2, parts, size):
    """And reading goes on from the end of any block."""
    content = "".join(parts).encode()
    wanted = [d for d in re.split(r"(?m)^<\|endoftext\|>\r?(?:\n|\Z)", content.decode()) if d]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "BLOCK", size)
        blocks = list(sources.read(sources.File("x", len(content), "", content=content), 0, ""))
        for i, block in enumerate(blocks):
            again = list(sources.read(block.file, block.after, ""))
            assert [b.parts for b in again] == [b.parts for b in blocks[i + 1 :]]
    got, document = [], []
    for part in itertools.chain.from_iterable(block.parts for block in blocks):
        document += gpt2.encode_array(part.content.decode()).tolist()
        if part.ends:
            got.append(document)
            document = []
    assert not document
    assert got == [gpt2.encode_array(text).tolist() for text in wanted]


def test_no_piece_ends_inside_white_space():
    """Of any kind: before the last space, which follows another one, no piece may end."""
    kinds = [chr(i) for i in range(0x110000) if chr(i).isspace()]
    assert len(kinds) > 25
    for space in kinds:
        text = f"é{space} b".encode()
        assert not sources.BOUNDARY.search(text, text.index(b" b")), repr(space)
    assert sources.BOUNDARY.search("é b".encode(), 2).start() == 2


def test_a_text_without_white_space_is_cut_between_characters(gpt2, monkeypatch):
    monkeypatch.setattr(sources, "BLOCK", 10)
    monkeypatch.setattr(sources, "LONGEST", 100)
    text = "東京" * 100
    Path("a.txt").write_text(text, encoding="utf-8")
    (file,) = sources.list_files(Path("a.txt"))
    parts = [part for block in sources.read(file, 0, "") for part in block.parts]
    assert "".join(part.content.decode() for part in parts) == text
    assert [part.ends for part in parts] == [False] * (len(parts) - 1) + [True]
    assert max(len(part.content) for part in parts) <= 102


def test_tail_of_several_texts_is_cut_at_the_character(gpt2, monkeypatch):
    monkeypatch.setattr(sources, "BLOCK", 20)
    texts = ["é" * 30 + " tail", "東 " * 45, "x" * 5]
    Path("in").mkdir()
    for i, text in enumerate(texts):
        Path("in", f"{i}.txt").write_text(text, encoding="utf-8")
    for fraction in (0.1, 0.5, 0.99):
        path = made("in", "--split=tail", f"--val_fraction={fraction}", "--tokenizer=char", f"--out=d{fraction}")
        encoder = tokenizer.load(path)
        cut = int(sum(map(len, texts)) * (1 - fraction))
        assert encoder.decode(tokens(path, "train").tolist()) == "".join(texts)[:cut]
        assert encoder.decode(tokens(path, "val").tolist()) == "".join(texts)[cut:]


def test_reading_goes_on_from_the_end_of_any_block(monkeypatch):
    monkeypatch.setattr(sources, "BLOCK", 900)
    monkeypatch.setattr(sources, "READ", 500)
    raw = jsonl(documents(150))
    for name, content in (("a.jsonl", raw), ("b.jsonl.gz", gzip.compress(raw)), ("c.txt.zst", ZST)):
        Path(name).write_bytes(content)
    write_parquet("d.parquet", documents(600), rows=100)
    for name in ("a.jsonl", "b.jsonl.gz", "c.txt.zst", "d.parquet"):
        (file,) = sources.list_files(Path(name))
        blocks = list(sources.read(file, 0, "text"))
        assert len(blocks) > 5
        for i, block in enumerate(blocks):
            following = [text for b in blocks[i + 1 :] for text in sources.texts(b, "text")]
            assert [text for b in sources.read(file, block.after, "text") for text in sources.texts(b, "text")] == following


def corrupt_parquet(path):
    write_parquet(path, documents(50))
    raw = bytearray(Path(path).read_bytes())
    raw[200:900] = b"\xff" * 700
    Path(path).write_bytes(raw)


def not_utf8(count, bad):
    """An array of strings, one of which is none, as a writer leaves it that does not look."""
    return pa.array([b"no\xff" if i == bad else b"yes" for i in range(count)], pa.binary()).view(pa.string())


ZST = zstandard.ZstdCompressor().compress(jsonl(documents(300)))
FAULTS = {
    "a.jsonl": (b'{"text": "x"}\n{"text": 3}\n', "a.jsonl: offset 14: no string under the key 'text'"),
    "b.jsonl": (b'{"text": "x"}\n\n[1]\n', "b.jsonl: offset 15: no string"),
    "c.jsonl": (b'{"text": "x"}\n{"text": \n', "c.jsonl: offset 14: not JSON"),
    "d.jsonl": (b'{"text": "x"}\n{"text": "\xff"}\n', "d.jsonl: offset 14: not JSON"),
    "surrogate.jsonl": (b'{"text": "x"}\n{"text": "\xed\xa0\x80"}\n', "surrogate.jsonl: offset 14: not JSON: 'utf-8' codec"),
    "e.jsonl": (b"[" * 200_000, "e.jsonl: offset 0: not JSON"),
    "f.txt": (b"abc\n<|endoftext|>\nde\xff", "f.txt: offset 20: not UTF-8"),
    "g.jsonl.gz": (gzip.compress(jsonl(documents(300)))[:-20], "g.jsonl.gz: Compressed file ended"),
    "h.jsonl.gz": (b"not gzip", "h.jsonl.gz: Not a gzipped file"),
    "i.jsonl.zst": (ZST[:-20], "i.jsonl.zst: Zstandard's frame is cut off"),
    "j.jsonl.zst": (b"not zstd", "j.jsonl.zst: not Zstandard's format"),
    "k.parquet": (b"PAR1 no PAR1", "k.parquet: "),
    "l.parquet": (lambda path: write_parquet(path, ["a", None]), "l.parquet: row 1: text is null"),
    "m.parquet": (
        lambda path: write_parquet(path, ["a"], key="content"),
        "m.parquet: no column 'text' of strings among n (int64)",
    ),
    "n.parquet": (corrupt_parquet, "n.parquet: "),
    "p.parquet": (
        lambda path: write_parquet(path, not_utf8(200, 170), rows=80),
        "p.parquet: row 170: text is not UTF-8 (invalid start byte at byte 2)",
    ),
    "o.txt.gz": (gzip.compress(b""), "leaves the split train without"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_input_name_the_file_and_the_place(name, capsys, gpt2):
    content, message = FAULTS[name]
    if callable(content):
        content(name)
    else:
        Path(name).write_bytes(content)
    assert run("prepare", name, "--tokenizer=gpt2") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(Path("data").iterdir())


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (pa.ArrowNotImplementedError("codec LZO\n/arrow/x.cc:7"), "a.parquet: codec LZO\n"),
        (OSError(), "a.parquet: OSError\n"),
        (pa.ArrowMemoryError("malloc of size 7 failed"), "a.parquet: malloc of size 7 failed\n"),
    ],
    ids=["not a ValueError", "no text", "memory"],
)
def test_what_pyarrow_raises_becomes_one_line(error, message, capsys, monkeypatch, gpt2):
    def fail(*args, **kwargs):
        raise error

    write_parquet("a.parquet", ["x"])
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", fail)
    assert run("prepare", "a.parquet", "--tokenizer=gpt2") == 2
    assert capsys.readouterr().err == f"prepare: {message}"
    assert Path("data/.a.partial").exists() == isinstance(error, MemoryError)  # its work is not lost


def test_a_byte_order_mark_begins_a_jsonl(gpt2):
    Path("a.jsonl").write_bytes(b"\xef\xbb\xbf" + b'{"text": "a"}\n' * 9)
    assert gpt2.decode(tokens(made("a.jsonl", "--val_fraction=0.5"), "train")[:2].tolist()) == "a<|endoftext|>"


def test_a_long_line_of_jsonl_takes_time_in_proportion(monkeypatch):
    """4 MB in 65,536 reads are a moment; where each read copies and searches what is there of the line, they are 20 s."""
    monkeypatch.setattr(sources, "READ", 64)
    raw = jsonl(["short", "x" * (1 << 22), "last"]) + b'{"text": "no end of line"}'
    Path("a.jsonl").write_bytes(raw)
    (file,) = sources.list_files(Path("a.jsonl"))
    started = time.process_time()
    parts = [part for block in sources.read(file, 0, "text") for part in block.parts]
    assert time.process_time() - started < 2
    assert b"".join(part.content for part in parts) == raw
    assert [part.start for part in parts] == np.cumsum([0, *(len(part.content) for part in parts[:-1])]).tolist()


def blocks_of(count):
    lines = [sources.Part(0, jsonl(["a b c"] * 99), True, "")]
    return (sources.Block(sources.File("a.jsonl", 1, ""), lines, i, i) for i in range(count))


def test_a_tokenizer_that_a_process_cannot_read_is_named():
    Path("tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json: offset 1: "):
        list(encode.in_order(blocks_of(2), Path(), "text", 2))


def test_a_killed_process_is_told():
    tokenizer.save(tokenizer.CharTokenizer(" abc"), Path())
    encoded = encode.in_order(blocks_of(1000), Path(), "text", 2)
    next(encoded)
    multiprocessing.active_children()[0].kill()
    with pytest.raises(ChildProcessError, match="ended by itself or was killed"):
        list(encoded)


def test_missing_packages_are_named(capsys, monkeypatch):
    Path("a.jsonl.zst").write_bytes(ZST)
    write_parquet("b.parquet", ["x"])
    for name, package in (("a.jsonl.zst", "zstandard"), ("b.parquet", "pyarrow")):
        monkeypatch.setitem(sys.modules, package, None)
        assert run("prepare", name, "--tokenizer=char") == 2
        assert f"pip install {package}\n" in capsys.readouterr().err


# Options


def test_tokens_stop_at_the_end_of_a_document(gpt2, capsys):
    """That is, of the first one by whose end there are as many."""
    texts = documents(100, 2)
    Path("a.jsonl").write_bytes(jsonl(texts))
    counts = np.cumsum([len(gpt2.encode_array(text)) + 1 for text in texts]).tolist()
    k = next(i for i, count in enumerate(counts) if count >= 500)
    for limit, want in (("0.5K", k), (str(counts[k]), k), (str(counts[k] + 1), k + 1)):
        data = open_dataset(made("a.jsonl", f"--tokens={limit}", "--val_fraction=0.2"))
        assert data.count("train") + data.count("val") == counts[want]
    assert "ends before" not in capsys.readouterr().out
    made("a.jsonl", "--tokens=1M", "--val_fraction=0.2")
    assert "a ends before 1,000,000 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tokens=10X",), "tokens=10X: expected"),
        (("--tokens=0",), "tokens=0: expected"),
        (("--tokenizer=train:256",), "tokenizer=train:256: 257"),
        (("--tokenizer=train:x",), "tokenizer=train:x: expected auto"),
        (("--tokenizer=a.jsonl",), "a.jsonl: offset"),
        (("--val_fraction=-1",), "val_fraction=-1.0"),
        (("--split=head",), "split=head: expected one of"),
        (("--split=tail",), "split=tail: is for .txt and .md"),
        (("--revision=main",), "revision=main: only a corpus of the hub has one"),
        (("--val_fraction=1e-9",), "leaves the split val without one of the 3 documents"),
        (("--text_key=body",), "a.jsonl: offset 0: no string under the key 'body' (--text_key names another)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_options_are_refused_in_one_line(options, message, capsys, gpt2):
    Path("a.jsonl").write_bytes(jsonl(["a", "b", "c"]))
    assert run("prepare", "a.jsonl", *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_draws():
    share = splitting.Draw(0.01)(np.arange(200_000)).mean()
    assert 0.009 < share < 0.011
    assert (splitting.Draw(0.01)(np.arange(100, 300)) == splitting.Draw(0.01)(np.arange(1000))[100:300]).all()
    assert np.flatnonzero(splitting.Draw(0.01)(np.arange(500))).tolist() == [132, 333]
    # What datasets 5.2.0 gives: Dataset(8013 rows).train_test_split(test_size=0.0005, seed=2357, shuffle=True)["test"].
    assert np.flatnonzero(splitting.NanoGPTDraw(8013, 0.0005)(np.arange(9000))).tolist() == [670, 1982, 2628, 3393, 7259]


def test_progress_line(capsys, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    meter = Meter("owt", [1000, 3000], 0, 5_000_000)
    meter.show(5_000_000, 0, 0)
    clock[0] = 120.0
    meter.show(45_000_000, 1, 1000)
    clock[0] = 125.0
    meter.show(46_000_000, 1, 1500)
    assert capsys.readouterr().out == "owt:  50.0%  45,000,000 tokens  2.00M tokens/s  eta 0:00:20\n"
    meter.done(50_000_000)
    assert capsys.readouterr().out == "owt: 50,000,000 tokens, 1.80M tokens/s\n"
    limited = Meter("owt", [1000, 3000], 100, 0)
    limited.show(0, 0, 0)
    clock[0] = 225.0
    limited.show(80, 0, 10)
    assert capsys.readouterr().out == "owt:  80.0%  80 tokens  0.00M tokens/s  eta 0:00:25\n"


# R22


def test_r22_same_bytes_for_any_number_of_workers(gpt2, monkeypatch):
    """Documents of .jsonl, of .parquet, and one long text, which is encoded in pieces."""
    monkeypatch.setattr(sources, "BLOCK", 2000)
    monkeypatch.setattr(sources, "READ", 700)
    texts = documents(300)
    Path("in").mkdir()
    Path("in/a.jsonl").write_bytes(jsonl(texts))
    write_parquet("in/b.parquet", texts[::-1])
    Path("long.txt").write_text(" ".join(texts).replace("<|endoftext|>", ""), encoding="utf-8")
    for name, *options in (("in", "--val_fraction=0.05", "--tokens=19K"), ("long.txt", "--tokenizer=gpt2")):
        one, *others = (
            contents(made(name, f"--workers={w}", f"--out={name}-{w}", "--shard_tokens=3000", *options)) for w in (1, 2, 3)
        )
        assert len(one) > 4
        assert others == [one, one]


KILLED = """
import os, signal, sys, shutil, time
from pathlib import Path
from nanogpt.data import prepare, sources, writer
sources.BLOCK, sources.READ, prepare.SAVE_SECONDS = 1500, 700, 0
stop, count = int(sys.argv[1]), 0
def counted(function):
    def call(*args, **kwargs):
        global count
        count += 1
        if count == stop:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call
for module, name in ((os, "fsync"), (os, "replace"), (os, "truncate"), (Path, "rename"), (Path, "unlink"), (shutil, "rmtree")):
    setattr(module, name, counted(getattr(module, name)))
prepare.main(sys.argv[2:])
print("steps", count)
"""


def started(stop, *options, **more):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-c", KILLED, str(stop), *options]
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)


def test_r22_killed_before_any_step_on_disk_and_resumed():
    """SIGKILL before the n-th fsync, rename, unlink, ...: nothing looks valid or old data are whole; then identical bytes."""
    Path("a.jsonl").write_bytes(jsonl(documents(40)))
    Path("b.jsonl").write_bytes(jsonl(documents(45, 1)))
    options = ("--tokenizer=char", "--shard_tokens=2500", "--val_fraction=0.1", "--workers=1")
    want = contents(made("b.jsonl", *options, "--out=want"))
    old = contents(made("a.jsonl", *options, "--out=old"))
    done = started(0, "b.jsonl", *options, "--out=count")
    steps = int(re.search(r"steps (\d+)", done.communicate()[0])[1])
    assert steps > 30
    killed = 0
    chosen = {*range(1, 6), *range(6, steps - 12, 11), *range(steps - 12, steps + 5)}  # a replaced directory adds some
    for stop in sorted(chosen):
        target = Path(f"out-{stop}")
        target.mkdir()
        for name, content in old.items():
            (target / name).write_bytes(content)
        process = started(stop, "b.jsonl", *options, f"--out={target}")
        process.communicate()
        assert process.returncode in (0, -signal.SIGKILL)
        killed += process.returncode == -signal.SIGKILL
        if target.exists():
            now = contents(target)
            now.pop(".lock", None)
            assert now in (old, want)
            assert not list(check.problems(target))
        partial = Path(f".{target}.partial")
        if partial.exists() and (partial / JOURNAL).exists():
            with pytest.raises(ValueError, match="has not finished"):
                open_dataset(partial)
        elif partial.exists() and list(partial.glob("*.bin")):
            assert not list(check.problems(partial))
        assert contents(made("b.jsonl", *options, f"--out={target}")) | {".lock": b""} == want | {".lock": b""}
        assert not partial.exists()
    assert killed >= len(chosen) - 4


def test_r22_killed_from_outside_with_workers_and_resumed(gpt2):
    """SIGKILL at three moments, each later in the text; the processes that encode end with it."""
    texts = documents(4000)
    Path("a.jsonl").write_bytes(jsonl(texts))
    options = ("--shard_tokens=20000", "--val_fraction=0.02")
    want = contents(made("a.jsonl", *options, "--workers=1", "--out=want"))
    journal, reached = Path(".out.partial", JOURNAL), [0]
    for workers in (2, 3, 2):
        process = started(0, "a.jsonl", *options, f"--workers={workers}", "--out=out", start_new_session=True)
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            at = json.loads(journal.read_text())["documents"] if journal.exists() else 0
            if at > reached[-1] + 300:
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
        process.stderr.close()
        reached.append(at)
        assert not Path("out").exists()
        with pytest.raises(ValueError, match="has not finished"):
            find(".out.partial") and open_dataset(Path(".out.partial"))
        while time.monotonic() < deadline:  # its session has no process left
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                break
            time.sleep(0.02)
        else:
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail("processes that encode were left behind")
    assert 300 < reached[1] < reached[2] < reached[3] < 4000
    process = started(0, "a.jsonl", *options, "--workers=2", "--out=out")
    out, error = process.communicate()
    assert process.returncode == 0, error
    assert "going on after" in out
    assert contents("out") == want


def others_in_session(leader):
    """The processes of a session but the first."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            if path.read_text().rpartition(")")[2].split()[3] == str(leader):
                found.append(int(path.parent.name))
    return set(found) - {leader}


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_processes_that_encode_leave_an_interrupt_to_their_parent(gpt2):
    """At any moment of their life, that of their start included, when Python would show a traceback."""
    Path("a.jsonl").write_bytes(jsonl(documents(4000)))
    process = started(0, "a.jsonl", "--workers=2", "--out=out", start_new_session=True)
    seen = set()
    while process.poll() is None:
        for other in others_in_session(process.pid):
            seen.add(other)
            with suppress(ProcessLookupError):
                os.kill(other, signal.SIGINT)
        time.sleep(0.005)
    assert (process.returncode, process.communicate()[1]) == (0, "")
    assert len(seen) == 3  # Python's resource tracker, and two that encode


def test_an_interrupted_preparation_says_how_to_go_on(gpt2):
    """Ctrl-C, which the processes that encode get too: one line, no traceback."""
    Path("a.jsonl").write_bytes(jsonl(documents(4000)))
    options = ("--val_fraction=0.02", "--workers=2", "--out=out")
    process = started(0, "a.jsonl", *options, start_new_session=True)
    deadline = time.monotonic() + 300
    while not list(Path().glob(".out.partial/train_*.bin")) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate()[1] == "\nprepare: interrupted; the same command goes on from here\n"
    assert process.returncode == 130
    process = started(0, "a.jsonl", *options)
    assert "going on after" in process.communicate()[0]
    assert contents("out") == contents(made("a.jsonl", *options[:2], "--out=want"))


def test_r22_damaged_work_is_not_continued(capsys):
    Path("a.jsonl").write_bytes(jsonl(documents(45, 1)))
    options = ("--tokenizer=char", "--shard_tokens=500", "--val_fraction=0.1", "--workers=1", "--out=out")
    started(25, "a.jsonl", *options).communicate()
    with open(".out.partial/train_000000.bin", "r+b") as file:
        file.seek(1100)
        file.write(b"\x07\x07")
    assert run("prepare", "a.jsonl", *options) == 2
    assert ".out.partial/train_000000.bin: is not what was written" in capsys.readouterr().err
    assert run("prepare", "a.jsonl", *options) == 0


def test_r22_other_options_start_anew(capsys):
    Path("a.jsonl").write_bytes(jsonl(documents(45, 1)))
    options = ("--tokenizer=char", "--val_fraction=0.1", "--workers=1")
    started(25, "a.jsonl", *options, "--shard_tokens=500", "--out=out").communicate()
    assert run("prepare", "a.jsonl", *options, "--shard_tokens=600", "--out=out") == 0
    assert "starting anew" in capsys.readouterr().out
    assert contents("out") == contents(made("a.jsonl", *options, "--shard_tokens=600", "--out=other"))


def test_one_process_prepares(capsys):
    Path("a.jsonl").write_bytes(jsonl(documents(45, 1)))
    with prepare._workplace(Path("out")):
        assert run("prepare", "a.jsonl", "--tokenizer=char", "--out=out") == 2
    assert "out: another process is preparing it" in capsys.readouterr().err


# R21


def dataset(count=(300, 300, 120), val=50, vocab=500):
    """A dataset of ours, by hand."""
    Path("d").mkdir()
    rng, splits = np.random.default_rng(0), {"train": {"shards": []}, "val": {"shards": []}}
    for split, sizes in (("train", count), ("val", (val,))):
        for i, size in enumerate(sizes):
            entry = write_shard(Path("d", f"{split}_{i:06d}.bin"), rng.integers(0, vocab, size).astype(np.uint16))
            splits[split]["shards"].append(entry)
    facts = {"vocab_size": vocab, "shard_tokens": 300, "splits": splits}
    Path("d", SIDECAR).write_text(json.dumps(facts))
    return facts


def patch(name, at, value):
    with open(Path("d", name), "r+b") as file:
        file.seek(at)
        file.write(value)


def word(value):
    return int(value).to_bytes(4, "little", signed=True)


def wider(name):
    """The file anew with uint32 tokens."""
    write_shard(Path("d", name), open_shard(Path("d", name)).tokens.astype(np.uint32))


def shorter(name):
    write_shard(Path("d", name), open_shard(Path("d", name)).tokens[:-1].copy())


R21 = {
    "magic": (lambda: patch("train_000001.bin", 0, word(7)), "d/train_000001.bin: offset 0: magic 7: expected"),
    "version": (lambda: patch("train_000001.bin", 4, word(2)), "d/train_000001.bin: offset 4: version 2: expected 1"),
    "count": (lambda: patch("train_000001.bin", 8, word(299)), "d/train_000001.bin: offset 8: the header says 299"),
    "truncated": (lambda: os.truncate("d/val_000000.bin", 1100), "d/val_000000.bin: offset 8: the header says 50"),
    "longer": (lambda: patch("val_000000.bin", 1124, b"ab"), "d/val_000000.bin: offset 8: the header says 50"),
    "empty": (lambda: os.truncate("d/val_000000.bin", 0), "d/val_000000.bin: offset 0: magic 0"),
    "missing": (lambda: Path("d/train_000001.bin").unlink(), "d/train_000001.bin: No such file"),
    "token": (lambda: patch("train_000002.bin", 1024 + 2 * 7, b"\xff\xff"), "d/train_000002.bin: offset 1038: token 65535"),
    "bit": (lambda: patch("train_000002.bin", 1024, b"\x00\x01"), "d/train_000002.bin: sha256"),
    "dtype": (
        lambda: wider("train_000001.bin"),
        "d/train_000001.bin: offset 0: uint32 tokens, but train_000000.bin has uint16",
    ),
    "short": (lambda: shorter("train_000001.bin"), "d/train_000001.bin: offset 8: a short shard, 299 tokens instead of 300"),
}


@pytest.mark.parametrize("fault", R21)
@pytest.mark.parametrize("listed", [True, False], ids=["ours", "fineweb"])
def test_r21_check_names_file_and_offset(fault, listed, capsys):
    """In a dataset of ours, and in one that has nothing but shards, where the rest stands in for what dataset.json says."""
    facts = dataset()
    if not listed:
        Path("d", SIDECAR).write_text('{"vocab_size": 500}')
    assert run("check", "./d") == 0
    break_it, message = R21[fault]
    break_it()
    if listed and fault in ("dtype", "short"):  # else the sums and counts speak first
        entry = facts["splits"]["train"]["shards"][1]
        entry |= {"tokens": open_shard(Path("d/train_000001.bin")).count, "sha256": sources.digest(Path("d/train_000001.bin"))}
        Path("d", SIDECAR).write_text(json.dumps(facts))
    if not listed and fault in ("missing", "bit"):
        assert run("check", "./d") == 0  # nothing says that the file was there, or what was in it
        return
    capsys.readouterr()
    assert run("check", "./d") == 2
    assert f"data: {message}" in capsys.readouterr().err


def test_r21_check_names_every_broken_file(capsys):
    dataset()
    R21["magic"][0]()
    R21["truncated"][0]()
    assert run("check", "./d") == 2
    assert [line.split(": ")[1] for line in capsys.readouterr().err.splitlines()] == ["d/train_000001.bin", "d/val_000000.bin"]


def test_r21_shard_tokens_that_are_no_number(capsys):
    facts = dataset()
    Path("d", SIDECAR).write_text(json.dumps(facts | {"shard_tokens": "x"}))
    assert run("check", "./d") == 2
    assert capsys.readouterr().err == "data: d/dataset.json: shard_tokens 'x' is not an integer\n"


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_r21_info_names_a_token_that_the_tokenizer_lacks(kind, capsys, request):
    dataset(vocab=300)
    encoder = tokenizer.CharTokenizer("ab") if kind == "char" else request.getfixturevalue("trained")
    tokenizer.save(encoder, Path("d"))
    patch("train_000000.bin", 1024, np.zeros(300, "<u2").tobytes())
    patch("train_000000.bin", 1024 + 2 * 5, (400).to_bytes(2, "little"))
    assert run("info", "./d") == 2
    error = capsys.readouterr().err
    assert error == f"data: d/train_000000.bin: offset 1034: token 400, but the vocabulary has {encoder.vocab_size}\n"


def test_r21_vocabulary_beyond_the_type(capsys):
    facts = dataset()
    Path("d", SIDECAR).write_text(json.dumps(facts | {"vocab_size": 70_000}))
    assert run("check", "./d") == 2
    assert "d/train_000000.bin: offset 0: uint16 cannot hold a vocabulary of 70000" in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["magic", "version", "count", "truncated", "missing"])
def test_r21_the_trainer_checks_headers_and_sizes(fault, capsys):
    dataset()
    R21[fault][0]()
    config = load(TrainConfig, ["--dataset=./d", "--out_dir=out", "--device=cpu", "--n_layer=1", "--n_head=1", "--n_embd=8"])
    with pytest.raises(SystemExit) as stopped:
        train.main(config)
    assert stopped.value.code == 2
    assert f"train: {R21[fault][1]}" in capsys.readouterr().err


def test_r21_published_shards_as_they_are(gpt2, capsys):
    """fineweb_train_000001.bin, fineweb_val_000000.bin as llm.c and modded-nanogpt publish them."""
    Path("fineweb10B").mkdir()
    rng = np.random.default_rng(0)
    for name, count in (("val_000000", 400), ("train_000001", 1000), ("train_000002", 1000), ("train_000003", 300)):
        header = np.zeros(256, dtype=np.int32)
        header[:3] = 20240520, 1, count
        with open(f"fineweb10B/fineweb_{name}.bin", "wb") as file:
            file.write(header.tobytes())
            file.write(rng.integers(0, 50257, count).astype(np.uint16).tobytes())
    assert run("check", "./fineweb10B") == 0
    assert run("info", "./fineweb10B") == 0
    out = capsys.readouterr().out
    assert "vocabulary 50,257, tokenizer gpt2" in out
    assert "train: 2,300 tokens (uint16) in 3 file(s)" in out
    assert re.search(r"val: 400 tokens.*\n  fingerprint [0-9a-f]{32}\n  begins '", out)


@given(st.integers(0, 3), st.integers(0, 1300), st.binary(min_size=1, max_size=40), st.booleans())
@settings(max_examples=120, deadline=None)
def test_r21_damaged_datasets_are_refused_or_read(tmp_path_factory, which, at, junk, cut):
    """Whatever the bytes: the reader gives what the headers say or a ValueError that names a file; so does the check."""
    path = tmp_path_factory.getbasetemp() / "fuzz"
    path.mkdir(exist_ok=True)
    entries = [write_shard(path / f"{s}_000000.bin", np.arange(60, dtype=np.uint16)) for s in ("train", "val")]
    splits = {s: {"shards": [entry]} for s, entry in zip(("train", "val"), entries)}
    (path / SIDECAR).write_text(json.dumps({"vocab_size": 60, "shard_tokens": 60, "splits": splits}))
    (path / "tokenizer.json").write_text('{"kind": "char", "characters": "ab"}')
    victim = path / ["train_000000.bin", "val_000000.bin", SIDECAR, "tokenizer.json"][which]
    raw = victim.read_bytes()
    at = min(at, len(raw))
    victim.write_bytes(raw[:at] + junk + (b"" if cut else raw[at + len(junk) :]))
    try:
        assert all(str(path) in line for line in check.problems(path))
        data = open_dataset(path)
        assert all(len(shard.tokens) == shard.count for split in data.splits for shard in data.splits[split])
    except ValueError as error:
        assert str(path) in str(error) or str(error).startswith("tokenizer")  # noqa: PT017 the fuzzed may or may not raise


# R24


def test_r24_links_and_names_that_lead_out_of_a_dataset(capsys):
    facts = dataset()
    secret = Path("secret.bin")
    write_shard(secret, np.arange(300, dtype=np.uint16))
    Path("d/train_000001.bin").unlink()
    Path("d/train_000001.bin").symlink_to(secret.absolute())
    for reader in (open_dataset, lambda path: list(check.problems(path)) and open_dataset(path)):
        with pytest.raises(ValueError, match=r"d/train_000001\.bin: is a link that leads out of the directory"):
            reader(Path("d"))
    assert run("check", "./d") == 2
    assert "d/train_000001.bin: is a link that leads out" in capsys.readouterr().err
    Path("d", SIDECAR).unlink()
    with pytest.raises(ValueError, match="is a link that leads out"):
        open_dataset(Path("d"))
    for name in ("../secret.bin", str(secret.absolute()), "..", "", "sub/x.bin", "..\\secret.bin"):
        facts["splits"]["train"]["shards"][1]["file"] = name
        Path("d", SIDECAR).write_text(json.dumps(facts))
        with pytest.raises(ValueError, match="is not the name of a file beside it"):
            open_dataset(Path("d"))
    Path("other.json").write_text(json.dumps(facts))
    Path("d", SIDECAR).unlink()
    Path("d", SIDECAR).symlink_to("../other.json")
    with pytest.raises(ValueError, match=r"d/dataset\.json: is a link that leads out"):
        open_dataset(Path("d"))


def test_r24_a_link_inside_the_dataset_is_fine():
    dataset()
    Path("d/train_000001.bin").rename("d/moved")
    Path("d/train_000001.bin").symlink_to("moved")
    assert not list(check.problems(Path("d")))
    Path("link").symlink_to("d")
    assert open_dataset(Path("link")).count("train") == 720


def test_r24_links_that_lead_out_of_the_input(capsys):
    Path("in").mkdir()
    Path("secret.jsonl").write_bytes(jsonl(["secret"]))
    Path("in/a.jsonl").symlink_to(Path("secret.jsonl").absolute())
    assert run("prepare", "./in") == 2
    assert "in/a.jsonl is a link that leads out of the directory" in capsys.readouterr().err
    assert not Path("data").exists()


@pytest.mark.parametrize("name", ["..", "../x", "/x", "a/b"])
def test_r24_names_that_lead_elsewhere(name, capsys):
    Path("in.txt").write_text("a b c " * 99)
    assert run("prepare", name, "--input=in.txt") == 2
    assert "a name has letters" in capsys.readouterr().err


# The hub, on this machine


class Hub(http.server.BaseHTTPRequestHandler):
    """What hub.py asks of huggingface.co: revision, tree in pages, files behind a redirect, ranges."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        world = self.server.world
        world["requests"].append((self.path, self.headers.get("Range")))
        path = self.path.partition("?")[0]
        if path.startswith("/api/datasets/o/r/revision/"):
            return self.answer(json.dumps({"sha": world["commit"]}).encode())
        if path.startswith(f"/api/datasets/o/r/tree/{world['commit']}/"):
            page = int(self.path.partition("cursor=")[2] or 0)
            files = sorted(name for name in world["files"] if name.startswith(path.partition(world["commit"])[2][1:] + "/"))
            entries = [self.entry(world, name) for name in files[page : page + 2]]
            link = f'<{world["url"]}{path}?recursive=true&cursor={page + 2}>; rel="next"' if files[page + 2 :] else ""
            return self.answer(json.dumps(entries).encode(), Link=link)
        if path.startswith("/datasets/o/r/resolve/"):
            self.send_response(302)
            self.send_header("Location", f"{world['url']}/cdn/{path.split('/', 6)[6]}")
            return self.end_headers()
        if path.startswith("/cdn/") and path[5:] in world["files"]:
            return self.content(world["files"][path[5:]])
        return self.answer(b"no", 404)

    def entry(self, world, name):
        content = world["files"][name]
        lfs = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return {"type": "file", "path": name, "size": len(content), "oid": "0" * 40} | ({"lfs": lfs} if world["lfs"] else {})

    def content(self, content):
        world = self.server.world
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        content = content.replace(b"PAR1", b"XXXX") if world["corrupt"] else content
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        stop = start + world["drop"] if world["drop"] else len(content)
        self.wfile.write(content[start:stop])

    def answer(self, body, status=200, **headers):
        self.send_response(status)
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def world(monkeypatch, tmp_path):
    """A hub with the parquet files of one repository, and this machine's cache in a place of its own."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    url = f"http://127.0.0.1:{server.server_port}"
    server.world = {"url": url, "commit": "c" * 40, "files": {}, "requests": [], "drop": 0, "corrupt": False, "lfs": True}
    cached = assets.cache_dir()
    (tmp_path / "cache").mkdir()
    for name in (assets.GPT2_ENCODER.filename,):
        if (cached / name).exists():
            (tmp_path / "cache" / name).symlink_to(cached / name)
    monkeypatch.setenv("NANOGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(hub.time, "sleep", lambda seconds: None)
    samples = ((10**10, "sample/10BT"), (0, "data"))
    monkeypatch.setitem(hub.CORPORA, "openwebtext", hub.Repository("o/r", "c" * 40, ((0, "plain_text"),), 60))
    monkeypatch.setitem(hub.CORPORA, "fineweb", hub.Repository("o/r", "c" * 40, samples))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.world
    server.shutdown()
    server.server_close()


def parquet(texts):
    write_parquet("x.parquet", texts)
    return Path("x.parquet").read_bytes()


def test_openwebtext_from_the_hub(gpt2, world, tmp_path, capsys, monkeypatch):
    """Three files in two pages; nanoGPT's validation documents; no download is left; the second time is no work."""
    monkeypatch.setattr(splitting, "SEED", 5)
    texts = documents(60, 3)
    for i in range(3):
        world["files"][f"plain_text/train-0000{i}-of-00003.parquet"] = parquet(texts[20 * i : 20 * i + 20])
    world["files"]["plain_text/README.md"] = b"no parquet"
    assert run("prepare", "openwebtext") == 0
    assert "instead of" not in capsys.readouterr().out
    path = Path("data/openwebtext")
    want = expected(texts, gpt2, splitting.NanoGPTDraw(60, 0.0005))
    assert {split: tokens(path, split).tolist() for split in want} == want
    assert want["val"] == [*gpt2.encode_array(texts[np.random.default_rng(5).permutation(60)[0]]).tolist(), 50256]
    sidecar = json.loads((path / SIDECAR).read_text())
    assert (sidecar["revision"], sidecar["split"]) == ("c" * 40, "nanogpt")
    assert not (tmp_path / "cache/hub").exists()
    assert all(re.fullmatch(r"(train|val)_000000\.bin|dataset\.json|tokenizer\.json", file.name) for file in path.iterdir())
    downloads = [request for request, _ in world["requests"] if request.startswith("/cdn/")]
    assert downloads == [f"/cdn/plain_text/train-0000{i}-of-00003.parquet" for i in range(3)]
    world["requests"].clear()
    assert run("prepare", "openwebtext") == 0
    assert "already prepared" in capsys.readouterr().out
    assert not world["requests"]
    world["files"].popitem()
    del world["files"]["plain_text/train-00002-of-00003.parquet"]
    assert run("prepare", "openwebtext", "--out=shorter") == 0
    assert "40 documents instead of 60: the split is not nanoGPT's" in capsys.readouterr().out


def test_fineweb_by_tokens_and_revision(gpt2, world, tmp_path):
    texts = documents(60, 4)
    world["files"] = {"sample/10BT/000.parquet": parquet(texts[:30]), "sample/10BT/001.parquet": parquet(texts[30:])}
    world["files"]["data/x/000.parquet"] = parquet(texts[:3])
    counts = [len(gpt2.encode_array(text)) + 1 for text in texts]
    half = sum(counts[:30])
    options = ("--val_fraction=0.2", "--keep_downloads")
    path = made("fineweb", f"--tokens={half + 10}", "--revision=v1.4.0", *options)
    want = half + np.cumsum(counts[30:])[np.argmax(np.cumsum(counts[30:]) >= 10)]
    assert sum(open_dataset(path).count(split) for split in ("train", "val")) == want
    assert ("/api/datasets/o/r/revision/v1.4.0", None) in world["requests"]
    assert len(list((tmp_path / "cache/hub").glob("*.parquet"))) == 2
    world["requests"].clear()
    again = made("fineweb", f"--tokens={half + 10}", "--out=again", "--val_fraction=0.2")
    assert shards_of(again) == shards_of(path)
    assert not [request for request, _ in world["requests"] if request.startswith("/cdn/")]
    assert len(list((tmp_path / "cache/hub").iterdir())) == 2  # one that keeps none leaves what others kept
    more = made("fineweb", "--out=more", "--val_fraction=0.4", "--tokens=11B")
    assert sum(open_dataset(more).count(split) for split in ("train", "val")) == sum(counts[:3])


def test_downloads_go_on_where_the_connection_broke(gpt2, world):
    texts = documents(2000, 5)
    content = world["files"]["plain_text/a.parquet"] = parquet(texts)
    world["drop"] = len(content) // 3
    path = made("openwebtext", "--val_fraction=0.1")
    assert tokens(path, "train").tolist() == expected(texts, gpt2, splitting.Draw(0.1))["train"]
    ranges = [header for request, header in world["requests"] if request.startswith("/cdn/")]
    third = len(content) // 3
    assert ranges == [None, f"bytes={third}-", f"bytes={2 * third}-", *[f"bytes={3 * third}-"][: len(content) % 3]]


def test_a_killed_preparation_downloads_no_finished_file_again(gpt2, world, monkeypatch):
    texts = documents(90, 6)
    for i in range(3):
        world["files"][f"plain_text/{i}.parquet"] = parquet(texts[30 * i : 30 * i + 30])
    monkeypatch.setattr(prepare, "SAVE_SECONDS", 0)
    put = prepare._put

    def broken(encoded, writers, draw, documents, left):
        if documents >= 30:
            raise OSError("broken")
        return put(encoded, writers, draw, documents, left)

    monkeypatch.setattr(prepare, "_put", broken)
    options = ("prepare", "openwebtext", "--val_fraction=0.1", "--workers=1")
    assert run(*options) == 2
    monkeypatch.setattr(prepare, "_put", put)
    world["requests"].clear()
    assert run(*options) == 0
    assert not [request for request, _ in world["requests"] if request == "/cdn/plain_text/0.parquet"]
    want = expected(texts, gpt2, splitting.Draw(0.1))
    assert {split: tokens(Path("data/openwebtext"), split).tolist() for split in want} == want


def test_preparations_side_by_side_have_each_their_downloads(gpt2, world, monkeypatch):
    """One starts and ends while the other reads its first file and has the next one there."""
    texts = documents(90, 6)
    for i in range(3):
        world["files"][f"plain_text/{i}.parquet"] = parquet(texts[30 * i : 30 * i + 30])
    put, options = prepare._put, ("--val_fraction=0.1", "--workers=1")

    def interrupted(*arguments):
        monkeypatch.setattr(prepare, "_put", put)
        while not Path(
            ".one.partial/downloads", hashlib.sha256(world["files"]["plain_text/1.parquet"]).hexdigest() + ".parquet"
        ).exists():
            time.sleep(0.01)
        made("openwebtext", "--out=two", *options)
        return put(*arguments)

    monkeypatch.setattr(prepare, "_put", interrupted)
    one = contents(made("openwebtext", "--out=one", *options))
    assert one == contents("two")
    assert tokens(Path("one"), "train").tolist() == expected(texts, gpt2, splitting.Draw(0.1))["train"]
    assert not list(Path().glob(".*.partial"))


def test_downloads_of_a_preparation_that_ended_late_are_no_part_of_the_result(gpt2, world, monkeypatch):
    """It had written all tokens, and not yet what tells of them."""
    world["files"]["plain_text/a.parquet"] = parquet(documents(60))
    finish = prepare.SplitWriter.finish

    def broken(writer):
        raise OSError("broken")

    Path("a.jsonl").write_bytes(jsonl(documents(60)))
    for name in ("openwebtext", "a.jsonl"):  # the same text, or another in its place
        monkeypatch.setattr(prepare.SplitWriter, "finish", broken)
        with pytest.raises(OSError, match="broken"):
            made("openwebtext", "--val_fraction=0.1", f"--out=of-{name}")
        assert list(Path(f".of-{name}.partial/downloads").iterdir())
        monkeypatch.setattr(prepare.SplitWriter, "finish", finish)
        names = {file.name for file in made(name, "--val_fraction=0.1", f"--out=of-{name}").iterdir()}
        assert names == {"train_000000.bin", "val_000000.bin", "tokenizer.json", SIDECAR}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"corrupt": True}, "sha256 "),
        ({"lfs": False}, "the hub declares no sha256 of plain_text/a.parquet"),
        ({"files": {}}, "no parquet file in plain_text"),
        ({"commit": "d" * 40}, "404"),
    ],
    ids=["corrupt", "no sum", "no file", "no commit"],
)
def test_r24_downloads_are_verified(change, message, world, capsys, tmp_path):
    world["files"]["plain_text/a.parquet"] = parquet(documents(20))
    world |= change
    assert run("prepare", "openwebtext") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path("data/openwebtext").exists()
    assert not list(Path("data").rglob("*.part")) + list(Path("data").rglob("*.parquet"))
    assert not (tmp_path / "cache/hub").exists()


def test_r24_a_name_of_the_hub_s_is_no_path_of_ours(gpt2, world, tmp_path):
    world["files"]["plain_text/../../../evil.parquet"] = parquet(documents(20))
    path = made("openwebtext", "--val_fraction=0.2", "--keep_downloads")
    assert path.exists()
    (kept,) = (tmp_path / "cache/hub").iterdir()
    assert re.fullmatch(r"[0-9a-f]{64}\.parquet", kept.name)
    assert not list(tmp_path.rglob("evil*"))


def test_without_a_network_one_line(monkeypatch, capsys):
    with socket.socket() as silent:  # takes the port and no connection
        silent.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("HF_ENDPOINT", url)
        monkeypatch.setenv("no_proxy", "*")
        assert run("prepare", "fineweb", "--tokens=10B") == 2
    error = capsys.readouterr().err
    assert f"{url}/api/datasets/HuggingFaceFW/fineweb/tree/9bb295dd" in error
    assert "sample/10BT" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("option", ["--split=tail", "--tokenizer=char"])
def test_the_hub_s_text_is_read_once(option, world, capsys):
    world["files"]["plain_text/a.parquet"] = parquet(documents(20))
    assert run("prepare", "openwebtext", option) == 2
    assert option.removeprefix("--") in capsys.readouterr().err


def test_samples_of_fineweb(capsys):
    corpus = hub.CORPORA["fineweb"]
    limits = (1, 10**10, 10**10 + 1, 10**11, 35 * 10**10, 10**12)
    folders = ["sample/10BT", "sample/10BT", "sample/100BT", "sample/100BT", "sample/350BT", "data"]
    assert [corpus.folder(n) for n in limits] == folders
    assert hub.CORPORA["openwebtext"].folder(0) == hub.CORPORA["openwebtext"].folder(5) == "plain_text"
    assert run("prepare", "fineweb") == 2
    assert "say how many tokens are wanted" in capsys.readouterr().err


# Byte pairs of one's own


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    pytest.importorskip("tokenizers", reason="the extra `data` is not installed")
    return tokenizer.BPETokenizer.train(documents(400), 320)


def test_bpe_equals_hugging_face(trained):
    from tokenizers import Tokenizer

    peer = Tokenizer.from_str(json.dumps(trained.to_json()))
    for text in (*documents(50, 9), "aaaaaaa  \n\n aaaa", "ababab the the东京 <|endoftext|> x", "\U0001f600"):
        assert trained.encode(text) == peer.encode(text).ids
        assert trained.decode(trained.encode(text)) == text
    peer.encode_special_tokens = True
    assert trained.encode_array("a<|endoftext|>b").tolist() == peer.encode("a<|endoftext|>b").ids
    assert trained.eot == trained.encode("<|endoftext|>")[0] == 0
    assert trained.vocab_size == peer.get_vocab_size() == 320
    assert trained.decode_bytes(trained.encode("é")[:1]) in (b"\xc3", "é".encode())


def test_bpe_learns_the_same_twice(trained):
    assert tokenizer.BPETokenizer.train(documents(400), 320).to_json() == trained.to_json()


def test_bpe_of_another_kind(trained, tmp_path):
    good = trained.to_json()
    reordered = good["model"] | {"merges": good["model"]["merges"][::-1]}
    gap = good["model"] | {"vocab": {piece: i + (i > 300) for piece, i in good["model"]["vocab"].items()}}
    for change in (
        {"model": reordered},
        {"model": gap},
        {"model": {}},
        {"model": good["model"] | {"type": "Unigram"}},
        {"decoder": None},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": good["pre_tokenizer"] | {"add_prefix_space": True}},
        {"normalizer": {"type": "NFC"}},
    ):
        (tmp_path / "tokenizer.json").write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=r"tokenizer\.json: (not a byte-level BPE|its tokens)"):
            tokenizer.load(tmp_path)


def test_bpe_needs_its_library(monkeypatch, capsys):
    Path("a.jsonl").write_bytes(jsonl(documents(9)))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert run("prepare", "a.jsonl", "--tokenizer=train:300") == 2
    assert "pip install tokenizers\n" in capsys.readouterr().err


def test_bpe_from_text_to_samples(capsys, tmp_path):
    """Learned from the corpus, saved beside the data, taken by the trainer, the sampler and the export; used again by name."""
    tokenizers = pytest.importorskip("tokenizers", reason="the extra `data` is not installed")
    texts = documents(300)
    Path("a.jsonl").write_bytes(jsonl(texts))
    path = made("a.jsonl", "--tokenizer=train:300", "--val_fraction=0.1")
    encoder = tokenizer.load(path)
    want = expected(texts, encoder, splitting.Draw(0.1))
    assert {split: tokens(path, split).tolist() for split in want} == want
    assert encoder.decode(tokens(path, "train").tolist()).count("<|endoftext|>") > 250
    assert (open_dataset(path).vocab_size, open_dataset(path).shards("train")[0].dtype) == (300, np.uint16)
    again = made("a.jsonl", f"--tokenizer={path / 'tokenizer.json'}", "--val_fraction=0.1", "--out=again")
    assert shards_of(again) == shards_of(path)
    tiny = ["--device=cpu", "--n_layer=1", "--n_head=1", "--n_embd=8", "--block_size=8", "--batch_size=2", "--max_iters=2"]
    tiny += ["--gradient_accumulation_steps=1", "--eval_interval=2", "--eval_iters=1", "--decay_lr=False"]
    train.main(load(TrainConfig, [f"--dataset={path}", "--out_dir=out", *tiny]))
    assert tokenizer.load(Path("out")).to_json() == encoder.to_json()
    capsys.readouterr()
    options = ["--out_dir=out", "--start=kings speak", "--num_samples=1", "--max_new_tokens=20", "--device=cpu"]
    sample.main(options)
    assert capsys.readouterr().out.startswith("kings speak")
    export.export("out", "hf", False)
    peer = tokenizers.Tokenizer.from_file("hf/tokenizer.json")
    assert [peer.encode(text).ids for text in texts] == [encoder.encode(text) for text in texts]


def test_uint32_shards_for_a_vocabulary_beyond_65536(trained):
    """All pairs of bytes are tokens."""
    pieces = sorted(tokenizer.BYTE_OF, key=tokenizer.BYTE_OF.get, reverse=True)  # so that a pair of zeros is the last token
    merges = list(itertools.product(pieces, pieces))
    vocab = {"<|endoftext|>": 0} | {piece: 1 + i for i, piece in enumerate([*pieces, *("".join(m) for m in merges)])}
    content = trained.to_json() | {"model": trained.to_json()["model"] | {"vocab": vocab, "merges": merges}}
    Path("big.json").write_text(json.dumps(content))
    text = " abc" * 50 + "ÿé\0\0"
    Path("a.jsonl").write_bytes(jsonl([text] * 9))
    path = made("a.jsonl", "--tokenizer=big.json", "--val_fraction=0.3")
    shard = open_dataset(path).shards("train")[0]
    assert (shard.dtype, open_dataset(path).vocab_size) == (np.uint32, 65_793)
    assert int(shard.tokens.max()) > 65_535
    assert tokenizer.load(path).decode(shard.tokens.tolist()).split("<|endoftext|>")[0] == text
    assert not list(check.problems(path))
