"""The extension's row kernels against PyTorch in fp64: cross-entropy on the device, LayerNorm and GELU on the CPU."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from kernels import cpu, extension
from kernels.attention import causal_attention_ref
from kernels.optimizer import grad_norm
from tests.helpers import DEVICE, assert_as_accurate, dtype_id, strided

BACKEND = "cuda" if DEVICE == "cuda" else "cpp"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _built():
    if missing := extension.unavailable("adamw", BACKEND):
        pytest.skip(missing)


def rows_case(n, v, vocab, dtype, scale=3.0):
    """Logits whose padding is poisoned, targets with an ignored row, and losses that must be overwritten."""
    logits = (torch.randn(n, v, device=DEVICE) * scale).to(dtype)
    logits[:, vocab:] = float("nan")
    targets = torch.randint(vocab, (n,), device=DEVICE)
    if n > 2:
        targets[1] = -1
    return logits, targets, torch.full((n,), float("nan"), device=DEVICE)


def rows_exact(logits, targets, vocab, dtype):
    """Losses and padded gradients of cross_entropy(reduction="sum") in `dtype`."""
    x = logits[:, :vocab].to(dtype).requires_grad_()
    losses = F.cross_entropy(x, targets, ignore_index=-1, reduction="none")
    losses.sum().backward()
    return losses.detach(), F.pad(x.grad, (0, logits.shape[1] - vocab))


ROWS = [(0, 8, 8), (1, 1, 1), (5, 65, 65), (7, 128, 100), (33, 1000, 999), (3, 4097, 4097), (9, 50304, 50257)]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(("n", "v", "vocab"), ROWS, ids=lambda x: str(x))
def test_cross_entropy_rows(n, v, vocab, dtype):
    logits, targets, losses = rows_case(n, v, vocab, dtype)
    exact_losses, exact_grads = rows_exact(logits, targets, vocab, torch.float64)
    plain_losses, plain_grads = rows_exact(logits, targets, vocab, dtype)
    before = logits.clone()
    torch.ops.nanogpt.cross_entropy_rows_(logits, targets, losses, -1, vocab, False)
    assert torch.equal(logits[:, :vocab], before[:, :vocab])
    loss_only = losses.clone()
    torch.ops.nanogpt.cross_entropy_rows_(logits, targets, losses, -1, vocab, True)
    assert torch.equal(loss_only, losses)
    if n:
        assert_as_accurate(losses, plain_losses, exact_losses, atol=2e-6)
        assert_as_accurate(logits, plain_grads, exact_grads, factor=3)
        assert logits[:, vocab:].eq(0).all()


def test_cross_entropy_rows_all_ignored():
    logits, targets, losses = rows_case(4, 96, 90, torch.float32)
    torch.ops.nanogpt.cross_entropy_rows_(logits, targets.fill_(7), losses, 7, 90, True)
    assert logits.eq(0).all()
    assert losses.eq(0).all()


@pytest.mark.parametrize("target", [-2, 90, 95, 2**40])
def test_cross_entropy_rows_target_out_of_range(target):
    """A corrupt token shows as a NaN loss, whatever lies in the padding, and touches no other row."""
    logits, targets, losses = rows_case(3, 96, 90, torch.float32)
    targets.fill_(5)
    targets[1] = target
    exact, _ = rows_exact(logits[::2], targets[::2], 90, torch.float64)
    torch.ops.nanogpt.cross_entropy_rows_(logits, targets, losses, -1, 90, True)
    assert losses[1].isnan()
    torch.testing.assert_close(losses[::2].double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_cross_entropy_rows_extreme_logits(dtype):
    """Large, equal and -inf logits."""
    logits = torch.zeros(4, 128, device=DEVICE, dtype=dtype)
    logits[0, 3] = 6e4
    logits[1] = -6e4
    logits[2, 1:] = float("-inf")
    logits[3] = torch.linspace(-100, 100, 128)
    targets = torch.tensor([3, 5, 0, 127], device=DEVICE)
    exact_losses, exact_grads = rows_exact(logits, targets, 128, torch.float64)
    plain_losses, plain_grads = rows_exact(logits, targets, 128, dtype)
    losses = torch.empty(4, device=DEVICE)
    torch.ops.nanogpt.cross_entropy_rows_(logits, targets, losses, -1, 128, True)
    assert_as_accurate(losses, plain_losses, exact_losses)
    assert_as_accurate(logits, plain_grads, exact_grads, factor=3)


def test_cross_entropy_rows_non_finite_row():
    logits = torch.zeros(2, 64, device=DEVICE)
    logits[0, 9] = float("nan")
    losses = torch.zeros(2, device=DEVICE)
    torch.ops.nanogpt.cross_entropy_rows_(logits, torch.zeros(2, dtype=torch.int64, device=DEVICE), losses, -1, 64, True)
    assert losses[0].isnan()
    assert losses[1].isfinite()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 3, 4), 6, 2, 4), "expected \\(rows, columns\\)"),
        ((torch.zeros(2, 4).double(), 2, 2, 4), "Double"),
        ((torch.zeros(4, 2).t(), 2, 2, 4), "contiguous"),
        ((torch.zeros(2, 4), 3, 2, 4), "targets: 3 values for 2 rows"),
        ((torch.zeros(2, 4), 2, 1, 4), "losses: 1 values for 2 rows"),
        ((torch.zeros(2, 4), 2, 2, 5), "vocab_size 5 outside"),
    ],
    ids=["dims", "dtype", "layout", "targets", "losses", "vocab"],
)
def test_cross_entropy_rows_checks(arguments, message):
    logits, targets, losses, vocab = arguments
    targets, losses = torch.zeros(targets, dtype=torch.int64, device=DEVICE), torch.zeros(losses, device=DEVICE)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.nanogpt.cross_entropy_rows_(logits.to(DEVICE), targets, losses, -1, vocab, True)


@pytest.mark.gpu
def test_cross_entropy_rows_beyond_int32():
    n, v = 42_720, 50_304  # n * v > 2^31
    logits = torch.zeros(n, v, device=DEVICE, dtype=torch.bfloat16)
    targets = torch.arange(n, device=DEVICE) % 50_257
    losses = torch.full((n,), float("nan"), device=DEVICE)
    torch.ops.nanogpt.cross_entropy_rows_(logits, targets, losses, -1, 50_257, True)
    torch.testing.assert_close(losses, torch.full_like(losses, 50_257).log(), rtol=1e-6, atol=0)
    assert logits[-1, targets[-1]].item() == pytest.approx(-1, rel=1e-2)
    assert logits[-1].argmin().item() == targets[-1].item()


MATRICES = [(0, 8), (1, 1), (5, 1), (3, 127), (64, 128), (257, 768)]


def matrix_id(shape):
    return f"{shape[0]}x{shape[1]}"


def layer_norm_exact(x, residual, weight, bias, dy, dr, dtype):
    """y, r, dx, dw, db of LayerNorm(x + residual) in `dtype`, the sum rounded as ours rounds it."""
    r = x if residual is None else x + residual
    r = r.to(dtype).requires_grad_()
    w, b = (t.to(dtype).requires_grad_() for t in (weight, bias))
    y = F.layer_norm(r, r.shape[-1:], w, b)
    dx, dw, db = torch.autograd.grad(y, (r, w, b), dy.to(dtype))
    return y.detach(), r.detach(), dx + dr.to(dtype), dw, db


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", MATRICES, ids=matrix_id)
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
def test_row_layer_norm(shape, dtype, with_residual):
    x, residual, dy, dr = (torch.randn(shape).to(dtype) for _ in range(4))
    x += 3.0  # a mean that a one-pass variance would lose digits on
    weight, bias = torch.randn(shape[1]), torch.randn(shape[1])
    residual = residual if with_residual else None
    y, r, statistics = torch.ops.nanogpt.row_layer_norm(x, residual, weight, bias, 1e-5)
    saved = r if with_residual else x
    dx, dw, db = torch.ops.nanogpt.row_layer_norm_backward(dy, dr, saved, weight, statistics, True)
    exact = layer_norm_exact(x, residual, weight, bias, dy, dr, torch.float64)
    plain = layer_norm_exact(x, residual, weight, bias, dy, dr, dtype)
    if with_residual:
        assert torch.equal(r, x + residual)
    names = ["y", "r", "dx", "dw", "db"]
    for name, ours, p, e in zip(names, (y, saved, dx, dw, db), plain, exact, strict=True):
        assert ours.dtype == (torch.float32 if name in ("dw", "db") else dtype)
        if e.numel():
            assert_as_accurate(ours, p, e, factor=3 if name[0] == "d" else 2, atol=2e-6)


def test_row_layer_norm_without_options():
    """No bias, no gradient from the stream: the same numbers as with zeros."""
    x, dy, weight = torch.randn(6, 40), torch.randn(6, 40), torch.randn(40)
    y, r, statistics = torch.ops.nanogpt.row_layer_norm(x, None, weight, None, 1e-5)
    zeros = torch.zeros_like(x)
    y0, _, _ = torch.ops.nanogpt.row_layer_norm(x, None, weight, torch.zeros(40), 1e-5)
    assert r.numel() == 0
    assert torch.equal(y, y0)
    dx, dw, db = torch.ops.nanogpt.row_layer_norm_backward(dy, None, x, weight, statistics, False)
    dx0, dw0, _ = torch.ops.nanogpt.row_layer_norm_backward(dy, zeros, x, weight, statistics, True)
    assert db.numel() == 0
    assert torch.equal(dx, dx0)
    assert torch.equal(dw, dw0)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", MATRICES, ids=matrix_id)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["no_bias", "bias"])
def test_gelu(shape, dtype, approximate, with_bias):
    x, dy = (torch.randn(shape) * 3).to(dtype), torch.randn(shape).to(dtype)
    bias = torch.randn(shape[1]) if with_bias else None

    def reference(in_dtype):
        pre = x.to(in_dtype)
        if with_bias:
            pre = (pre + bias).to(dtype).to(in_dtype)  # ours rounds the sum, as a linear layer with bias does
        pre.requires_grad_()
        y = F.gelu(pre, approximate=approximate)
        (dpre,) = torch.autograd.grad(y, pre, dy.to(in_dtype))
        return y.detach(), dpre, dpre.sum(0)

    exact, plain = reference(torch.float64), reference(dtype)
    y, dpre = x.clone(), dy.clone()
    derivative = torch.ops.nanogpt.gelu_(y, bias, approximate == "tanh", True)
    db = torch.ops.nanogpt.gelu_backward_(dpre, derivative, with_bias)
    assert db.shape == (shape[1] if with_bias else 0,)
    for ours, p, e, factor in zip((y, dpre, db), plain, exact, (2, 3, 3), strict=True):
        if ours.numel():
            assert_as_accurate(ours, p, e, factor=factor, atol=2e-6)
    alone = x.clone()
    assert torch.ops.nanogpt.gelu_(alone, bias, approximate == "tanh", False).numel() == 0
    assert torch.equal(alone, y)


@pytest.mark.parametrize("tanh", [False, True], ids=["erf", "tanh"])
def test_gelu_tails(tanh):
    """Far out the value is x or 0 and the derivative 1 or 0; a NaN stays one."""
    x = torch.tensor([-1e4, -60.0, -14.0, 0.0, 14.0, 60.0, 1e4, float("nan")])
    derivative = torch.ops.nanogpt.gelu_(x, None, tanh, True)
    assert x[:7].tolist() == pytest.approx([0, 0, 0, 0, 14, 60, 1e4], abs=1e-30)
    assert derivative[:7].tolist() == pytest.approx([0, 0, 0, 0.5, 1, 1, 1], abs=1e-30)
    assert x[7].isnan()
    assert derivative[7].isnan()


def attention_case(b, t, h, d, dtype):
    torch.manual_seed(b + t + h + d)
    return (torch.randn(b, t, 3 * h * d) * 1.5).to(dtype), torch.randn(b, t, h * d).to(dtype)


def attention_exact(qkv, dout, heads, dtype):
    """Output and gradient of PyTorch's causal attention in `dtype`."""
    b, t, c3 = qkv.shape
    x = qkv.to(dtype).requires_grad_()
    q, k, v = x.view(b, t, 3, heads, -1).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, c3 // 3)
    (dqkv,) = torch.autograd.grad(y, x, dout.to(dtype))
    return y.detach(), dqkv


# One token; one block of 16 less, exactly and more; head sizes off the vector width; GPT-2's.
HEADS = [(1, 1, 1, 1), (2, 15, 3, 7), (3, 16, 2, 16), (2, 17, 2, 33), (2, 64, 4, 32), (1, 130, 2, 64)]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", HEADS, ids=lambda s: "-".join(map(str, s)))
def test_head_attention(shape, dtype):
    (b, t, h, d), scale = shape, shape[3] ** -0.5
    qkv, dout = attention_case(*shape, dtype)
    out, lse = torch.ops.nanogpt.head_attention(qkv, h, scale)
    dqkv = torch.ops.nanogpt.head_attention_backward(dout, qkv, lse, h, scale)
    exact, plain = attention_exact(qkv, dout, h, torch.float64), attention_exact(qkv, dout, h, dtype)
    assert out.dtype == dqkv.dtype == dtype
    assert_as_accurate(out, plain[0], exact[0], atol=2e-6)
    assert_as_accurate(dqkv, plain[1], exact[1], factor=3, atol=2e-6)
    q, k, _ = qkv.double().view(b, t, 3, h, d).permute(2, 0, 3, 1, 4)
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(torch.ones(t, t).triu(1).bool(), float("-inf"))
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-6, atol=2e-6)


def test_head_attention_is_causal():
    """Later keys and values change no earlier output and get no gradient from it."""
    qkv, dout = attention_case(1, 40, 2, 8, torch.float32)
    out, lse = torch.ops.nanogpt.head_attention(qkv, 2, 0.3)
    dout[:, 20:] = 0
    assert torch.ops.nanogpt.head_attention_backward(dout, qkv, lse, 2, 0.3)[:, 20:].eq(0).all()
    qkv[:, 20:] = 1e3
    changed, _ = torch.ops.nanogpt.head_attention(qkv, 2, 0.3)
    assert torch.equal(changed[:, :20], out[:, :20])
    assert not torch.equal(changed[:, 20:], out[:, 20:])


def test_differentiable_functions():
    """kernels.cpu joins the ops correctly: output and every gradient of a transformer block."""
    torch.manual_seed(0)
    b, t, c, heads = 2, 9, 16, 2
    shapes = [(b, t, c), (c,), (c,), (3 * c, c), (4 * c, c), (4 * c,), (c, 4 * c), (c,)]
    leaves = [torch.randn(s) * 0.3 for s in shapes]

    def block(ops, x, w_ln, b_ln, w_qkv, w_fc, b_fc, w_proj, b_proj):
        layer_norm, layer_norm_residual, attention, gelu_mlp = ops
        branch = attention(F.linear(layer_norm(x, w_ln, b_ln), w_qkv))
        y, r = layer_norm_residual(branch, x, w_ln, b_ln)
        return gelu_mlp(y, w_fc, b_fc, w_proj, b_proj) + r

    ours = (
        lambda x, w, b: cpu.layer_norm(x, w, b, 1e-5),
        lambda x, r, w, b: cpu.layer_norm_residual(x, r, w, b, 1e-5, 0.0),
        lambda qkv: cpu.attention(qkv, heads, (c // heads) ** -0.5),
        lambda *args: cpu.gelu_mlp(*args, False),
    )
    plain = (
        lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b),
        lambda x, r, w, b: (F.layer_norm(x + r, x.shape[-1:], w, b), x + r),
        lambda qkv: causal_attention_ref(qkv, heads),
        lambda x, w_fc, b_fc, w_proj, b_proj: F.linear(F.gelu(F.linear(x, w_fc, b_fc)), w_proj, b_proj),
    )

    def run(ops, dtype):
        inputs = [p.to(dtype).requires_grad_() for p in leaves]
        y = block(ops, *inputs)
        return y.detach(), *torch.autograd.grad(y.square().sum(), inputs)

    for o, p, e in zip(run(ours, torch.float32), run(plain, torch.float32), run(plain, torch.float64), strict=True):
        assert_as_accurate(o, p, e, factor=3, atol=2e-6)


@pytest.mark.parametrize("op", ["layer_norm", "layer_norm_residual", "gelu_mlp", "attention"])
def test_differentiable_functions_of_strided_tensors(op):
    shapes = {"layer_norm": [(6, 16), (16,), (16,)], "layer_norm_residual": [(6, 16), (6, 16), (16,), (16,)]}
    shapes |= {"gelu_mlp": [(6, 16), (32, 16), (32,), (16, 32), (16,)], "attention": [(2, 9, 48)]}
    rest = {"layer_norm": (1e-5,), "layer_norm_residual": (1e-5, 0.0), "gelu_mlp": (False,), "attention": (2, 0.3)}[op]
    inputs = [torch.randn(shape) for shape in shapes[op]]

    def run(layout):
        leaves = [t.clone().requires_grad_() for t in inputs]
        outputs = getattr(cpu, op)(*map(layout, leaves), *rest)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.manual_seed(0)
        return *outputs, *torch.autograd.grad(outputs, leaves, [layout(torch.randn_like(y)) for y in outputs])

    for a, b in zip(run(strided), run(lambda t: t), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_results_do_not_depend_on_threads():
    x, dy, weight = torch.randn(300, 96), torch.randn(300, 96), torch.randn(96)
    grads = [torch.randn(50_000), torch.randn(7)]
    threads = torch.get_num_threads()

    def results(n):
        torch.set_num_threads(n)
        y, _, statistics = torch.ops.nanogpt.row_layer_norm(x, None, weight, None, 1e-5)
        return y, *torch.ops.nanogpt.row_layer_norm_backward(dy, None, x, weight, statistics, True), grad_norm(grads)

    try:
        one, three = results(1), results(3)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_id)
def test_16_bit_conversions_are_exact(dtype):
    """Every 16-bit value survives a round trip, and fp32 values round to nearest even."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    every = bits.view(dtype)
    run = every.clone()
    torch.ops.nanogpt.gelu_backward_(run, torch.ones_like(run), False)
    assert torch.equal(run[~every.isnan()], every[~every.isnan()])
    assert run[every.isnan()].isnan().all()
    values = torch.cat([torch.randn(1000) * 2.0**k for k in range(-30, 20)] + [torch.tensor([65519.0, 65520.0, 1e38, 3.4e38])])
    shadows = [torch.empty(values.numel(), dtype=dtype)]
    zeros = [torch.zeros_like(values) for _ in range(3)]
    lr = torch.zeros(())
    torch.ops.nanogpt.adamw_(
        [values], *([z] for z in zeros), shadows, lr, lr.clone(), [0.0], 0.9, 0.95, 1.0, None, 0.0, None, False
    )
    assert torch.equal(shadows[0], values.to(dtype))


INSTRUCTIONS = """
import sys, torch
from kernels import extension
assert not extension.unavailable("adamw", "cpp")
assert torch.ops.nanogpt.cpu_instructions() == sys.argv[1]
torch.manual_seed(0)
x = torch.randn(50, 300)
logits, losses = x.clone(), torch.empty(50)
torch.ops.nanogpt.cross_entropy_rows_(logits, torch.arange(50), losses, -1, 290, True)
y, _, statistics = torch.ops.nanogpt.row_layer_norm(x, None, torch.ones(300), None, 1e-5)
dx, _, _ = torch.ops.nanogpt.row_layer_norm_backward(x, None, x, torch.ones(300), statistics, False)
post = x.clone()
derivative = torch.ops.nanogpt.gelu_(post, None, False, True)
qkv = torch.randn(2, 50, 72)
out, lse = torch.ops.nanogpt.head_attention(qkv, 2, 0.3)
dqkv = torch.ops.nanogpt.head_attention_backward(out, qkv, lse, 2, 0.3)
torch.save([logits, losses, y, dx, post, derivative, out, lse, dqkv], sys.argv[2])
"""


def test_instruction_sets_agree(tmp_path):
    """Every instruction set that this machine has gives the baseline's numbers, up to the rounding of fused multiply-adds."""
    best = torch.ops.nanogpt.cpu_instructions()
    order = ["baseline", "avx2", "avx512", "amx"]
    results = []
    for name in order[: order.index(best) + 1]:
        file = tmp_path / name
        subprocess.run(
            [sys.executable, "-c", INSTRUCTIONS, name, str(file)], check=True, env={**os.environ, "NANOGPT_CPU": name}
        )
        results.append(torch.load(file, weights_only=True))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


FAULTS = """
import resource, sys, torch
from kernels import cpu
if sys.argv[1] == "keep": cpu.keep_memory()
def step():
    blocks = [torch.ones(2**18) for _ in range(80)]  # 80 MB, 20,480 pages
for _ in range(3): step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3): step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="the sanitizer has an allocator of its own")
def test_memory_is_kept():
    """Blocks that were freed are used again without a page fault; the system would have to give them anew otherwise."""

    def faults(how):
        command = [sys.executable, "-c", FAULTS, how]
        env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}  # glibc's first values
        return int(subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout)

    assert faults("keep") < 100 < 10_000 < faults("leave")


HUGE = """
import ctypes, re, sys
from pathlib import Path
from kernels import cpu
if sys.argv[1] == "keep": cpu.keep_memory()
block = ctypes.CDLL(None).malloc
block.restype = ctypes.c_void_p
address = block(ctypes.c_size_t(2**28))
for area in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())[1:]:
    first, last = (int(x, 16) for x in re.match("(\\w+)-(\\w+)", area).groups())
    if first <= address + 2**27 < last:
        print(" hg" in area.split("VmFlags:")[1])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="the sanitizer has an allocator of its own")
@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this kernel has no huge pages")
@pytest.mark.parametrize("how", ["keep", "leave"])
def test_memory_may_lie_in_huge_pages(how):
    """What is allocated after keep_memory is marked for huge pages; whether any are free is the system's affair."""
    command = [sys.executable, "-c", HUGE, how]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() == str(how == "keep")


def sample_inputs():
    def t(*shape):
        return torch.randn(*shape, device=DEVICE)

    params, grads, m, v = ([t(3, 5), t(7)] for _ in range(4))
    v = [x.square() for x in v]
    shadows = [p.half() for p in params]
    lr, step, norm = (torch.tensor(x, device=DEVICE) for x in (0.1, 2.0, 1.0))
    logits, targets, losses = rows_case(4, 96, 90, torch.float32)
    inputs = {
        "adamw_": (params, grads, m, v, shadows, lr, step, [0.0, 0.1], 0.9, 0.95, 1e-8, norm, 1.0, None, True),
        "grad_norm": (grads,),
        "cross_entropy_rows_": (logits.nan_to_num_(), targets, losses.zero_(), -1, 90, True),
    }
    if DEVICE == "cpu":
        inputs |= {
            "row_layer_norm": (t(5, 8), t(5, 8), t(8), t(8), 1e-5),
            "row_layer_norm_backward": (t(5, 8), t(5, 8), t(5, 8), t(8), t(5, 2), True),
            "gelu_": (t(5, 8), t(8), True, True),
            "gelu_backward_": (t(5, 8), t(5, 8), True),
            "head_attention": (t(2, 5, 24), 2, 0.5),
            "head_attention_backward": (t(2, 5, 8), t(2, 5, 24), t(2, 2, 5), 2, 0.5),
        }
    return inputs


@pytest.mark.parametrize("name", sample_inputs())
def test_opcheck(name):
    torch.library.opcheck(getattr(torch.ops.nanogpt, name).default, sample_inputs()[name])
