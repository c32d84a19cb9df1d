"""fp32 products from pairs of bfloat16 numbers on CPUs with AMX: `linear.mm` under float32_matmul_precision "high"."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from kernels import dispatch, extension
from kernels.linear import linear, mm
from nanogpt.config import GPTConfig
from nanogpt.model import GPT

if dispatch.interpreting() or extension.unavailable("linear", "cpp") or not torch.ops.nanogpt.cpu_has_amx():
    pytest.skip("needs the compiled CPU kernels on a CPU with AMX", allow_module_level=True)

# hi keeps 8 significant bits of x, lo 8 of the rest: each is off by 2^-8 of what it rounds at most, so that lo_a lo_b, which is
# left out, and the rounding of lo_a and lo_b are 2^-16 of the product each.
SPLIT = 3 * 2.0**-16


@pytest.fixture(autouse=True)
def high(_defaults):
    torch.set_float32_matmul_precision("high")


def assert_product(got, a, b, bias=0.0):
    a, b = a.double(), b.double()
    size = a.abs() @ b.abs()  # (M, N)
    bound = (SPLIT + a.shape[1] * 2.0**-24) * size + 2.0**-22 * torch.as_tensor(bias, dtype=torch.float64).abs()
    error = (got.double() - (a @ b + bias)).abs()
    assert (error <= bound).all(), f"{(error / bound).max():.3f} times the bound"


def matrix(rows, columns, transposed=False, padding=0):
    """N(0, 1), its rows (or columns) `padding` elements further apart than they are long."""
    shape = (columns, rows + padding) if transposed else (rows, columns + padding)
    whole = torch.randn(shape)
    return whole[:, :rows].t() if transposed else whole[:, :columns]


SHAPES = [
    (32, 1, 1), (33, 2, 31), (32, 32, 32), (37, 65, 50), (64, 31, 33), (100, 33, 257), (257, 300, 65), (300, 513, 290),
    (768, 128, 65),
]  # fmt: skip


@pytest.mark.parametrize(("M", "K", "N"), SHAPES, ids=str)
@pytest.mark.parametrize("transposed", ["nn", "nt", "tn", "tt"])
def test_product(M, K, N, transposed):
    a, b = matrix(M, K, transposed[0] == "t"), matrix(K, N, transposed[1] == "t")
    got = mm(a, b)
    assert_product(got, a, b)
    assert K < 2 or not torch.equal(got, a @ b), "this is PyTorch's own product"


@pytest.mark.parametrize("transposed", ["nn", "nt", "tn", "tt"])
def test_rows_further_apart_than_they_are_long(transposed):
    a, b = matrix(45, 70, transposed[0] == "t", padding=3), matrix(70, 52, transposed[1] == "t", padding=5)
    whole = torch.full((45, 60), torch.nan)
    mm(a, b, out=whole[:, :52])
    assert_product(whole[:, :52], a, b)
    assert whole[:, 52:].isnan().all(), "written outside of the matrix"


def test_neither_stride_is_one():
    a, b = torch.randn(40, 60)[:, ::2], torch.randn(60, 64)[::2, ::2]
    assert_product(mm(a, b), a, b)


def test_bias_and_sum():
    a, b, bias = torch.randn(70, 600), torch.randn(600, 45), torch.randn(45)
    assert_product(mm(a, b, bias), a, b, bias.double())
    once = mm(a, b)
    twice = mm(a, b, out=once.clone(), add=True)
    assert_product(twice - once, a, b)
    both = once.clone()
    torch.ops.nanogpt.split_mm_(both, a, b, bias, True)
    assert_product(both - once, a, b, bias.double())


def test_factors_are_rounded_to_nearest():
    """Cut off instead, these would leave 2^-14 of each product out, and always the same way."""
    a = torch.full((32, 64), 1 + 2.0**-7 - 2.0**-23)
    assert_product(mm(a, a.t()), a, a.t())


def test_expanded_bias():
    a, b, bias = torch.randn(40, 33), torch.randn(33, 45), torch.randn(1).expand(45)
    assert_product(mm(a, b, bias), a, b, bias.double())


def test_autocast_is_pytorchs():
    x, weight = torch.randn(64, 48), torch.randn(40, 48)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16


def test_no_result_depends_on_the_number_of_threads():
    a, b = torch.randn(770, 600).t().contiguous().t(), torch.randn(600, 500)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 6):
            torch.set_num_threads(threads)
            results.append(mm(a, b))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], result) for result in results[1:])


@pytest.mark.parametrize("transposed", ["nn", "nt", "tn", "tt"])
@pytest.mark.parametrize("bits", [0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF], ids=hex)
def test_what_is_not_finite_stays_so(bits, transposed):
    value = torch.tensor(bits, dtype=torch.uint32).view(torch.float32)
    a, b = matrix(40, 40, transposed[0] == "t"), matrix(40, 40, transposed[1] == "t")
    wrong = a.clone()
    wrong[3, 5] = value
    got = mm(wrong, b)
    assert not got[3].isfinite().any()
    assert got[torch.arange(40) != 3].isfinite().all()
    wrong = b.clone()
    wrong[5, 3] = value
    got = mm(a, wrong)
    assert not got[:, 3].isfinite().any()
    assert got[:, torch.arange(40) != 3].isfinite().all()


def test_small_and_large_numbers():
    a, b = torch.randn(32, 64), torch.randn(64, 32)
    for scale in (2.0**-60, 2.0**100):
        assert_product(mm(a * scale, b) / scale, a, b)


@pytest.mark.parametrize("case", ["highest", "few rows", "float64"])
def test_left_to_pytorch(case):
    a, b = torch.randn(31 if case == "few rows" else 64, 48), torch.randn(48, 40)
    if case == "highest":
        torch.set_float32_matmul_precision("highest")
    if case == "float64":
        a, b = a.double(), b.double()
    assert torch.equal(mm(a, b), a @ b)


def test_kernels_torch_is_plain_pytorch():
    x, weight = torch.randn(64, 48), torch.randn(40, 48)
    dispatch.use("torch")
    assert torch.equal(linear(x, weight), F.linear(x, weight))
    dispatch.use("cpp")
    assert not torch.equal(linear(x, weight), F.linear(x, weight))


def test_linear_gradients():
    x, weight, bias, dy = torch.randn(3, 40, 65), torch.randn(50, 65), torch.randn(50), torch.randn(3, 40, 50)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    y = linear(*leaves)
    y.backward(dy)
    rows, drows = x.flatten(0, 1), dy.flatten(0, 1)
    assert_product(y.detach().flatten(0, 1), rows, weight.t(), bias.double())
    assert_product(leaves[0].grad.flatten(0, 1), drows, weight)
    assert_product(leaves[1].grad, drows.t(), rows)
    torch.testing.assert_close(leaves[2].grad, drows.sum(0))


@pytest.mark.parametrize("bias", [False, True], ids=["nobias", "bias"])
def test_model(bias):
    """Loss and gradients of a GPT: two orders of magnitude nearer to fp64 than TF32's 2^-11 would be."""
    config = GPTConfig(block_size=40, vocab_size=70, n_layer=2, n_head=2, n_embd=48, bias=bias)
    torch.manual_seed(0)
    model = GPT(config, torch.float32)
    idx, targets = torch.randint(70, (3, 40)), torch.randint(70, (3, 40))

    def step():
        model.zero_grad()
        loss = model(idx, targets)[1]
        loss.backward()
        return loss.item(), [p.grad.double() for p in model.parameters()]

    loss, gradients = step()
    torch.set_float32_matmul_precision("highest")
    exact_loss, exact = step()
    assert loss == pytest.approx(exact_loss, rel=2e-6)
    assert loss != exact_loss or any(not torch.equal(a, b) for a, b in zip(gradients, exact))
    for got, want in zip(gradients, exact):
        assert (got - want).norm() <= 2.0**-14 * want.norm()


def test_compile():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=70, n_layer=1, n_head=2, n_embd=32), torch.float32)
    idx = torch.randint(70, (2, 32))
    loss = model(idx, idx)[1]
    loss.backward()
    want = model.transformer.wte.weight.grad.clone()
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    again = compiled(idx, idx)[1]
    again.backward()
    assert again.item() == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(model.transformer.wte.weight.grad, want)


@pytest.mark.parametrize("bias", [False, True], ids=["nobias", "bias"])
def test_opcheck(bias):
    args = torch.empty(40, 50), torch.randn(40, 33), torch.randn(50, 33).t(), torch.randn(50) if bias else None, False
    torch.library.opcheck(torch.ops.nanogpt.split_mm_, args)


@pytest.mark.parametrize(
    ("out", "a", "b", "bias", "message"),
    [
        ((40, 50), (40, 33), (34, 50), None, r"\(40, 33\) times \(34, 50\)"),
        ((40, 51), (40, 33), (33, 50), None, r"into \(40, 51\)"),
        ((40, 50), (40, 33, 1), (33, 50), None, "a: expected a matrix"),
        ((40, 50), (40, 33), (33, 50), (49,), "bias: 49 values for 50 columns"),
        ((40, 50), (40, 0), (0, 50), None, "nothing to sum over"),
    ],
)
def test_wrong_shapes(out, a, b, bias, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.nanogpt.split_mm_(torch.empty(out), torch.empty(a), torch.empty(b), bias and torch.empty(bias), False)


def test_wrong_dtype_and_strides():
    a, b, out = torch.randn(40, 32), torch.randn(32, 40), torch.empty(40, 40)
    with pytest.raises(RuntimeError, match="a: expected Float, got Double"):
        torch.ops.nanogpt.split_mm_(out, a.double(), b, None, False)
    with pytest.raises(RuntimeError, match="b: strides"):
        torch.ops.nanogpt.split_mm_(out, a, torch.randn(64, 80)[::2, ::2], None, False)
    with pytest.raises(RuntimeError, match="out: expected rows"):
        torch.ops.nanogpt.split_mm_(out.t(), a, b, None, False)


def test_an_older_instruction_set_is_plain_pytorch():
    """As on a machine without AMX: NANOGPT_CPU asks for one."""
    code = (
        "import torch; from kernels.linear import mm; torch.set_float32_matmul_precision('high')\n"
        "a, b = torch.randn(64, 64), torch.randn(64, 64); assert torch.equal(mm(a, b), a @ b)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "NANOGPT_CPU": "avx512"})
