"""Characters and GPT-2's byte pairs; saving, finding, copying; nanoGPT's meta.pkl, hostile ones included."""

import itertools
import json
import os
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt import tokenizer
from nanogpt.data import assets
from nanogpt.data.meta import read_meta
from nanogpt.data.shards import write_shard
from nanogpt.tokenizer import CharTokenizer, GPT2Tokenizer


@given(st.text(min_size=1))
@settings(max_examples=50, deadline=None)
def test_char_roundtrip(text):
    encoder = CharTokenizer.of(text)
    ids = encoder.encode(text)
    assert encoder.decode(ids) == text
    assert encoder.decode_bytes(ids) == text.encode()
    assert encoder.vocab_size == len(set(text)) == max(ids) + 1
    assert encoder.eot is None


def test_char_table_is_in_code_point_order():
    assert CharTokenizer.of("hello\n").characters == "\nehlo"


@pytest.mark.parametrize(("text", "place"), [("abx", 2), ("é", 0), ("a𝄞", 1)])
def test_char_names_an_unknown_character(text, place):
    with pytest.raises(ValueError, match=rf"{text[place]}' at {place} "):
        CharTokenizer.of("ab").encode(text)


def test_char_table_without_repeats():
    with pytest.raises(ValueError, match="names one twice"):
        CharTokenizer("aba")


def test_gpt2_known_tokens(gpt2):
    # Published examples of GPT-2's encoding.
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.encode("hello  world<|endoftext|>") == [31373, 220, 995, 50256]
    assert gpt2.eot == 50256
    assert gpt2.vocab_size == 50257


def test_gpt2_end_of_text_in_data_is_plain_text(gpt2):
    assert 50256 not in gpt2.encode_array("a<|endoftext|>b").tolist()
    assert gpt2.decode(gpt2.encode_array("a<|endoftext|>b").tolist()) == "a<|endoftext|>b"


def test_gpt2_equals_transformers(gpt2, tmp_path):
    """Against an implementation that shares no code: Hugging Face's, given the vocabulary and the merges in its order."""
    transformers = pytest.importorskip("transformers")
    table = json.loads(assets.fetch(assets.GPT2_ENCODER).read_bytes())
    merges = _merges(table)
    peer = transformers.GPT2Tokenizer(vocab=table, merges=merges)
    text = "We'll see: it's 12.5% of the naïve  café\n\n\t'Tis — 東京 \U0001f600 <x> don't  "
    assert gpt2.encode(text) == peer.encode(text)
    assert gpt2.decode(gpt2.encode(text)) == text


def _merges(table: dict[str, int]) -> list[tuple[str, str]]:
    """The pair that made each piece, found by merging with the earlier pieces only."""
    merges = []
    for piece, rank in sorted(table.items(), key=lambda item: item[1])[256:]:
        if piece == tokenizer.EOT_TEXT:
            continue
        parts = list(piece)
        while len(parts) > 2:
            ranks = [table.get(a + b, rank) for a, b in itertools.pairwise(parts)]
            i = ranks.index(min(ranks))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        merges.append((parts[0], parts[1]))
    return merges


@pytest.mark.parametrize("made", [CharTokenizer.of("añ\n 𝄞"), GPT2Tokenizer()], ids=["char", "gpt2"])
def test_save_load_and_beside(made, tmp_path):
    data, checkpoint = tmp_path / "data", tmp_path / "out" / "step-7"
    data.mkdir()
    checkpoint.mkdir(parents=True)
    tokenizer.save(made, data)
    assert tokenizer.save_beside(data, checkpoint) == checkpoint / "tokenizer.json"
    assert os.listdir(checkpoint) == ["tokenizer.json"]
    found = tokenizer.load(checkpoint)
    assert type(found) is type(made)
    assert found.to_json() == made.to_json()
    assert json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))["vocab_size"] == made.vocab_size


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "offset 1"), ("[]", "not a JSON object"), ('{"kind": "bpe"}', "kind 'bpe'"), ('{"kind": "char"}', "kind 'char'")],
)
def test_load_names_a_bad_file(tmp_path, content, message):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=rf"tokenizer\.json.*{message}"):
        tokenizer.load(tmp_path)


def test_load_without_any(tmp_path):
    assert tokenizer.load(tmp_path) is None
    assert tokenizer.save_beside(tmp_path, tmp_path) is None
    write_shard(tmp_path / "fineweb_train_000001.bin", np.arange(9, dtype=np.uint16))
    assert isinstance(tokenizer.load(tmp_path), GPT2Tokenizer)


META = {"vocab_size": 3, "itos": {0: "\n", 1: "a", 2: "é"}, "stoi": {"\n": 0, "a": 1, "é": 2}}


@pytest.mark.parametrize("protocol", range(1, pickle.HIGHEST_PROTOCOL + 1))
def test_meta_pkl(tmp_path, protocol):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(META, protocol))
    assert read_meta(tmp_path / "meta.pkl") == META
    assert tokenizer.load(tmp_path).characters == "\naé"


def test_meta_pkl_of_many_characters(tmp_path):
    """More than 256 memoized objects and items in more than one batch."""
    characters = [chr(300 + i) for i in range(3000)]
    meta = {"vocab_size": 3000, "itos": dict(enumerate(characters)), "stoi": {c: i for i, c in enumerate(characters)}}
    for protocol in (2, 4):
        (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta, protocol))
        assert read_meta(tmp_path / "meta.pkl") == meta


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("protocol", [1, 2, 4])
def test_hostile_meta_pkl_runs_nothing(tmp_path, protocol):
    victim = tmp_path / "written"
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(META | {"extra": Hostile(victim)}, protocol))
    with pytest.raises(ValueError, match=r"meta\.pkl: offset \d+: opcode \w*GLOBAL"):
        read_meta(tmp_path / "meta.pkl")
    assert not victim.exists()
    pickle.loads((tmp_path / "meta.pkl").read_bytes())["extra"].close()  # the file would have been written
    assert victim.exists()


@pytest.mark.parametrize(
    "meta",
    [
        {},
        [1],
        META | {"vocab_size": "3"},
        META | {"vocab_size": 4},
        META | {"itos": {0: "a", 1: "b", 5: "c"}},
        META | {"itos": ["a"]},
        META | {"stoi": {"a": "b"}},
    ],
    ids=repr,
)
def test_meta_pkl_of_another_kind(tmp_path, meta):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    with pytest.raises(ValueError, match=r"meta\.pkl: "):
        read_meta(tmp_path / "meta.pkl")


@given(st.binary(max_size=60), st.integers(0, 200), st.integers(0, 255))
@settings(max_examples=300, deadline=None)
def test_damaged_meta_pkl_is_refused_or_read(tmp_path_factory, junk, at, value):
    """No input makes the reader fail otherwise than by ValueError."""
    path = tmp_path_factory.getbasetemp() / "meta.pkl"
    whole = bytearray(pickle.dumps(META, 4))
    whole[at % len(whole)] = value
    for content in (bytes(whole), junk, bytes(whole[:at])):
        path.write_bytes(content)
        try:
            message = str(read_meta(path) and path)
        except ValueError as error:
            message = str(error)
        assert str(path) in message


def own(merges, vocabulary=None, added=(), **model):
    """Hugging Face's form: the bytes, what the merges make, and the added tokens."""
    pieces = [*sorted(tokenizer.BYTE_OF), *(left + right for left, right in merges)]
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    vocabulary = {piece: i for i, piece in enumerate([*pieces, *(vocabulary or ())])}
    added = [{"id": len(vocabulary), "content": "<|endoftext|>"} | flags for flags in added]
    model = {"type": "BPE", "vocab": vocabulary, "merges": [list(pair) for pair in merges]} | model
    return {"added_tokens": added, "normalizer": None, "pre_tokenizer": level, "decoder": level, "model": model}


MERGES = [("a", "b"), ("ab", "c"), ("b", "c"), ("ab", "ab"), ("\u0120", "ab")]


@given(st.text("abc ", max_size=30))
@settings(max_examples=60, deadline=None)
def test_a_tokenizer_from_elsewhere_equals_that_of_hugging_face(text):
    tokenizers = pytest.importorskip("tokenizers")
    content = own(MERGES, added=[{"special": True, "normalized": False}], dropout=None, ignore_merges=False)
    peer = tokenizers.Tokenizer.from_str(json.dumps(complete(content)))
    assert tokenizer.BPETokenizer(content).encode(text + "<|endoftext|>ab") == peer.encode(text + "<|endoftext|>ab").ids


def complete(content):
    """With the keys that `tokenizers` requires."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    added = [flags | token for token in content["added_tokens"]]
    level = content["pre_tokenizer"] | {"trim_offsets": True}
    return content | {"version": "1.0", "added_tokens": added, "pre_tokenizer": level, "decoder": level}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (own(MERGES, ["cab"]), "not a byte-level BPE over GPT-2's pattern"),  # no merge makes it: theirs never gives it
        (own(MERGES, ["cab"], ignore_merges=True), "not a byte-level BPE|model.ignore_merges is set"),
        (own(MERGES, ignore_merges=True), "model.ignore_merges is set"),
        (own(MERGES, dropout=0.1), "model.dropout is set"),
        (own(MERGES, continuing_subword_prefix="##"), "model.continuing_subword_prefix is set"),
        (own(MERGES, end_of_word_suffix="</w>"), "model.end_of_word_suffix is set"),
        (own(MERGES, added=[{"lstrip": True}]), "added_tokens.lstrip is set"),
        (own([("a", "b"), ("b", "c"), ("a", "bc")]), "the merges do not make 'abc' from its own bytes"),
    ],
    ids=["made by none", "ignored", "ignore_merges", "dropout", "prefix", "suffix", "lstrip", "not reached"],
)
def test_a_tokenizer_that_would_give_other_tokens_than_hugging_face_is_refused(content, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.BPETokenizer(content)
