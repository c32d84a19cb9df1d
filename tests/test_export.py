"""nanogpt.export: what it writes, loaded by `transformers`, is the same function and the same tokens; and back."""

import errno
import json
import os
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from nanogpt import checkpoint, export, pretrained, tokenizer
from nanogpt.config import GPTConfig
from nanogpt.data import assets
from nanogpt.generate import generate
from nanogpt.model import GPT
from nanogpt.tokenizer import BPETokenizer, CharTokenizer, GPT2Tokenizer
from tests.test_model import spread
from tests.test_pretrained import ARGUMENTS, SIZES, assert_same_model, odd, plain, random_gpt2, write_ckpt  # noqa: F401

CHARACTERS = "\n !',abcdefghijklmnoprstuvwxyzABCéß𝄞\"\\"
SHAPE = {"block_size": 16, "vocab_size": len(CHARACTERS), "n_layer": 2, "n_head": 3, "n_embd": 15}


@pytest.fixture(scope="session")
def gpt2():
    try:
        assets.fetch(assets.GPT2_MERGES)
        assets.fetch(assets.GPT2_ENCODER)
    except ValueError as error:
        pytest.skip(f"GPT-2's table is neither cached nor reachable: {error}")
    return GPT2Tokenizer()


def saved(out_dir, encoder=None, step=3, **shape):
    """A run's directory with a checkpoint of a random model; the model."""
    model = spread(GPT(GPTConfig(**SHAPE | shape), torch.float32)).cpu()
    state = {"iter": step, "val_loss": 1.0, "model": asdict(model.config), "config": {}}
    checkpoint.save(out_dir, step, checkpoint.model_tensors(model), {}, state)
    if encoder:
        tokenizer.save(encoder, out_dir)
    return model


def run(capsys, *options):
    """(exit code, stdout, stderr) of the command."""
    try:
        export.main([str(option) for option in options])
        code = 0
    except SystemExit as stopped:
        code = stopped.code
    return code, *capsys.readouterr()


def from_transformers(path):
    """The model as AutoModelForCausalLM loads it, with no key missing or too many."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize("gelu", ["erf", "tanh"])
@pytest.mark.parametrize("bias", [False, True], ids=["nobias", "bias"])
def test_transformers_computes_the_same_from_an_export_and_so_do_we(bias, gelu, tmp_path, capsys):
    model = saved(tmp_path / "out", CharTokenizer(CHARACTERS), bias=bias, gelu=gelu, dropout=0.125)
    code, out, err = run(capsys, f"--out_dir={tmp_path / 'out'}", f"--to={tmp_path / 'hf'}")
    assert (code, out, err) == (0, f"{tmp_path / 'hf'}: written\n", "")
    theirs = from_transformers(tmp_path / "hf")
    assert theirs.config.resid_pdrop == theirs.config.attn_pdrop == theirs.config.embd_pdrop == 0.125
    assert theirs.config.eos_token_id is None
    assert_same_model(model, theirs, len(CHARACTERS))
    back, encoder = pretrained.load_model(tmp_path / "hf", "cpu", torch.float32)
    assert encoder.characters == CHARACTERS
    assert_same_model(back, theirs, len(CHARACTERS))
    for name, t in checkpoint.model_tensors(model).items():
        assert torch.equal(checkpoint.model_tensors(back)[name], t)


@pytest.mark.parametrize("real", [50257, 0], ids=["padded", "nanogpts"])
def test_the_padding_of_the_vocabulary_is_cut_off(real, gpt2, tmp_path):
    if real:
        model = saved(tmp_path / "out", gpt2, vocab_size=50304, real_vocab_size=real, gelu="tanh")
    else:
        model, _ = plain(vocab_size=50304)
        write_ckpt(tmp_path / "out" / "ckpt.pt", model, arguments={"vocab_size": 50304})
    export.export(tmp_path / "out", tmp_path / "hf")
    theirs = from_transformers(tmp_path / "hf")
    assert theirs.config.vocab_size == theirs.transformer.wte.weight.shape[0] == 50257
    if real:
        assert_same_model(model, theirs, 50257)
    assert (theirs.generation_config.eos_token_id, theirs.config.bos_token_id) == (50256, 50256)


def test_there_and_back_is_the_same_file(odd, tmp_path):  # noqa: F811
    path, _ = odd
    export.export(path, tmp_path / "again")
    assert_same_tensors(load_file(path / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors"))
    assert_same_model(pretrained.load(path).model("cpu", torch.float32), from_transformers(tmp_path / "again"), 61)
    before, after = (json.loads((p / "config.json").read_text()) for p in (path, tmp_path / "again"))
    for key in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "activation_function", "layer_norm_epsilon"):
        assert before[key] == after[key], key


def assert_same_tensors(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(t, other[name]) for name, t in one.items())


def test_a_ckpt_of_nanogpts_is_converted(tmp_path):
    model, _ = plain(bias=False)
    path = write_ckpt(tmp_path / "ckpt.pt", model, prefix="_orig_mod.", arguments={"bias": False})
    _, encoder, reason = export.export(path, tmp_path / "hf")
    assert encoder is None
    assert reason
    theirs = from_transformers(tmp_path / "hf")
    assert_same_model(pretrained.load(path).model("cpu", torch.float32), theirs, ARGUMENTS["vocab_size"])


TEXTS = ["Hello  world\n\nI'll don't 123 é𝄞 ÿ", "", " ", "a\tb\r\n", "naïve café — ok", "x" * 50]


def test_gpt2s_tokenizer_for_transformers(gpt2, tmp_path):
    saved(tmp_path / "out", gpt2, vocab_size=50304, real_vocab_size=50257)
    export.export(tmp_path / "out", tmp_path / "hf")
    assert {path.name for path in (tmp_path / "hf").iterdir()} == export.FILES
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (len(peer), peer.eos_token, peer.eos_token_id, peer.model_max_length) == (50257, "<|endoftext|>", 50256, 16)
    for text in [*TEXTS, "end<|endoftext|>begin"]:
        assert peer.encode(text) == gpt2.encode(text), text
        assert peer.decode(gpt2.encode(text)) == text
    (tmp_path / "hf" / "tokenizer.json").unlink()  # the two old files alone
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "hf").encode(TEXTS[0]) == gpt2.encode(TEXTS[0])
    assert isinstance(pretrained.find_tokenizer(pretrained.load(tmp_path / "hf")), GPT2Tokenizer)


def test_gpt2s_tokenizer_is_known_again(gpt2, tmp_path):
    saved(tmp_path / "out", gpt2, vocab_size=50304, real_vocab_size=50257)
    export.export(tmp_path / "out", tmp_path / "hf")
    assert isinstance(pretrained.find_tokenizer(pretrained.load(tmp_path / "hf")), GPT2Tokenizer)
    content = json.loads((tmp_path / "hf" / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["Hello"], vocabulary["world"] = vocabulary["world"], vocabulary["Hello"]
    (tmp_path / "hf" / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"tokenizer\.json: "):
        pretrained.find_tokenizer(pretrained.load(tmp_path / "hf"))


def test_a_tokenizer_of_characters_for_transformers(tmp_path):
    encoder = CharTokenizer(CHARACTERS)
    saved(tmp_path / "out", encoder)
    export.export(tmp_path / "out", tmp_path / "hf")
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert len(peer) == len(CHARACTERS)
    for text in (CHARACTERS, "a cab!\n\n'é, 𝄞\"", " ab  c ", "\\n"):
        assert peer.encode(text) == encoder.encode(text)
        assert peer.decode(encoder.encode(text)) == text
    assert peer.encode("a7b") == encoder.encode("ab")  # unknown ones are left out, where ours refuses


def test_a_tokenizer_of_ones_own_for_transformers(tmp_path):
    text = "".join(f"{a}{b} {b}{a}\n" for a in "abcdef" for b in "ghéjk") * 3
    encoder = BPETokenizer.train([text], 300)
    assert encoder.vocab_size > 260
    saved(tmp_path / "out", encoder, vocab_size=encoder.vocab_size)
    export.export(tmp_path / "out", tmp_path / "hf")
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert peer.eos_token_id == encoder.eot == from_transformers(tmp_path / "hf").config.eos_token_id
    back = pretrained.find_tokenizer(pretrained.load(tmp_path / "hf"))
    for sample in [*TEXTS, text[:50], "ag<|endoftext|>bh"]:
        assert peer.encode(sample) == encoder.encode(sample) == back.encode(sample), sample
        assert peer.decode(encoder.encode(sample)) == sample


def test_the_pipeline_of_transformers_writes_what_we_write(tmp_path):
    encoder = CharTokenizer(CHARACTERS)
    model = saved(tmp_path / "out", encoder)
    export.export(tmp_path / "out", tmp_path / "hf")
    pipe = transformers.pipeline("text-generation", str(tmp_path / "hf"), device="cpu")
    (found,) = pipe("cab", do_sample=False, max_new_tokens=9)
    ours = generate(model, torch.tensor([encoder.encode("cab")]), 9, temperature=0)[0]
    assert found["generated_text"] == encoder.decode(ours.tolist())


def test_a_model_without_a_tokenizer_is_written_with_a_note(tmp_path, capsys):
    saved(tmp_path / "out")
    code, out, _ = run(capsys, f"--out_dir={tmp_path / 'out'}", f"--to={tmp_path / 'hf'}")
    assert code == 0
    assert re.fullmatch(r".*hf: written, without a tokenizer: .*out: no tokenizer.json beside it, and .*\n", out)
    assert {path.name for path in (tmp_path / "hf").iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
    from_transformers(tmp_path / "hf")


def test_an_earlier_export_is_replaced_only_if_told_and_nothing_else_ever(tmp_path, capsys):
    saved(tmp_path / "out", CharTokenizer(CHARACTERS))
    hf = tmp_path / "hf"
    options = [f"--out_dir={tmp_path / 'out'}", f"--to={hf}"]
    hf.mkdir()
    assert run(capsys, *options)[0] == 0  # an empty directory will do
    before = (hf / "model.safetensors").read_bytes()
    saved(tmp_path / "out", step=4)
    saved(tmp_path / "out", step=3)
    code, _, err = run(capsys, *options)
    assert (code, err) == (2, f"export: to={hf}: holds config.json already; --overwrite=True replaces an earlier export\n")
    assert (hf / "model.safetensors").read_bytes() == before
    assert run(capsys, *options, "--overwrite=True")[0] == 0
    assert (hf / "model.safetensors").read_bytes() != before
    (hf / "thesis.tex").write_text("years of work")
    code, _, err = run(capsys, *options, "--overwrite=True")
    assert (code, err) == (2, f"export: to={hf}: holds thesis.tex, which no export wrote; it is left as it is\n")
    assert (hf / "thesis.tex").read_text() == "years of work"
    code, _, err = run(capsys, options[0], f"--to={hf / 'thesis.tex'}")
    assert (code, err) == (2, f"export: to={hf / 'thesis.tex'}: is a file\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]


@pytest.mark.parametrize("at", ["save_file", "sync", "rename"])
def test_a_failure_leaves_nothing_behind_and_the_earlier_export_as_it_was(at, tmp_path, monkeypatch, capsys):
    saved(tmp_path / "out", CharTokenizer(CHARACTERS))
    options = [f"--out_dir={tmp_path / 'out'}", f"--to={tmp_path / 'hf'}", "--overwrite=True"]

    rename = Path.rename

    def full(*args, **keys):
        if at == "rename" and "partial" not in args[0].name:
            return rename(*args)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def broken(patch):
        patch.setattr(Path if at == "rename" else export, at, full)

    with monkeypatch.context() as patch:
        broken(patch)
        code, _, err = run(capsys, *options)
    assert (code, err) == (2, "export: [Errno 28] No space left on device\n")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert run(capsys, *options)[0] == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    with monkeypatch.context() as patch:
        broken(patch)
        assert run(capsys, *options)[0] == 2
    assert {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "to=: names the directory to make; --to=DIR"),
        (["--to=hf", "--out_dir=nowhere"], "nowhere: not found"),
        (["--tp=hf"], "unknown key --tp; did you mean --to?"),
    ],
)
def test_mistakes_are_answered_in_one_line(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(capsys, *options) == (2, "", f"export: {message}\n")
    assert not list(tmp_path.iterdir())


def test_what_comes_while_an_export_is_written_is_left_as_it_is(tmp_path, monkeypatch, capsys):
    saved(tmp_path / "out", CharTokenizer(CHARACTERS))
    save_file, hf = export.save_file, tmp_path / "hf"

    def meanwhile(*args, **keys):
        hf.mkdir()
        (hf / "thesis.tex").write_text("years of work")
        return save_file(*args, **keys)

    monkeypatch.setattr(export, "save_file", meanwhile)
    code, _, err = run(capsys, f"--out_dir={tmp_path / 'out'}", f"--to={hf}", "--overwrite=True")
    assert (code, err) == (2, f"export: to={hf}: holds thesis.tex, which no export wrote; it is left as it is\n")
    assert (hf / "thesis.tex").read_text() == "years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]


def test_a_tokenizer_of_more_tokens_than_the_model_is_refused(tmp_path, capsys):
    saved(tmp_path / "out", CharTokenizer(CHARACTERS + "ø"))
    code, _, err = run(capsys, f"--out_dir={tmp_path / 'out'}", f"--to={tmp_path / 'hf'}")
    count = len(CHARACTERS)
    assert (code, err) == (2, f"export: {tmp_path / 'out'}: a tokenizer of {count + 1} tokens for a model of {count}\n")
    assert not (tmp_path / "hf").exists()
