"""Fine-tuning: frozen layers, learning rates by layer, recomputed blocks, and the preset finetune_shakespeare."""

import csv
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from benchmarks import memory
from kernels import dispatch
from nanogpt import checkpoint, train
from nanogpt.config import PRESETS, TrainConfig, load, read_file
from nanogpt.optim import AdamW
from scripts import report
from tests.runs import TORCHRUN, arguments, losses, run, start, walk
from tests.test_model import DEVICE, batch, make, spread
from tests.test_pretrained import random_gpt2

SHAPE = {"n_layer": 3, "n_head": 2, "n_embd": 16, "bias": True}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return walk(tmp_path_factory.mktemp("finetune"))


def model_of(freeze=-1, recompute=False, **changes):
    torch.manual_seed(5)
    model = spread(make(**SHAPE | changes))
    model.freeze(freeze)
    model.recompute = recompute
    return model


def backward(model, seed=0):
    """{name: gradient}, None where there is none; and the loss."""
    torch.manual_seed(seed)
    _, loss = model(*batch(3, 16))
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()} | {"loss": loss.detach()}


def frozen_names(model, freeze):
    prefixes = ["transformer.wte.", "transformer.wpe."] if freeze >= 0 else []
    prefixes += [f"transformer.h.{i}." for i in range(freeze)]
    return {name for name, _ in model.named_parameters() if name.startswith(tuple(prefixes))} if prefixes else set()


def mistake(capsys, data, out_dir, **keys):
    with pytest.raises(SystemExit) as error:
        run(data, out_dir, **keys)
    assert error.value.code == 2
    return capsys.readouterr().err


# Frozen layers


@pytest.mark.parametrize("freeze", [-1, 0, 1, 3])
def test_frozen_parameters_have_no_gradient_and_the_others_theirs(freeze):
    whole, model = backward(model_of()), model_of(freeze)
    part = backward(model)
    assert {name for name, grad in part.items() if grad is None} == frozen_names(model, freeze)
    for name, grad in part.items():
        assert grad is None or torch.equal(grad, whole[name]), name
    trained = [p for group in model.decay_groups() for p in group]
    assert sum(map(id, trained)) == sum(id(p) for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("freeze", [0, 2, 3])
def test_a_run_leaves_frozen_parameters_alone_and_keeps_nothing_for_them(freeze, data, tmp_path):
    keys = {"n_layer": 3, "freeze": freeze}
    torch.manual_seed(1337)
    config = load(TrainConfig, arguments(data, tmp_path, **keys))
    before = dict(train.GPT(config.model(32), torch.float32).named_parameters())
    assert run(data, tmp_path, **keys) == 0
    after = checkpoint.load_tensors(tmp_path / "step-12" / checkpoint.MODEL)
    same = {name for name, t in after.items() if torch.equal(t, before[name])}
    names = {name for name in before if name.startswith(("transformer.w", *[f"transformer.h.{i}." for i in range(freeze)]))}
    assert same == names
    optim = checkpoint.load_tensors(tmp_path / "step-12" / checkpoint.OPTIM)
    assert optim.keys() == {f"{key}.{n}" for key in ("exp_avg", "exp_avg_sq") for n in before if n not in names} | {"step"}


@pytest.mark.parametrize("keys", [{"freeze": 1}, {"layer_lr_decay": 0.7}, {"recompute": True}], ids=str)
def test_stopped_and_resumed_is_as_if_never_stopped(keys, data, tmp_path):
    keys = keys | {"n_layer": 3, "dropout": 0.1}
    assert run(data, tmp_path / "whole", **keys) == 0
    assert run(data, tmp_path / "parts", **keys, max_iters=5) == 0
    assert run(data, tmp_path / "parts", **keys, init_from="resume") == 0
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    for file in (checkpoint.MODEL, checkpoint.OPTIM):
        whole, parts = (checkpoint.load_tensors(tmp_path / out / "step-12" / file) for out in ("whole", "parts"))
        assert whole.keys() == parts.keys()
        assert all(torch.equal(t, parts[name]) for name, t in whole.items())


def test_what_is_frozen_cannot_change_within_a_run(data, tmp_path, capsys):
    assert run(data, tmp_path / "out", freeze=1, max_iters=2) == 0
    line = mistake(capsys, data, tmp_path / "out", init_from="resume")
    start = f"{tmp_path / 'out'}/step-2"
    assert line == f"train: freeze=-1: {start} has freeze=1; a new run can start with --init_from={start}\n"
    assert run(data, tmp_path / "new", init_from=start, max_iters=2, n_layer=2, n_head=2, n_embd=16, block_size=16) == 0


def test_more_frozen_blocks_than_there_are_is_a_mistake(data, tmp_path, capsys):
    assert mistake(capsys, data, tmp_path, freeze=3) == "train: freeze=3: the network has 2 blocks\n"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--freeze=-2", "freeze=-2: must be at least -1"),
        ("--layer_lr_decay=0", "layer_lr_decay=0.0: must be above 0 and at most 1"),
        ("--layer_lr_decay=1.1", "layer_lr_decay=1.1: must be above 0 and at most 1"),
    ],
)
def test_values_out_of_range_are_refused(option, message):
    with pytest.raises(ValueError, match=message):
        load(TrainConfig, [option])


def test_flops_count_what_is_computed():
    """6 per weight: 2 forward, 2 for the gradient of its input, 2 for its own; attention in the same shares."""
    C, T, V, L = 16, 16, 24, 3
    block = 12 * C * C + 13 * C  # weights and biases
    attention = 4 * C * T  # forward: scores and their sum of values
    for freeze, blocks, own in ((-1, 0, True), (0, 0, False), (2, 2, False)):
        expected = 2 * (L * block + V * C + 2 * C) + L * attention  # forward
        expected += 2 * ((L - blocks) * block + V * C + 2 * C) + (L - blocks) * attention  # gradients of inputs
        expected += (
            2 * ((L - blocks) * block + own * V * C + 2 * C) + (L - blocks) * attention
        )  # of weights, of the other input
        assert model_of(freeze).flops_per_token(causal=False) == expected
        assert model_of(freeze).flops_per_token(causal=True) == expected - (3 * L - 2 * blocks) * attention // 2


# Learning rates by layer


def test_layers_get_their_learning_rates_as_from_pytorchs_groups():
    ours, theirs = model_of(), model_of()
    rates = {"ln_f": 1.0, "h.2": 0.5, "h.1": 0.25, "h.0": 0.125, "wte": 0.0625, "wpe": 0.0625}
    groups = []
    for name, p in theirs.named_parameters():
        (rate,) = (rate for part, rate in rates.items() if f".{part}." in name)
        groups.append({"params": [p], "lr": rate, "scale": rate, "weight_decay": 0.1 if p.dim() >= 2 else 0.0})
    peer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    scales = {p: 0.5**depth for p, depth in ours.layers_above().items()}
    optimizer = AdamW(ours.decay_groups(), lr=1.0, lr_scales=scales)
    for i in range(6):
        lr = 0.01 * (i + 1)
        optimizer.set_lr(lr)
        for group in peer.param_groups:
            group["lr"] = lr * group["scale"]
        for model in (ours, theirs):
            model.zero_grad()
            _, loss = model(*batch(3, 16, seed=i))
            loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        optimizer.step(0.5)
        peer.step()
        assert optimizer.completed == i + 1
    for (name, p), (_, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        if name.endswith("c_attn.bias"):  # of the keys: no gradient but rounding
            p, q = p[32:], q[32:]
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_a_skipped_update_is_skipped_in_every_layer():
    model = model_of()
    optimizer = AdamW(model.decay_groups(), lr=0.1, lr_scales={p: 0.5**d for p, d in model.layers_above().items()})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    backward(model)
    next(model.parameters()).grad[0] = torch.inf
    optimizer.step(1.0)
    assert optimizer.completed == 0
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    backward(model)
    optimizer.step(1.0)
    assert optimizer.completed == 1
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters() if p.dim() > 1)


def test_a_factor_of_one_is_the_plain_run(data, tmp_path):
    for name, keys in (("plain", {}), ("one", {"layer_lr_decay": 1}), ("half", {"layer_lr_decay": 0.5})):
        assert run(data, tmp_path / name, **keys) == 0
    assert losses(tmp_path / "plain") == losses(tmp_path / "one") != losses(tmp_path / "half")


# Recomputed blocks


@pytest.mark.parametrize("freeze", [-1, 1])
def test_recomputing_gives_the_same_gradients_bit_by_bit_dropout_included(freeze):
    plain = backward(model_of(freeze, dropout=0.3))
    state = torch.get_rng_state()
    again = backward(model_of(freeze, recompute=True, dropout=0.3))
    assert torch.equal(torch.get_rng_state(), state)
    assert plain.keys() == again.keys()
    for name, grad in plain.items():
        assert (grad is None and again[name] is None) or torch.equal(grad, again[name]), name
    assert not torch.equal(plain["loss"], backward(model_of(freeze, dropout=0.3), seed=1)["loss"])  # dropout was at work


def kept_bytes(model):
    """What a forward pass keeps for backward, parameters aside."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage  # alive, so that no address is counted twice
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        model(*batch(4, 16))
    return sum(storage.nbytes() for storage in kept.values())


def test_recomputing_keeps_the_blocks_inputs_alone():
    """Four blocks against three: what one keeps, as docs/finetuning.md counts."""
    plain, recomputed = (
        kept_bytes(model_of(recompute=recompute, n_layer=4)) - kept_bytes(model_of(recompute=recompute))
        for recompute in (False, True)
    )
    tokens, C, n_head = 4 * 16, SHAPE["n_embd"], SHAPE["n_head"]
    assert recomputed == tokens * 4 * 2 * C
    if dispatch.choose("gelu_mlp", DEVICE) == "torch":
        assert plain > tokens * 4 * 16 * C
    else:
        assert plain == tokens * 4 * (16 * C + 4 + n_head)


def test_the_calculated_memory_is_the_formulas():
    config = memory.MemoryConfig(batch_size=2, block_size=512, freeze=4)
    parts = memory.calculated(config, "gpt2", torch.bfloat16, "cuda")
    n, block = 124_439_808 + 47 * 768, 12 * 768**2 + 13 * 768
    trained = 8 * block + 2 * 768
    assert parts["parameters"] == 4 * n
    assert (parts["gradients"], parts["moments"]) == (4 * trained, 8 * trained)
    assert parts["shadows"] == 2 * (n - 1024 * 768)
    tokens = 2 * 512
    assert parts["activations"] == 8 * tokens * (2 * 16 * 768 + 4 * (4 + 12)) + 2 * 2 * tokens * 768
    assert parts["head"] == tokens * 50304 * 2
    assert parts["total"] == sum(parts[name] for name in parts if name != "total")
    less = memory.calculated(replace(config, recompute=True), "gpt2", torch.bfloat16, "cuda")
    assert parts["activations"] - less["activations"] == tokens * (7 * (2 * 16 * 768 + 4 * 16) - 8 * 2 * 2 * 768)
    shared = memory.calculated(replace(config, fsdp=4), "gpt2", torch.bfloat16, "cuda")
    gathered = 2 * (n - (12 - 2 * 2) * block)
    assert (shared["parameters"], shared["gradients"], shared["moments"]) == (n, 4 * trained, 2 * trained)
    assert shared["shadows"] == gathered
    assert (shared["activations"], shared["head"]) == (parts["activations"], parts["head"])


def test_the_memory_of_a_run_is_measured_beside_its_calculation(monkeypatch, capsys):
    monkeypatch.setattr(memory, "measured", lambda config, dtype, device: 3_000_000_000)
    memory.main(["--size=gpt2", "--device=cpu"])
    assert re.search(r"^gpt2 .* 3\.00 on cpu$", capsys.readouterr().out, re.MULTILINE)
    memory.main(["--freeze=13"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]] == ["gpt2-medium", "gpt2-large", "gpt2-xl"]


def test_what_was_measured_has_rows(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "measured", lambda config, dtype, device: 3 << 30)
    options = ["--size=gpt2", "--device=cpu", "--block_size=256", "--freeze=6", "--recompute", f"--out={tmp_path}"]
    memory.main(options)
    with (tmp_path / "memory.csv").open(newline="") as file:
        calculated, measured = csv.DictReader(file)
    assert (calculated["provider"], measured["provider"]) == ("calculated", "measured")
    assert {row["case"] for row in (calculated, measured)} == {"gpt2-B1-T256-freeze6-recompute"}
    assert (float(measured["peak_mib"]), measured["dtype"]) == (3072, "fp32")
    parts = memory.calculated(memory.MemoryConfig("gpt2", 1, 256, 6, True), "gpt2", torch.float32, "cpu")
    assert abs(float(calculated["peak_mib"]) * 2**20 / parts["total"] - 1) < 1e-4
    text = report.section(tmp_path)
    assert f"| gpt2-B1-T256-freeze6-recompute fp32 | {parts['total'] / 2**20:,.0f} | 3,072 |" in text


def test_two_updates_are_measured(monkeypatch):
    """The peak is asked for after two updates of two micro-steps, and what was there before is taken off."""
    monkeypatch.setitem(memory.HUB, "gpt2", replace(memory.HUB["gpt2"], n_layer=1, n_head=2, n_embd=32))
    events = []
    monkeypatch.setattr(memory, "resident", lambda: events.append("before") or 5000)
    monkeypatch.setattr(memory.resource, "getrusage", lambda _: events.append("peak") or SimpleNamespace(ru_maxrss=7))
    forward, update = memory.GPT.forward, memory.AdamW.step

    def forward_seen(model, idx, targets):
        events.append((model.recompute, model.lm_head.weight.requires_grad, tuple(idx.shape)))
        return forward(model, idx, targets)

    monkeypatch.setattr(memory.GPT, "forward", forward_seen)
    monkeypatch.setattr(memory.AdamW, "step", lambda self, clip: events.append("update") or update(self, clip))
    config = memory.MemoryConfig(size="gpt2", batch_size=2, block_size=16, freeze=0, recompute=True)
    assert memory.measured(config, torch.float32, torch.device("cpu")) == 7 * 1024 - 5000
    micro_step = (True, False, (2, 16))
    assert events == ["before", *2 * (micro_step, micro_step, "update"), "peak"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--freeze=100"], "freeze=100: must be -1 to 48"),
        (["--size=gpt2", "--freeze=13"], "freeze=13: must be -1 to 12"),
        (["--block_size=0"], "block_size=0: must be 1 to 1024"),
        (["--batch_size=0"], "batch_size=0: must be 1 to "),
        (["--fsdp=0"], "fsdp=0: must be 1 to 1024"),
        (["--size=gpt2", "--fsdp=2"], "fsdp=2: not with size=gpt2"),
        (["--device=foo"], "device=foo: expected auto, cpu, cuda, cuda:N or mps"),
        (["--out=rows"], "out=rows: only what is measured has rows; set --size too"),
        (["--dtype=foo"], "dtype=foo: expected one of auto, float32, bfloat16, float16"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_mistakes_about_memory_are_one_line(options, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        memory.main(options)
    out, err = capsys.readouterr()
    assert (stopped.value.code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"benchmarks/memory.py: {message}")


def test_help_names_the_file_that_was_called(capsys):
    with pytest.raises(SystemExit) as stopped:
        memory.main(["--help"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith("usage: python benchmarks/memory.py ")


def test_sampling_with_a_cache_and_evaluation_recompute_nothing():
    model = model_of(recompute=True).eval()
    idx, _ = batch(2, 5)
    with torch.no_grad():
        expected, _ = model_of().eval()(idx)
        cache = model.new_cache(2, 8)
        assert torch.equal(model(idx, cache=cache)[0], expected)
        assert cache.length == 5


def test_runs_with_and_without_recomputing_are_the_same(data, tmp_path):
    for name, recompute in (("plain", False), ("again", True)):
        assert run(data, tmp_path / name, recompute=recompute, dropout=0.2, max_iters=6) == 0
    assert losses(tmp_path / "plain") == losses(tmp_path / "again")


@pytest.mark.slow
def test_compiled_with_recomputing_follows_eager(data, tmp_path):
    for name, keys in (("plain", {}), ("compiled", {"compile": True, "recompute": True, "freeze": 0})):
        assert run(data, tmp_path / name, max_iters=4, **{"freeze": 0} | keys) == 0
    for (_, one), (_, other) in zip(losses(tmp_path / "plain"), losses(tmp_path / "compiled"), strict=True):
        assert one == pytest.approx(other, abs=1e-4)


@pytest.mark.slow
def test_two_processes_follow_one(data, tmp_path):
    keys = {"freeze": 1, "recompute": True, "layer_lr_decay": 0.8, "dropout": 0.0, "max_iters": 4}
    assert run(data, tmp_path / "one", **keys) == 0
    code, _, err = start([*TORCHRUN, "-m", "nanogpt.train", *arguments(data, tmp_path / "two", **keys)])
    assert code == 0, err
    for (_, one), (_, two) in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert one == pytest.approx(two, abs=1e-4)


# The preset


def test_the_preset_is_nanogpts_recipe():
    config = TrainConfig(**read_file(TrainConfig, PRESETS / "finetune_shakespeare.py"))
    recipe = {"init_from": "gpt2-xl", "dataset": "shakespeare", "batch_size": 1, "gradient_accumulation_steps": 32}
    recipe |= {"max_iters": 20, "learning_rate": 3e-5, "decay_lr": False, "eval_interval": 5, "eval_iters": 40}
    recipe |= {"always_save_checkpoint": False, "block_size": 1024, "dropout": 0.0, "weight_decay": 0.1, "beta2": 0.95}
    assert {key: getattr(config, key) for key in recipe} == recipe
    config.check()


def test_the_preset_fine_tunes_a_model_of_any_size(tmp_path, capsys):
    """Over tokens of GPT-2, with a small model in the place of XL: the loss falls, and the model is tanh, biased, padded."""
    random_gpt2(n_layer=2, n_head=2, n_embd=16, n_positions=32, vocab_size=50257).save_pretrained(tmp_path / "hf")
    (tmp_path / "data").mkdir()
    tokens = np.tile(np.arange(50250, 50257, dtype=np.uint16), 400)
    for split in ("train", "val"):
        tokens.tofile(tmp_path / "data" / f"{split}.bin")
    options = [f"--init_from={tmp_path / 'hf'}", f"--dataset={tmp_path / 'data'}", f"--out_dir={tmp_path / 'out'}"]
    options += ["--device=cpu", "--max_iters=5", "--eval_iters=2", "--gradient_accumulation_steps=4", "--learning_rate=0.01"]
    assert train.main(load(TrainConfig, ["finetune_shakespeare", *options])) == 0
    out = capsys.readouterr().out
    assert "2 layers, 2 heads, 16 channels, vocabulary 50304, tanh GELU" in out
    first, last = (float(loss) for loss in re.findall(r"val loss ([\d.]+)", out))
    assert last < first - 1
    assert checkpoint.read_state(tmp_path / "out" / "step-5")["model"]["bias"] is True
