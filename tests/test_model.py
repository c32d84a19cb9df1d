"""nanogpt.model: nanoGPT's names and counts, plain PyTorch's losses, and each backend, alone and under PyTorch's tools."""

import copy
import functools
import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from benchmarks.baseline import BaselineGPT, adamw
from kernels import dispatch
from kernels.linear import shadow
from nanogpt.config import GPTConfig
from nanogpt.model import GPT
from nanogpt.optim import AdamW
from tests.helpers import DEVICE, INTERPRET

TINY = {"block_size": 16, "vocab_size": 24, "n_layer": 2, "n_head": 2, "n_embd": 16}


@pytest.fixture(params=["torch", pytest.param("triton", marks=pytest.mark.triton)])
def backend(request):
    dispatch.use(request.param)
    return request.param


def make(dtype: torch.dtype = torch.float32, **changes) -> GPT:
    return GPT(GPTConfig(**(TINY | changes)), dtype).to(DEVICE)


def spread(model: GPT, factor: float = 5.0) -> GPT:
    """Larger weights, so that every part of the network shows in its output."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.02 * factor)
    return model


def batch(B: int, T: int, vocab_size: int = TINY["vocab_size"], seed: int = 0):
    """Sequences that can be learnt: each counts up in steps of its own."""
    generator = torch.Generator().manual_seed(seed)
    start, stride = torch.randint(vocab_size, (B, 1), generator=generator), torch.randint(1, 4, (B, 1), generator=generator)
    tokens = ((start + stride * torch.arange(T + 1)) % vocab_size).to(DEVICE)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def gradients(model: nn.Module, idx, targets) -> dict[str, torch.Tensor]:
    model.zero_grad()
    _, loss = model(idx, targets)
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}


def all_logits(model: GPT, idx) -> torch.Tensor:
    """(B, T, V); the model itself gives those of the last position only."""
    hidden = []
    hook = model.transformer.ln_f.register_forward_hook(lambda module, args, output: hidden.append(output[0]))
    model(idx)
    hook.remove()
    return F.linear(hidden[0], model.transformer.wte.weight)


def assert_same(ours: dict, theirs: dict, rtol=1e-5, atol=1e-6):
    assert ours.keys() == theirs.keys()
    for name, t in ours.items():
        torch.testing.assert_close(t, theirs[name], rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("bias", "count"), [(False, 124_337_664), (True, 124_439_808)])
def test_names_and_shapes_are_nanogpts(bias, count):
    C, V = 768, 50257
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=V, bias=bias))
    want = {"transformer.wte.weight": (V, C), "transformer.wpe.weight": (1024, C), "lm_head.weight": (V, C)}
    linears = {"attn.c_attn": (3 * C, C), "attn.c_proj": (C, C), "mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}
    for layer in range(12):
        want |= {f"transformer.h.{layer}.{name}.weight": shape for name, shape in linears.items()}
        want |= {f"transformer.h.{layer}.ln_{i}.weight": (C,) for i in (1, 2)}
    want["transformer.ln_f.weight"] = (C,)
    if bias:
        want |= {n.replace(".weight", ".bias"): s[:1] for n, s in want.items() if ".h." in n or "ln_f" in n}
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == want
    assert model.lm_head.weight is model.transformer.wte.weight
    assert sum(p.numel() for p in model.parameters()) == model.parameter_count(non_embedding=False) == count
    assert model.parameter_count() == count - 1024 * C


def test_flops_per_token():
    with torch.device("meta"):
        model = GPT(GPTConfig())
    assert model.flops_per_token(causal=False) == 6 * 123_587_328 + 12 * 12 * 12 * 64 * 1024
    assert model.flops_per_token(causal=True) == 6 * 123_587_328 + 6 * 12 * 12 * 64 * 1024


def test_initial_weights():
    model = make(n_embd=64, bias=True)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all(), name
        elif p.dim() == 1:
            assert (p == 1).all(), name
        else:
            std = 0.02 / math.sqrt(2 * TINY["n_layer"]) if name.endswith("c_proj.weight") else 0.02
            five_sigma = 5 * std / math.sqrt(2 * p.numel())
            assert abs(p.std().item() - std) < five_sigma, name


@pytest.mark.parametrize("bias", [False, True])
def test_decay_groups(bias):
    model = make(bias=bias)
    decayed, rest = ({id(p) for p in group} for group in model.decay_groups())
    for name, p in model.named_parameters():
        matrix = "ln_" not in name and name.endswith("weight")
        assert (id(p) in decayed, id(p) in rest) == (matrix, not matrix), name
    assert len(decayed) + len(rest) == len(list(model.parameters()))


def train(model: GPT, steps: int) -> list[float]:
    optimizer = AdamW(model.decay_groups(), lr=1e-2)
    losses = []
    for _ in range(steps):
        _, loss = model(*batch(2, 9))
        loss.backward()
        optimizer.step(max_norm=1.0)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("bias", [False, True])
def test_first_100_losses_equal_plain_pytorchs(bias):
    """Same weights and batches, each with its own optimizer, clipping included."""
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 24, "vocab_size": 65, "bias": bias}
    ours = make(**shape)
    plain = BaselineGPT(**shape, attention="auto", dtype=torch.float32).to(DEVICE)
    plain.load_state_dict(ours.state_dict())
    optimizer, plain_optimizer = AdamW(ours.decay_groups(), lr=6e-3), adamw(plain, lr=6e-3)
    losses, clipped = [], 0
    for step in range(100):
        idx, targets = batch(4, 24, 65, seed=step)
        _, loss = ours(idx, targets)
        loss.backward()
        norm = optimizer.step(max_norm=1.0)
        clipped += norm.item() > 1.0
        plain_loss = plain(idx, targets)
        plain_loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        plain_optimizer.step()
        plain_optimizer.zero_grad()
        losses.append((loss.item(), plain_loss.item()))
        assert abs(losses[-1][0] - losses[-1][1]) < 1e-4, f"step {step}: {losses[-1]}"
    assert losses[-1][0] < losses[0][0] - 2  # it learnt, so the comparison is of more than the start
    assert 0 < clipped < 100


@pytest.mark.parametrize(("gelu", "approximate"), [("erf", "none"), ("tanh", "tanh")])
def test_gelu_is_the_one_asked_for(gelu, approximate, backend):
    mlp = make(gelu=gelu, bias=True).transformer.h[0].mlp
    x = 60 * torch.randn(5, 16, device=DEVICE)
    want = mlp.c_proj(F.gelu(F.linear(x, mlp.c_fc.weight, mlp.c_fc.bias), approximate=approximate))
    torch.testing.assert_close(mlp(x), want, rtol=1e-5, atol=1e-6)  # the two forms differ by 1e-4


def test_dropout_is_for_training_only(backend):
    model = spread(make(dropout=0.3))
    idx, targets = batch(2, 8)
    dropped = [model(idx, targets)[1].item() for _ in range(2)]
    assert dropped[0] != dropped[1]
    model.eval()
    kept = [model(idx, targets)[1].item() for _ in range(2)]
    assert kept[0] == kept[1]
    without = make()
    without.load_state_dict(model.state_dict())
    assert without(idx, targets)[1].item() == kept[0]


def test_padded_vocabulary_gets_no_probability(backend):
    model = spread(make(vocab_size=24, real_vocab_size=20))
    idx, targets = batch(2, 8, 20)
    found = gradients(model, idx, targets)
    logits = all_logits(model, idx)
    want = F.cross_entropy(logits[..., :20].flatten(0, 1), targets.flatten())
    torch.testing.assert_close(found["loss"], want, rtol=1e-5, atol=1e-6)
    assert (found["transformer.wte.weight"][20:] == 0).all()
    assert (found["transformer.wte.weight"][:20] != 0).any(1).all()


def test_crop_block_size():
    model = spread(make())
    idx, targets = batch(2, 8)
    before = model(idx, targets)[1].item()
    model.crop_block_size(8)
    assert model.transformer.wpe.weight.requires_grad
    assert model.config.block_size == model.transformer.wpe.num_embeddings == len(model.transformer.wpe.weight) == 8
    assert model(idx, targets)[1].item() == before
    with pytest.raises(ValueError, match="9 tokens do not fit into 8 positions"):
        model(*batch(2, 9))
    for bad in (0, 9):
        with pytest.raises(ValueError, match=rf"block_size={bad}: expected 1\.\.8"):
            model.crop_block_size(bad)
    model.freeze(0)
    model.crop_block_size(7)
    assert not model.transformer.wpe.weight.requires_grad


def test_too_many_tokens():
    model = make()
    with pytest.raises(ValueError, match="17 tokens do not fit into 16 positions"):
        model(*batch(1, 17))
    cache = model.new_cache(1, 4)
    model(batch(1, 4)[0], cache=cache)
    with pytest.raises(ValueError, match="5 tokens do not fit into 4 positions"):
        model(batch(1, 1)[0], cache=cache)
    cache = model.new_cache(1, 16)
    model(batch(1, 4)[0], cache=cache)
    with pytest.raises(ValueError, match="a prompt of 2 tokens needs an empty cache, this one holds 4"):
        model(batch(1, 2)[0], cache=cache)


@torch.no_grad()
@pytest.mark.parametrize("prompt", [1, 5])
def test_cached_logits_equal_the_full_forward(backend, prompt):
    model = spread(make(bias=True)).eval()
    idx, _ = batch(3, 9)
    want = all_logits(model, idx)
    cache = model.new_cache(3, 9)
    steps = [(0, prompt), *((t, t + 1) for t in range(prompt, 9))]
    for start, end in steps:
        logits, loss = model(idx[:, start:end], cache=cache)
        assert logits.shape == (3, 1, 24)
        assert loss is None
        assert cache.length == end
        torch.testing.assert_close(logits[:, 0], want[:, end - 1], rtol=1e-5, atol=1e-5)


def test_gradient_checkpointing(backend):
    """Recomputed blocks draw the dropout masks that the first pass drew."""
    model = spread(make(dropout=0.2))
    idx, targets = batch(2, 8)
    torch.manual_seed(5)
    want = gradients(model, idx, targets)
    calls = []
    for block in model.transformer.h:
        block.attn.register_forward_hook(lambda *_: calls.append(1))
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    torch.manual_seed(5)
    assert_same(gradients(model, idx, targets), want)
    assert len(calls) == 2 * len(model.transformer.h)  # each block ran twice


def test_compile(backend):
    """In fp16 the graph makes the shadows of the parameters, and then follows them."""
    model = spread(make(torch.float16 if backend == "triton" else torch.float32, bias=True, n_layer=1))
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    want = train(model, 2)
    torch.testing.assert_close(train(compiled, 2), want)
    assert want[1] < want[0] - 0.05
    for ours, theirs in zip(compiled.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.triton
def test_training_on_triton_equals_the_reference():
    ours, reference = (spread(make(bias=True)) for _ in range(2))
    reference.load_state_dict(ours.state_dict())
    dispatch.use("torch")
    want = train(reference, 4)
    dispatch.use("triton")
    for op in ("attention", "layer_norm", "gelu_mlp", "cross_entropy", "embedding"):
        assert dispatch.choose(op, DEVICE) == "triton"
    got = train(ours, 4)
    assert want[-1] < want[0] - 0.2
    assert max(abs(a - b) for a, b in zip(got, want)) < 1e-4, (got, want)


def ddp_gradients(rank: int, directory: str, model: GPT, idx, targets) -> None:
    """One of two processes, on its half of the batch."""
    torch.set_num_threads(1)
    dispatch.use("triton")
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    half = slice(rank * len(idx) // 2, (rank + 1) * len(idx) // 2)
    found = gradients(DistributedDataParallel(model), idx[half], targets[half])
    torch.save({name.removeprefix("module."): t for name, t in found.items()}, f"{directory}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.triton
@pytest.mark.skipif(not INTERPRET, reason="two processes, of which one would need a second GPU")
def test_two_processes_average_their_gradients(tmp_path):
    dispatch.use("triton")
    model = spread(make(n_layer=1))
    idx, targets = batch(4, 6)
    want = gradients(model, idx, targets)
    model.zero_grad()
    mp.spawn(ddp_gradients, (str(tmp_path), copy.deepcopy(model), idx, targets), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    loss = torch.stack([found.pop("loss") for found in ranks]).mean()
    torch.testing.assert_close(loss, want.pop("loss"), rtol=1e-5, atol=1e-6)
    for found in ranks:
        assert_same(found, want)


def gpt2(dtype: torch.dtype, state: dict | None = None) -> GPT:
    with torch.device("cuda"):
        model = GPT(GPTConfig(bias=True, real_vocab_size=50257), dtype)
    if state is not None:
        model.load_state_dict(state)
    return model


@pytest.mark.gpu
def test_gpt2_step_in_bf16():
    """Every gradient of GPT-2 124M is as near to fp32 as the reference's in bf16; the step leaves shadows up to date."""
    B, T = 4, 1024
    idx, targets = torch.randint(50257, (2, B, T), device="cuda")
    targets[:, ::7] = -1
    ours = spread(gpt2(torch.bfloat16), 1.0)
    state = copy.deepcopy(ours.state_dict())
    dispatch.use("torch")
    exact = gradients(gpt2(torch.float32, state), idx, targets)
    plain = gradients(gpt2(torch.bfloat16, state), idx, targets)
    dispatch.use("auto")
    found = gradients(ours, idx, targets)
    loss = exact.pop("loss")
    # A mean of independently rounded losses; PyTorch's own error in it is a matter of luck.
    rounding = torch.finfo(torch.bfloat16).eps * loss.item() / math.sqrt((targets >= 0).sum().item())
    torch.testing.assert_close(found["loss"], loss, rtol=0, atol=rounding)
    for name, t in exact.items():
        error, allowed = (found[name] - t).norm().item(), 2 * (plain[name] - t).norm().item()
        assert error <= allowed + 1e-6, f"{name}: error {error:.3g} > {allowed:.3g} allowed"
    optimizer = AdamW(ours.decay_groups(), lr=1e-3)
    norm = optimizer.step(max_norm=1.0)
    assert norm.isfinite()
    assert hasattr(ours.lm_head.weight, "shadow")
    for name, p in ours.named_parameters():
        if hasattr(p, "shadow"):
            assert torch.equal(p.shadow, p.bfloat16()), name
            assert shadow(p, torch.bfloat16) is p.shadow, name
    assert ours(idx, targets)[1] < found["loss"]


@pytest.mark.gpu
@pytest.mark.parametrize("T", [128, 100])
def test_graph_capture_of_a_whole_step(T):
    shape = {"block_size": 128, "vocab_size": 512, "n_layer": 2, "n_head": 2, "n_embd": 128}
    eager = GPT(GPTConfig(**shape), torch.bfloat16).to(DEVICE)
    captured = copy.deepcopy(eager)
    idx, targets = torch.empty(2, 8, T, dtype=torch.int64, device=DEVICE)

    def stepper(model):
        optimizer = AdamW(model.decay_groups(), lr=1e-3)

        def step():
            _, loss = model(idx, targets)
            loss.backward()
            return loss.detach(), optimizer.step(max_norm=1.0)

        return step

    def load(step):
        for buffer, values in zip((idx, targets), batch(8, T, 512, seed=step)):
            buffer.copy_(values)

    eager_step, captured_step = stepper(eager), stepper(captured)
    want, got = [], []
    for i in range(8):
        load(i)
        want.append([t.item() for t in eager_step()])
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # compiles the kernels and makes the gradients
        for i in range(3):
            load(i)
            got.append([t.item() for t in captured_step()])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = captured_step()
    for i in range(3, 8):
        load(i)
        graph.replay()
        got.append([t.item() for t in results])
    torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=1e-3, atol=1e-3)
    assert want[-1][0] < want[0][0]


@pytest.mark.gpu
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_compile_on_a_gpu(dropout):
    """Inductor: losses of some steps as without it; with dropout it runs and learns."""
    shape = {"block_size": 128, "vocab_size": 512, "n_layer": 2, "n_head": 2, "n_embd": 128, "dropout": dropout}
    models = [GPT(GPTConfig(**shape), torch.bfloat16).to(DEVICE)]
    models.append(copy.deepcopy(models[0]))
    curves = []
    for model, forward in zip(models, (models[0], torch.compile(models[1], fullgraph=True))):
        optimizer = AdamW(model.decay_groups(), lr=1e-3)
        curves.append([])
        for i in range(8):
            _, loss = forward(*batch(8, 128, 512, seed=i))
            loss.backward()
            optimizer.step(max_norm=1.0)
            curves[-1].append(loss.item())
    if not dropout:
        torch.testing.assert_close(torch.tensor(curves[0]), torch.tensor(curves[1]), rtol=1e-3, atol=1e-3)
    assert all(curve[-1] < curve[0] - 0.1 for curve in curves)
