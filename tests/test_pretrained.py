"""nanogpt.pretrained: GPT-2's weights against `transformers`, nanoGPT's ckpt.pt as it writes it, and every way to go wrong."""

import hashlib
import json
import os
import pickle
import re
import shutil
import socket
import sys
from dataclasses import asdict

import huggingface_hub
import huggingface_hub.errors
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from nanogpt import checkpoint, evaluate, export, pretrained, sample, tokenizer, train
from nanogpt.config import GPT2_SIZES, GPTConfig, TrainConfig, load
from nanogpt.data import assets
from nanogpt.data.shards import open_dataset
from nanogpt.generate import generate
from nanogpt.model import GPT
from nanogpt.tokenizer import CharTokenizer, GPT2Tokenizer
from tests.runs import TINY, losses, start
from tests.test_model import all_logits

SIZES = {
    "odd": {"n_layer": 3, "n_head": 3, "n_embd": 39, "n_positions": 23, "vocab_size": 61},
    "one": {"n_layer": 1, "n_head": 1, "n_embd": 8, "n_positions": 9, "vocab_size": 11},
    "gpt2": {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32, "vocab_size": 50257},
}


transformers.utils.logging.disable_progress_bar()


def random_gpt2(activation_function="gelu_new", **sizes):
    """A GPT-2 of `transformers`, its parameters large enough that every part shows in the logits."""
    torch.manual_seed(1)
    config = transformers.GPT2Config(**sizes, activation_function=activation_function, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model


@pytest.fixture(params=SIZES, ids=list(SIZES))
def size(request):
    return SIZES[request.param]


@pytest.fixture
def odd(tmp_path):
    """A directory of Hugging Face's with the odd model, and the model."""
    model = random_gpt2(**SIZES["odd"])
    model.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf", model


def logits_of(model, idx):
    with torch.no_grad():
        return all_logits(model.eval(), idx) if isinstance(model, GPT) else model(idx).logits


def assert_same_model(ours, theirs, vocab_size):
    """Logits to 1e-4, the loss, and the tokens that both generate greedily."""
    T = min(9, ours.config.block_size)
    idx = torch.randint(vocab_size, (2, T))
    torch.testing.assert_close(logits_of(ours, idx)[..., :vocab_size], logits_of(theirs, idx), rtol=0, atol=1e-4)
    with torch.no_grad():
        expected = F.cross_entropy(theirs(idx).logits[:, :-1].flatten(0, 1), idx[:, 1:].flatten())
        assert ours(idx[:, :-1], idx[:, 1:].contiguous())[1].item() == pytest.approx(expected.item(), abs=1e-4)
    n = min(20, ours.config.block_size - 3)
    tokens = generate(ours, idx[:, :3], n, temperature=0, vocab_size=vocab_size)
    mask = torch.ones_like(idx[:, :3])
    assert torch.equal(tokens, theirs.generate(idx[:, :3], attention_mask=mask, do_sample=False, max_new_tokens=n,
                                               eos_token_id=None, pad_token_id=0))  # fmt: skip


@pytest.mark.parametrize("activation", ["gelu_new", "gelu"])
def test_a_model_of_transformers_has_the_same_logits_here(size, activation, tmp_path):
    theirs = random_gpt2(activation, **size)
    theirs.save_pretrained(tmp_path)
    weights = pretrained.load(tmp_path)
    assert weights.config.gelu == {"gelu_new": "tanh", "gelu": "erf"}[activation]
    assert weights.config.bias
    assert weights.vocab_size == size["vocab_size"]
    ours = weights.model("cpu", torch.float32)
    assert ours.lm_head.weight is ours.transformer.wte.weight
    assert_same_model(ours, theirs, size["vocab_size"])


def test_gpt2s_vocabulary_is_padded_and_its_padding_never_predicted(tmp_path):
    random_gpt2(**SIZES["gpt2"]).save_pretrained(tmp_path)
    model = pretrained.load(tmp_path).model("cpu", torch.float32)
    assert (model.config.vocab_size, model.config.real_vocab_size) == (50304, 50257)
    assert not model.transformer.wte.weight[50257:].any()
    idx = torch.randint(50257, (1, 8))
    _, loss = model(idx, idx)
    loss.backward()
    assert not model.transformer.wte.weight.grad[50257:].any()


def test_positions_can_be_dropped_and_dropout_is_the_runs_own(odd):
    path, theirs = odd
    model = pretrained.load(path).model("cpu", torch.float32, block_size=7, dropout=0.25)
    assert (model.config.block_size, model.config.dropout, model.transformer.h[0].attn.dropout) == (7, 0.25, 0.25)
    idx = torch.randint(61, (1, 7))
    torch.testing.assert_close(logits_of(model, idx), logits_of(theirs, idx), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match=r"block_size=24: expected 1..23"):
        pretrained.load(path).model("cpu", torch.float32, block_size=24)


@pytest.mark.parametrize("form", ["file", "sharded", "bare names, masks and a head", "float16"])
def test_the_forms_in_which_weights_are_stored(form, odd, tmp_path):
    path, theirs = odd
    tensors = load_file(path / "model.safetensors")
    source = path
    if form == "file":
        source = path / "model.safetensors"
    elif form == "sharded":
        theirs.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
        source = tmp_path / "sharded"
        assert not (source / "model.safetensors").exists()
        assert len(list(source.glob("*.safetensors"))) > 2
    elif form == "float16":
        theirs = theirs.half().float()
        save_file({name: t.half() for name, t in tensors.items()}, path / "model.safetensors")
    else:  # as on the hub
        tensors = {name.removeprefix("transformer."): t for name, t in tensors.items()}
        tensors |= {"h.0.attn.bias": torch.ones(1, 1, 23, 23), "h.0.attn.masked_bias": torch.tensor(-1e4)}
        save_file(tensors | {"lm_head.weight": tensors["wte.weight"].clone()}, path / "model.safetensors")
    model = pretrained.load(source).model("cpu", torch.float32)
    assert_same_model(model, theirs, 61)


def edited(path, **changes):
    content = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps({key: value for key, value in content.items() if value != "absent"}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_function": ["gelu"]}, r"activation_function=\['gelu'\]: expected one of gelu, gelu_new"),
        ({"activation_function": "relu"}, "activation_function='relu': expected one of gelu, gelu_new, gelu_pytorch_tanh"),
        ({"model_type": "llama"}, "model_type='llama': this network has 'gpt2'"),
        ({"model_type": "absent"}, "model_type=None: this network has 'gpt2'"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06: this network has 1e-05"),
        ({"n_inner": 17}, "n_inner=17: this network has 156"),
        ({"scale_attn_weights": False}, "scale_attn_weights=False: this network has True"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True: this network has False"),
        ({"add_cross_attention": True}, "add_cross_attention=True: this network has False"),
        ({"n_head": 4}, "n_embd=39: must be a multiple of n_head=4"),
        ({"n_layer": "3"}, "n_layer='3': expected an integer"),
        ({"n_layer": 4}, "tensor transformer.h.3.ln_1.weight is missing"),
        ({"n_layer": 2}, "tensor transformer.h.2.attn.c_attn.bias is none of GPT-2's"),
        ({"n_positions": 24}, r"tensor transformer.wpe.weight has shape \(23, 39\), expected \(24, 39\)"),
        ({"vocab_size": 62}, r"tensor transformer.wte.weight has shape \(61, 39\), expected \(62, 39\)"),
        ({"n_embd": 42}, r"tensor transformer.wte.weight has shape \(61, 39\), expected \(61, 42\)"),
    ],
)
def test_a_config_that_is_not_this_network_is_refused_by_key(changes, message, odd):
    path, _ = odd
    edited(path, **changes)
    with pytest.raises(ValueError, match=f"^{path}/(config.json|model.safetensors): {message}"):
        pretrained.load(path)


def untransposed(t):
    t["transformer.h.1.mlp.c_fc.weight"] = t["transformer.h.1.mlp.c_fc.weight"].t().contiguous()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (untransposed, r"tensor transformer.h.1.mlp.c_fc.weight has shape \(156, 39\), expected \(39, 156\)"),
        (lambda t: t.pop("transformer.ln_f.bias"), "tensor transformer.ln_f.bias is missing"),
        (lambda t: t.update(adapter=torch.ones(1)), "tensor transformer.adapter is none of GPT-2's"),
        (lambda t: t.update({"lm_head.weight": torch.ones(61, 39)}), "tensor lm_head.weight differs from transformer.wte"),
        (lambda t: t.update({"transformer.ln_f.bias": torch.ones(39).long()}), "tensor transformer.ln_f.bias has dtype"),
    ],
    ids=["untransposed", "missing", "unknown", "untied", "integers"],
)  # fmt: skip
def test_a_tensor_that_does_not_fit_is_named(change, message, odd):
    path, _ = odd
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(ValueError, match=f"^{path}/model.safetensors: {message}"):
        pretrained.load(path)


def test_what_is_no_model_is_refused(odd, tmp_path):
    path, _ = odd
    with pytest.raises(ValueError, match="nowhere: not found"):
        pretrained.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no checkpoint \(step-N\), no config.json and no ckpt.pt in it"):
        pretrained.load(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"")
    with pytest.raises(ValueError, match=r"model.gguf: expected a .safetensors or .pt file"):
        pretrained.load(tmp_path / "model.gguf")
    (path / "model.safetensors").write_bytes(b"no such thing")
    with pytest.raises(ValueError, match=r"model.safetensors: .*header"):
        pretrained.load(path)
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"neither model.safetensors nor .* it has pytorch_model.bin, which is a pickle"):
        pretrained.load(path)
    for text, message in (("{", "Expecting"), ("[]", "not a JSON object"), ("[" * 100_000, "recursion")):
        (path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=f"config.json: .*{message}"):
            pretrained.load(path)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/model.safetensors", "sub/model.safetensors", "model.bin", 3])
def test_an_index_names_files_of_its_own_directory_only(name, odd):
    path, _ = odd
    (path / "model.safetensors").rename(path.parent / "model.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"transformer.wte.weight": name}}))
    with pytest.raises(ValueError, match=f"{re.escape(repr(name))} is not the plain name of a safetensors file"):
        pretrained.load(path)
    (path / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(ValueError, match="no weight_map in it"):
        pretrained.load(path)


# The hub


def cached(monkeypatch, home, name="gpt2", sha256=None):
    """A hub cache that holds a small model under the name's repository and revision; the model."""
    theirs = random_gpt2(**SIZES["gpt2"])
    theirs.save_pretrained(home.parent / "small")
    content = (home.parent / "small" / "model.safetensors").read_bytes()
    hub = pretrained.HUB[name]
    folder = home / "hub" / f"models--{hub.repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / hub.revision
    snapshot.mkdir(parents=True)
    (folder / "blobs").mkdir()
    (folder / "blobs" / hub.sha256).write_bytes(content)
    (snapshot / "model.safetensors").symlink_to(f"../../blobs/{hub.sha256}")
    digest = sha256 or hashlib.sha256(content).hexdigest()
    small = pretrained.HubModel(hub.repository, hub.revision, digest, 2, 2, 16)
    monkeypatch.setitem(pretrained.HUB, name, small)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "hub"))
    return theirs, snapshot


@pytest.fixture
def sealed(monkeypatch):
    """No socket can be made."""

    def refuse(*args, **keys):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def wide(monkeypatch):
    """Small models with GPT-2's 1024 positions, so that they pass for it."""
    monkeypatch.setitem(SIZES["gpt2"], "n_positions", 1024)


@pytest.mark.parametrize("name", GPT2_SIZES)
def test_a_model_of_the_hub_comes_from_the_cache_without_a_socket(name, wide, sealed, monkeypatch, tmp_path):
    theirs, _ = cached(monkeypatch, tmp_path / "home", name)
    weights = pretrained.load(name)
    assert (weights.config.gelu, weights.config.bias, weights.vocab_size) == ("tanh", True, 50257)
    assert isinstance(pretrained.find_tokenizer(weights), GPT2Tokenizer)
    assert_same_model(weights.model("cpu", torch.float32), theirs, 50257)


def test_sampling_from_the_hub(gpt2, wide, sealed, monkeypatch, tmp_path, capsys):
    prompt = gpt2.encode("Hello")
    theirs, _ = cached(monkeypatch, tmp_path / "home")
    sample.main(
        ["--init_from=gpt2", "--start=Hello", "--num_samples=1", "--max_new_tokens=5", "--temperature=0", "--device=cpu"]
    )
    tokens = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=5, eos_token_id=None, pad_token_id=0)
    assert capsys.readouterr().out == f"{gpt2.decode(tokens[0].tolist())}\n---------------\n"


def test_the_presets_that_start_from_gpt2_agree_with_its_shape():
    for name in ("eval_gpt2", "eval_gpt2_medium", "eval_gpt2_large", "eval_gpt2_xl", "finetune_shakespeare"):
        config = load(TrainConfig, [name])
        hub = pretrained.HUB[config.init_from]
        weights = pretrained.Weights(
            config.init_from, GPTConfig(1024, 50257, hub.n_layer, hub.n_head, hub.n_embd, 0, True, "tanh"), {}
        )
        adopted = pretrained.adopt(config, weights)
        assert (adopted.n_layer, adopted.n_head, adopted.n_embd) == (hub.n_layer, hub.n_head, hub.n_embd)
        assert (adopted.block_size, adopted.bias, adopted.gelu) == (1024, True, "tanh")


def test_shapes_revisions_and_digests_of_the_hub():
    counts = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200}
    assert tuple(pretrained.HUB) == GPT2_SIZES
    for name, hub in pretrained.HUB.items():
        with torch.device("meta"):
            model = GPT(GPTConfig(1024, 50257, hub.n_layer, hub.n_head, hub.n_embd, bias=True))
        assert model.parameter_count(non_embedding=False) == counts[name]
        assert re.fullmatch(r"[0-9a-f]{40}", hub.revision)
        assert re.fullmatch(r"[0-9a-f]{64}", hub.sha256)
        assert hub.repository == f"openai-community/{name}"


def test_an_altered_file_of_the_cache_is_refused(wide, sealed, monkeypatch, tmp_path):
    _, snapshot = cached(monkeypatch, tmp_path / "home")
    content = bytearray((snapshot / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (snapshot / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"init_from=gpt2: .*model.safetensors: sha256 \w{64} instead of \w{64}; delete it"):
        pretrained.load("gpt2")


def test_without_cache_and_network_one_line_says_so(monkeypatch, tmp_path):
    env = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    code, _, err = start(["-m", "nanogpt.sample", "--init_from=gpt2-xl", "--device=cpu"], **env)
    assert code == 2
    line = r"init_from=gpt2-xl: openai-community/gpt2-xl@15ea56de is neither in the cache nor to be had: "
    assert re.fullmatch(f"sample: {line}.*HF_HUB_OFFLINE.*\n", err)

    def unreachable(*args, **keys):
        assert keys == {"revision": pretrained.HUB["gpt2-xl"].revision, "token": False}
        raise huggingface_hub.errors.LocalEntryNotFoundError("cannot find it") from OSError("Connection refused")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(ValueError, match=f"{line}Connection refused"):
        pretrained.load("gpt2-xl")

    def without_words(*args, **keys):
        raise OSError

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", without_words)
    with pytest.raises(ValueError, match=rf"{line}OSError\(\)$"):
        pretrained.load("gpt2-xl")


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="init_from=gpt2: needs huggingface_hub: pip install huggingface_hub"):
        pretrained.load("gpt2")


# nanoGPT's ckpt.pt, written anew from what is known of it: names, order of parameters, keys


class PlainBlock(nn.Module):
    def __init__(self, C, n_head, bias):
        super().__init__()
        self.n_head = n_head
        self.ln_1 = nn.LayerNorm(C, bias=bias)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(C, 3 * C, bias=bias), "c_proj": nn.Linear(C, C, bias=bias)})
        self.ln_2 = nn.LayerNorm(C, bias=bias)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(C, 4 * C, bias=bias), "c_proj": nn.Linear(4 * C, C, bias=bias)})

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (t.view(B, T, self.n_head, -1).transpose(1, 2) for t in self.attn.c_attn(self.ln_1(x)).split(C, dim=2))
        x = x + self.attn.c_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, C))
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x))))


class PlainGPT(nn.Module):
    def __init__(self, block_size, vocab_size, n_layer, n_head, n_embd, bias, dropout):
        super().__init__()
        tables = {"wte": nn.Embedding(vocab_size, n_embd), "wpe": nn.Embedding(block_size, n_embd)}
        blocks = nn.ModuleList(PlainBlock(n_embd, n_head, bias) for _ in range(n_layer))
        self.transformer = nn.ModuleDict(tables | {"h": blocks, "ln_f": nn.LayerNorm(n_embd, bias=bias)})
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight
        for p in self.parameters():
            nn.init.normal_(p, std=0.2)

    def forward(self, idx, targets):
        x = self.transformer.wte(idx) + self.transformer.wpe(torch.arange(idx.shape[1]))
        for block in self.transformer.h:
            x = block(x)
        logits = self.lm_head(self.transformer.ln_f(x))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


ARGUMENTS = {"block_size": 16, "vocab_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 16, "bias": True, "dropout": 0.0}
PLAIN = {"learning_rate": 1e-2, "decay_lr": False, "gradient_accumulation_steps": 1}


def plain(steps=0, batches=(), **changes):
    """A model and its AdamW after some updates."""
    torch.manual_seed(3)
    model = PlainGPT(**ARGUMENTS | changes)
    parameters = dict(model.named_parameters()).values()
    groups = [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
              {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]  # fmt: skip
    return model, torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))


def step(model, optimizer, x, y):
    _, loss = model(x, y)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def random_batch(model, seed):
    generator = torch.Generator().manual_seed(seed)
    V, _ = model.transformer.wte.weight.shape
    tokens = torch.randint(min(V, 32), (4, 17), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def write_ckpt(path, model, optimizer=None, iter_num=5, prefix="", arguments=None, **changes):
    content = {
        "model": {prefix + name: t for name, t in model.state_dict().items()} if isinstance(model, nn.Module) else model,
        "optimizer": optimizer.state_dict() if isinstance(optimizer, torch.optim.Optimizer) else optimizer,
        "model_args": ARGUMENTS | (arguments or {}),
        "iter_num": iter_num,
        "best_val_loss": torch.tensor(2.5),
        "config": {"dataset": "letters", "learning_rate": 1e-3, "init_from": "scratch"},
    } | changes
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({key: value for key, value in content.items() if value is not None}, path)
    return path


@pytest.fixture
def ckpt(tmp_path):
    """A compiled run's, after 5 updates."""
    model, optimizer = plain()
    for i in range(5):
        step(model, optimizer, *random_batch(model, i))
    return write_ckpt(tmp_path / "out" / "ckpt.pt", model, optimizer, prefix="_orig_mod."), model, optimizer


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("changes", [{}, {"bias": False}, {"vocab_size": 50257}, {"vocab_size": 50304}], ids=str)
def test_ckpt_has_the_same_logits_here(changes, prefix, tmp_path):
    model, _ = plain(**changes)
    write_ckpt(tmp_path / "ckpt.pt", model, prefix=prefix, arguments=changes)
    for source in (tmp_path, tmp_path / "ckpt.pt"):
        weights = pretrained.load(source)
        ours = weights.model("cpu", torch.float32)
        assert (ours.config.gelu, ours.config.bias) == ("erf", changes.get("bias", True))
        assert weights.vocab_size == min(changes.get("vocab_size", 32), 50257)
        x, y = random_batch(model, 0)
        torch.testing.assert_close(logits_of(ours, x)[..., : weights.vocab_size], model(x, y)[0][..., : weights.vocab_size],
                                   rtol=0, atol=1e-4)  # fmt: skip


def test_early_ckpt_without_the_word_bias_has_biases(tmp_path):
    model, _ = plain()
    arguments = {key: value for key, value in ARGUMENTS.items() if key != "bias"}
    model.transformer.h[0].attn.register_buffer("bias", torch.ones(1, 1, 16, 16))  # its mask, where attention was by hand
    write_ckpt(tmp_path / "ckpt.pt", model, model_args=arguments)
    assert pretrained.load(tmp_path).config.bias


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("letters")
    generator = np.random.default_rng(0)
    for split, count in (("train", 5000), ("val", 2000)):
        (np.cumsum(generator.integers(-1, 2, count)) % 32).astype(np.uint16).tofile(path / f"{split}.bin")
    (path / "dataset.json").write_text('{"vocab_size": 32}')
    return path


BASE = {key: value for key, value in TINY.items() if key not in pretrained.SHAPE} | PLAIN


def arguments(data, out_dir, **keys):
    return [f"--{key}={value}" for key, value in (BASE | {"dataset": data, "out_dir": out_dir} | keys).items()]


def run(data, out_dir, **keys):
    return train.main(load(TrainConfig, arguments(data, out_dir, **keys)))


def mistake(capsys, data, out_dir, **keys):
    with pytest.raises(SystemExit) as error:
        run(data, out_dir, **keys)
    assert error.value.code == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    return line


def test_a_run_of_nanogpts_continues_as_if_never_stopped(data, ckpt, capsys):
    """The losses of 7 more updates are those of the model and optimizer that wrote it, on the same batches."""
    path, model, optimizer = ckpt
    assert run(data, path.parent, init_from="resume") == 0
    assert f"continuing {path} of nanoGPT after 5 updates\n" in capsys.readouterr().out
    loader = train.Loader(data, "train", 4, 16, seed=1337)
    found = losses(path.parent)
    assert [it for it, _ in found] == list(range(5, 12))
    for it, loss in found:
        assert loss == pytest.approx(step(model, optimizer, *next(loader)), abs=1e-5), it
    loader.close()
    saved = checkpoint.load_tensors(path.parent / "step-12" / checkpoint.MODEL)
    for name, p in model.named_parameters():
        if name.endswith("c_attn.bias"):  # of the keys: no gradient but rounding, which AdamW scales up
            p.data[16:32] = saved[name][16:32]
        torch.testing.assert_close(saved[name], p.detach(), rtol=0, atol=1e-5)
    optim = checkpoint.load_tensors(path.parent / "step-12" / checkpoint.OPTIM)
    assert optim["step"] == 12
    # and from here on it is a run of ours
    assert run(data, path.parent, init_from="resume", max_iters=14) == 0
    assert checkpoint.read_state(path.parent / "step-14")["iter"] == 14
    assert f"resuming from {path.parent}/step-12" in capsys.readouterr().out


def test_a_step_that_is_asked_for_is_none_of_nanogpts(data, ckpt, capsys):
    path, _, _ = ckpt
    assert mistake(capsys, data, path.parent, init_from="resume", resume=3) == (f"train: {path.parent}: no checkpoint in it\n")


def test_ckpt_as_the_start_of_a_new_run_gives_its_weights_alone(data, ckpt, tmp_path):
    path, model, _ = ckpt
    assert run(data, tmp_path / "new", init_from=path, max_iters=2) == 0
    assert [it for it, _ in losses(tmp_path / "new")] == [0, 1]
    loader = train.Loader(data, "train", 4, 16, seed=1337)
    expected = model(*next(loader))[1].item()
    loader.close()
    assert losses(tmp_path / "new")[0][1] == pytest.approx(expected, abs=1e-5)
    assert checkpoint.load_tensors(tmp_path / "new" / "step-2" / checkpoint.OPTIM)["step"] == 2


def test_continuing_with_gpt2s_vocabulary_pads_the_optimizers_state_too(tmp_path):
    (tmp_path / "data").mkdir()
    for split in ("train", "val"):
        (np.arange(200) % 32).astype(np.uint16).tofile(tmp_path / "data" / f"{split}.bin")
    model, optimizer = plain(vocab_size=50257)
    step(model, optimizer, *random_batch(model, 0))
    path = write_ckpt(tmp_path / "out" / "ckpt.pt", model, optimizer, iter_num=1, arguments={"vocab_size": 50257})
    assert run(tmp_path / "data", path.parent, init_from="resume", max_iters=2, block_size=8, eval_iters=1) == 0
    optim = checkpoint.load_tensors(path.parent / "step-2" / checkpoint.OPTIM)
    assert optim["exp_avg.transformer.wte.weight"].shape == (50304, 16)
    assert not optim["exp_avg.transformer.wte.weight"][50257:].any()
    assert optim["exp_avg_sq.transformer.wpe.weight"].shape == (8, 16)


class Bomb:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


@pytest.mark.parametrize("form", ["zip", "legacy", "bare"])
@pytest.mark.parametrize("place", ["model", "optimizer", "config", "iter_num"])
def test_a_malicious_ckpt_is_refused_and_runs_nothing(form, place, data, tmp_path, capsys):
    bomb, path = tmp_path / "bomb", tmp_path / "out" / "ckpt.pt"
    content = {"model": {}, "model_args": ARGUMENTS, "optimizer": {}, place: Bomb(bomb)}
    path.parent.mkdir()
    if form == "bare":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    assert mistake(capsys, data, path.parent, init_from="resume").startswith(f"train: {path}: ")
    with pytest.raises(ValueError, match=f"^{path}: "):
        pretrained.load(path)
    assert not bomb.exists()
    torch.load(path, weights_only=False) if form != "bare" else pickle.loads(path.read_bytes())
    assert bomb.exists()  # it was live


def test_a_malicious_meta_pkl_runs_nothing(tmp_path, capsys):
    model, _ = plain()
    write_ckpt(tmp_path / "ckpt.pt", model)
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 32, "itos": Bomb(tmp_path / "bomb"), "stoi": {}}))
    with pytest.raises(SystemExit) as error:
        sample.main([f"--out_dir={tmp_path}", "--device=cpu"])
    assert error.value.code == 2
    assert re.fullmatch(r"sample: .*meta.pkl: offset \d+: opcode \S+: only dicts.*\n", capsys.readouterr().err)
    assert not (tmp_path / "bomb").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "no model and model_args in it: not a checkpoint of nanoGPT's"),
        ({"model_args": None}, "no model and model_args in it: not a checkpoint of nanoGPT's"),
        ({"model": [1]}, "model is not a dict of tensors"),
        ({"model": {"x": 1}}, "model is not a dict of tensors"),
        ({"model": {}}, "tensor transformer.wte.weight is missing"),
        ({"model_args": {"n_layer": 2}}, "model_args: cannot be understood: 'block_size'"),
        ({"model_args": [2]}, "model_args: cannot be understood: "),
        ({"model_args": ARGUMENTS | {"n_layer": "2"}}, "model_args: cannot be understood: "),
        ({"model_args": ARGUMENTS | {"n_head": 3}}, "model_args: n_embd=16: must be a multiple of n_head=3"),
        (
            {"model_args": ARGUMENTS | {"n_embd": 18}},
            r"tensor transformer.wte.weight has shape \(32, 16\), expected \(32, 18\)",
        ),
        ({"iter_num": "five"}, "iter_num or best_val_loss is no number: "),
        ({"best_val_loss": torch.ones(2)}, "iter_num or best_val_loss is no number: "),
        ({"optimizer": {}}, "optimizer: no AdamW state of each of 28 parameters: KeyError"),
        ({"optimizer": [1]}, "optimizer: no AdamW state of each of 28 parameters: TypeError"),
    ],
)
def test_a_ckpt_that_is_none_is_refused_by_what_is_wrong(changes, message, tmp_path):
    model, _ = plain()
    path = write_ckpt(tmp_path / "ckpt.pt", **{"model": model} | changes)
    with pytest.raises(ValueError, match=f"^{path}: {message}"):
        pretrained.load(path)


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04", b"\x80\x02}q\x00.", b"junk" * 100], ids=["empty", "zip", "dict", "junk"]
)
def test_a_file_that_is_no_ckpt_is_refused_in_one_line(content, tmp_path):
    (tmp_path / "ckpt.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"^[^\n]*ckpt.pt: [^\n]+$"):
        pretrained.load(tmp_path)


def test_an_optimizer_state_that_does_not_fit_is_refused(ckpt):
    path, model, optimizer = ckpt
    state = optimizer.state_dict()
    state["state"][3]["exp_avg"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"optimizer: exp_avg.transformer.h.0.attn.c_proj.weight is not of shape \(16, 16\)"):
        pretrained.load(write_ckpt(path, model, state))
    state = optimizer.state_dict()
    state["state"][0]["step"] = torch.tensor(4.0)
    with pytest.raises(ValueError, match="optimizer: 28 states with 2 step counts for 28 parameters"):
        pretrained.load(write_ckpt(path, model, state))


def test_continuing_without_an_optimizers_state_is_refused(data, tmp_path, capsys):
    model, _ = plain()
    path = write_ckpt(tmp_path / "out" / "ckpt.pt", model)
    message = f"{path}: no optimizer state in it; --init_from={path} starts anew from it\n"
    assert mistake(capsys, data, path.parent, init_from="resume").endswith(message)


# Training and sampling


def test_a_hugging_face_model_is_fine_tuned_and_resumed(data, tmp_path, capsys):
    """12 updates, or 5 and then 7 more: the same, bit by bit; the first loss is that of `transformers`."""
    theirs = random_gpt2(**SIZES["odd"] | {"vocab_size": 32})
    theirs.save_pretrained(tmp_path / "hf")
    keys = {"init_from": tmp_path / "hf", "dropout": 0.1}
    assert run(data, tmp_path / "whole", **keys) == 0
    assert run(data, tmp_path / "parts", **keys, max_iters=5) == 0
    assert run(data, tmp_path / "parts", **keys | {"init_from": "resume"}) == 0
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    for file in (checkpoint.MODEL, checkpoint.OPTIM):
        whole, parts = (checkpoint.load_tensors(tmp_path / out / "step-12" / file) for out in ("whole", "parts"))
        assert whole.keys() == parts.keys()
        assert all(torch.equal(t, parts[name]) for name, t in whole.items())
    state = checkpoint.read_state(tmp_path / "whole" / "step-12")["model"]
    assert state == asdict(GPTConfig(23, 32, 3, 3, 39, 0.1, bias=True, gelu="tanh"))


def test_evaluation_alone(data, tmp_path, capsys):
    theirs = random_gpt2(**SIZES["odd"] | {"vocab_size": 32})
    theirs.save_pretrained(tmp_path / "hf")
    keys = {"eval_only": True, "batch_size": 2, "eval_iters": 4}
    assert run(data, tmp_path / "out", init_from=tmp_path / "hf", **keys) == 0
    found = float(re.search(r"^step 0: .*val loss (\d\.\d+)", capsys.readouterr().out, re.MULTILINE)[1])
    batches = list(train.eval_batches(open_dataset(data), "val", 2, 23, 4, 0, 1, torch.device("cpu")))
    with torch.no_grad():
        expected = np.mean([F.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten()).item() for x, y in batches])
    assert found == pytest.approx(expected, abs=1e-4)


def test_weights_of_a_run_of_ours_start_another(data, tmp_path):
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 16}
    assert run(data, tmp_path / "first", **shape) == 0
    for source in (tmp_path / "first", tmp_path / "first" / "step-12"):
        assert run(data, tmp_path / "second", init_from=source, max_iters=1, overwrite=True, learning_rate=1e-30) == 0
        ours = checkpoint.load_tensors(tmp_path / "second" / "step-1" / checkpoint.MODEL)
        best = (
            checkpoint.load_tensors(checkpoint.find(source, best=True) / checkpoint.MODEL) if source.name == "first" else ours
        )
        for name, t in checkpoint.load_tensors(tmp_path / "first" / "step-12" / checkpoint.MODEL).items():
            torch.testing.assert_close(ours[name], best[name] if source.name == "first" else t)


def test_keys_of_the_shape_that_contradict_the_weights_are_refused(data, tmp_path, capsys):
    random_gpt2(**SIZES["odd"] | {"vocab_size": 32}).save_pretrained(tmp_path / "hf")
    keys = {"init_from": tmp_path / "hf", "out_dir": tmp_path / "out"}
    for key, value, theirs in (
        ("n_layer", 12, 3),  # the default, but asked for
        ("n_head", 4, 3),
        ("n_embd", 60, 39),
        ("block_size", 24, 23),
        ("bias", False, True),
        ("gelu", "erf", "tanh"),
    ):
        line = mistake(capsys, data, **keys, **{key: value})
        assert line == f"train: {key}={value}: {tmp_path / 'hf'} has {key}={theirs}\n"
    config = TrainConfig(n_layer=5, n_embd=60)  # by a program
    with pytest.raises(ValueError, match=r"n_layer=5: .* has n_layer=3"):
        pretrained.adopt(config, pretrained.load(tmp_path / "hf"))
    assert run(data, **keys, n_layer=3, n_head=3, n_embd=39, gelu="tanh", bias=True, block_size=7, max_iters=1) == 0
    assert checkpoint.read_state(tmp_path / "out" / "step-1")["model"]["block_size"] == 7


def test_keys_of_the_shape_that_contradict_a_resumed_checkpoint_are_reported(data, tmp_path, capsys):
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 16}
    assert run(data, tmp_path, **shape, max_iters=2) == 0
    assert "the network's shape" not in capsys.readouterr().out
    assert run(data, tmp_path, init_from="resume", max_iters=3) == 0
    assert "the network's shape" not in capsys.readouterr().out
    assert run(data, tmp_path, init_from="resume", n_layer=12, n_embd=96, n_head=2) == 0
    line = f"the network's shape is that of {tmp_path}/step-3: n_layer=1, not 12; n_embd=8, not 96\n"
    assert line in capsys.readouterr().out


def test_data_of_another_vocabulary_is_refused(data, tmp_path, capsys):
    random_gpt2(**SIZES["odd"]).save_pretrained(tmp_path / "hf")
    line = mistake(capsys, data, tmp_path / "out", init_from=tmp_path / "hf")
    assert line == f"train: dataset={data}: a vocabulary of 32 tokens, {tmp_path / 'hf'} has 61\n"


LETTERS = "".join(chr(ord("A") + i) for i in range(32))


def test_sampling_from_a_ckpt_uses_the_characters_of_its_data(ckpt, tmp_path, monkeypatch, capsys):
    path, model, _ = ckpt
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "letters").mkdir(parents=True)
    meta = {"vocab_size": 32, "itos": dict(enumerate(LETTERS)), "stoi": {c: i for i, c in enumerate(LETTERS)}}
    (tmp_path / "data" / "letters" / "meta.pkl").write_bytes(pickle.dumps(meta))
    options = ["--start=AB", "--num_samples=1", "--max_new_tokens=8", "--temperature=0", "--device=cpu"]
    idx = torch.tensor([[0, 1]])
    for _ in range(8):
        idx = torch.cat((idx, model(idx, idx)[0][:, -1:].argmax(-1)), 1)
    for source in (f"--out_dir={path.parent}", f"--out_dir={path}", f"--init_from={path}"):
        sample.main([*options, source])
        assert capsys.readouterr().out == "".join(LETTERS[i] for i in idx[0]) + "\n---------------\n"
    (tmp_path / "data" / "letters" / "meta.pkl").rename(path.parent / "meta.pkl")  # or beside it
    assert pretrained.find_tokenizer(pretrained.load(path)).characters == LETTERS


@pytest.mark.parametrize("dataset", ["../letters", "/etc", "a/b", ".."])
def test_a_ckpt_names_its_data_by_a_plain_name_only(dataset, tmp_path, capsys):
    model, _ = plain()
    path = write_ckpt(tmp_path / "ckpt.pt", model, config={"dataset": dataset})
    message = f"{path}: dataset {dataset!r} is not a plain name"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        pretrained.find_tokenizer(pretrained.load(path))
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(evaluate.command_line([f"--init_from={path}", "--device=cpu"]))
    assert (stopped.value.code, capsys.readouterr().err) == (2, f"evaluate: {message}\n")


def test_a_run_whose_tokenizer_is_gone_has_that_of_its_data(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    assert run(tmp_path / "data", tmp_path / "out", max_iters=1, n_layer=1, n_head=2, n_embd=8, block_size=16) == 0
    weights = pretrained.load(tmp_path / "out")
    assert isinstance(weights.state["dataset"], dict)
    with pytest.raises(pretrained.NoTokenizerError, match=rf"dataset={tmp_path / 'data'} has no tokenizer\.json"):
        pretrained.find_tokenizer(weights)
    tokenizer.save(CharTokenizer(LETTERS), tmp_path / "data")
    assert pretrained.find_tokenizer(weights).characters == LETTERS
    (tmp_path / "data" / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"data/tokenizer\.json: ") as refused:
        pretrained.find_tokenizer(weights)
    assert not isinstance(refused.value, pretrained.NoTokenizerError)
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(pretrained.NoTokenizerError, match=f"dataset={tmp_path / 'data'}: no such directory"):
        pretrained.find_tokenizer(weights)


@pytest.fixture(scope="module")
def fifty_thousand(tmp_path_factory):
    """A dataset of 50304 tokens of its own, the last ones in each row of it."""
    path = tmp_path_factory.mktemp("fifty thousand")
    for split in ("train", "val"):
        np.tile(np.arange(50240, 50304, dtype=np.uint16), 10).tofile(path / f"{split}.bin")
    (path / "dataset.json").write_text('{"vocab_size": 50304}')
    return path


def test_data_of_50304_tokens_is_not_padded_gpt2(fifty_thousand, tmp_path):
    """Its last 47 tokens are as real as others: predicted, exported, and fine-tuned on."""
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 16, "bias": True, "gelu": "tanh"}
    assert run(fifty_thousand, tmp_path / "out", max_iters=2, **shape) == 0
    assert all(loss == pytest.approx(np.log(50304), abs=0.3) for _, loss in losses(tmp_path / "out"))
    weights = pretrained.load(tmp_path / "out")
    assert (weights.vocab_size, weights.model("cpu", torch.float32).vocab_size) == (50304, 50304)
    assert run(fifty_thousand, tmp_path / "tuned", init_from=tmp_path / "out", max_iters=1) == 0
    assert np.isfinite(losses(tmp_path / "tuned")[0][1])
    assert export.stored(weights)["transformer.wte.weight"].shape == (50304, 8)


def words(count, special=("<|endoftext|>",), **model):
    """tokenizer.json of `count` tokens: the bytes, pairs of letters, pairs of these, then the special ones."""
    letters, pieces = sorted(tokenizer.BYTE_OF), []
    capitals = [letter for letter in letters if letter.isascii() and letter.isupper()]
    pairs = [(a, b) for a in capitals for b in letters if b not in capitals]
    pairs += [(a + b, c + d) for a, b in pairs[:100] for c, d in pairs]
    pairs = pairs[: count - 256 - len(special)]
    pieces = [*letters, *(left + right for left, right in pairs)]
    assert len(pieces) + len(special) == count
    level = {"type": "ByteLevel", "add_prefix_space": False}
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    added = [{"id": len(pieces) + i, "content": content} for i, content in enumerate(special)]
    model = {"type": "BPE", "vocab": vocabulary, "merges": [list(pair) for pair in pairs]} | model
    return {"added_tokens": added, "normalizer": None, "pre_tokenizer": level, "decoder": level, "model": model}


def test_imported_weights_of_50304_rows_are_gpt2s_unless_a_tokenizer_says_otherwise(tmp_path):
    random_gpt2(**SIZES["gpt2"] | {"vocab_size": 50304, "n_layer": 1}).save_pretrained(tmp_path)
    assert pretrained.load(tmp_path).vocab_size == 50257
    assert pretrained.load(tmp_path / "model.safetensors").model("cpu", torch.float32).config.real_vocab_size == 50257
    (tmp_path / "tokenizer.json").write_text(json.dumps(words(50304)))
    weights = pretrained.load(tmp_path)
    assert (weights.vocab_size, weights.model("cpu", torch.float32).config.real_vocab_size) == (50304, 0)
    assert pretrained.find_tokenizer(weights).vocab_size == 50304
    (tmp_path / "tokenizer.json").write_text("{}")
    assert pretrained.load(tmp_path).vocab_size == 50304


@pytest.fixture(scope="module")
def gpt2_sized(tmp_path_factory):
    """A Hugging Face directory of 50257 tokens without a tokenizer, to be copied."""
    path = tmp_path_factory.mktemp("gpt2 sized")
    random_gpt2(**SIZES["gpt2"] | {"n_layer": 1}).save_pretrained(path)
    return path


def gpt2_table():
    try:
        return [assets.fetch(asset).read_bytes() for asset in (assets.GPT2_ENCODER, assets.GPT2_MERGES)]
    except ValueError as error:
        pytest.skip(f"GPT-2's table is neither cached nor reachable: {error}")


def test_a_vocabulary_of_its_own_is_never_taken_for_gpt2s(gpt2_sized, tmp_path):
    """In vocab.json and merges.txt, as tokenizers were saved before tokenizer.json."""
    table, merges = gpt2_table()
    hf = shutil.copytree(gpt2_sized, tmp_path / "hf")
    weights = pretrained.load(hf)
    assert isinstance(pretrained.find_tokenizer(weights), GPT2Tokenizer)
    (hf / "vocab.json").write_bytes(table)
    (hf / "merges.txt").write_bytes(merges)
    assert isinstance(pretrained.find_tokenizer(weights), GPT2Tokenizer)
    (hf / "added_tokens.json").write_text('{"<|endoftext|>": 50256, "<|user|>": 50257}')
    with pytest.raises(ValueError, match=r"added_tokens.json: adds tokens to GPT-2's"):
        pretrained.find_tokenizer(weights)
    (hf / "added_tokens.json").unlink()
    for vocabulary in (dict(zip(json.loads(table), range(50256, -1, -1))), {"a": 0}):
        (hf / "vocab.json").write_text(json.dumps(vocabulary))
        with pytest.raises(ValueError, match=r"vocab\.json: not GPT-2's") as refused:
            pretrained.find_tokenizer(weights)
        assert not isinstance(refused.value, pretrained.NoTokenizerError)


def test_tokens_added_to_gpt2s_are_kept(gpt2_sized, tmp_path):
    table, merges = gpt2_table()
    hf = shutil.copytree(gpt2_sized, tmp_path / "hf")
    weights = pretrained.load(hf)
    content = export._of_gpt2(table, merges)
    (hf / "tokenizer.json").write_text(json.dumps(content))
    assert isinstance(pretrained.find_tokenizer(weights), GPT2Tokenizer)
    content["added_tokens"].append({"id": 50257, "content": "<|user|>"})
    (hf / "tokenizer.json").write_text(json.dumps(content))
    found, peer = pretrained.find_tokenizer(weights), transformers.AutoTokenizer.from_pretrained(hf)
    assert found.vocab_size == 50258
    assert found.encode("<|user|>Hello  world") == peer.encode("<|user|>Hello  world") == [50257, 15496, 220, 995]
    with pytest.raises(ValueError, match="a tokenizer of 50258 tokens for a model of 50257"):
        pretrained.load_model(hf, "cpu", torch.float32)
    content["model"]["dropout"] = 0.1
    (hf / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"tokenizer.json: model.dropout is set"):
        pretrained.find_tokenizer(weights)


def test_a_tokenizer_of_more_tokens_than_the_model_is_refused(tmp_path):
    model, _ = plain()
    meta = {"vocab_size": 33, "itos": dict(enumerate(LETTERS + "é")), "stoi": {}}
    write_ckpt(tmp_path / "ckpt.pt", model)
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    with pytest.raises(ValueError, match=r"ckpt.pt: a tokenizer of 33 tokens for a model of 32"):
        pretrained.load_model(tmp_path, "cpu", torch.float32)


def test_a_model_without_a_tokenizer_is_refused_unless_its_vocabulary_is_gpt2s(odd, tmp_path):
    with pytest.raises(ValueError, match=r"hf: no tokenizer.json beside it, and no dataset of its own is named"):
        pretrained.load_model(odd[0], "cpu", torch.float32)
    random_gpt2(**SIZES["gpt2"]).save_pretrained(tmp_path / "gpt2")
    assert isinstance(pretrained.load_model(tmp_path / "gpt2", "cpu", torch.float32)[1], GPT2Tokenizer)


@pytest.mark.parametrize("cls", [TrainConfig, sample.SampleConfig])
def test_init_from_is_a_word_or_a_path(cls, tmp_path):
    for value in (*GPT2_SIZES, "resume", tmp_path):
        assert load(cls, [f"--init_from={value}"], None).init_from == str(value)
    for value, hint in (("gpt2-xxl", "; did you mean gpt2-xl?"), ("", "")):
        with pytest.raises(
            ValueError, match=rf"init_from={value}: neither .*, gpt2-xl nor a path that exists{re.escape(hint)}$"
        ):
            load(cls, [f"--init_from={value}"], None)
