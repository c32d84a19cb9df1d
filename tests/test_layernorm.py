"""LayerNorm and the residual addition before it: `kernels.layernorm`."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from kernels import configs, layernorm
from kernels.layernorm import layer_norm, layer_norm_ref, layer_norm_residual, layer_norm_residual_ref
from tests.helpers import DEVICE, DTYPES, assert_as_accurate, dtype_id, poisoned, strided

SHAPES = [(1, 768), (37, 768), (129, 33), (5, 1600), (3, 8192)]


def torch_layer_norm(x, residual, weight, bias):
    """Plain PyTorch in the dtype of its arguments."""
    r = x if residual is None else residual + x
    return F.layer_norm(r, r.shape[-1:], weight, bias), r


def make(M, C, dtype, residual=True, bias=True):
    """x, residual, weight, bias and the two incoming gradients, far from mean 0 and variance 1."""
    x, dy, dr = (torch.randn(M, C, device=DEVICE).to(dtype) for _ in range(3))
    stream = (3 * torch.randn(M, C, device=DEVICE) + 5).to(dtype)
    weight = 1 + 0.3 * torch.randn(C, device=DEVICE)
    return [x, stream if residual else None, weight, torch.randn(C, device=DEVICE) if bias else None], [dy, dr]


def run(fn, inputs, grads):
    """Outputs and all gradients, in this order."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
    outputs = fn(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, [g.to(o.dtype) for o, g in zip(outputs, grads)])
    return [*(o.detach() for o in outputs), *(leaf.grad for leaf in leaves if leaf is not None)]


def cast(inputs, dtype):
    return [None if t is None else t.to(dtype) for t in inputs]


def compare(ours, inputs, grads, dtype):
    exact = run(torch_layer_norm, cast(inputs, torch.float64), grads)
    same = run(torch_layer_norm, cast(inputs, dtype), grads)
    if inputs[1] is None:  # one output
        exact, same = ([values[0], *values[2:]] for values in (exact, same))
    outputs = 1 if inputs[1] is None else 2
    for i, (a, b, c) in enumerate(zip(ours, same, exact)):
        assert_as_accurate(a, b, c, factor=2 if i < outputs else 3)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize(("M", "C"), SHAPES, ids=str)
def test_layer_norm_residual(M, C, bias, dtype):
    inputs, grads = make(M, C, dtype, bias=bias)
    with poisoned():
        ours = run(layer_norm_residual, inputs, grads)
    assert ours[0].dtype == ours[1].dtype == ours[2].dtype == dtype
    assert all(gradient.dtype == torch.float32 for gradient in ours[4:])
    compare(ours, inputs, grads, dtype)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize(("M", "C"), [(1, 7), (37, 768), (9, 1600)], ids=str)
def test_layer_norm(M, C, bias, dtype):
    inputs, grads = make(M, C, dtype, residual=False, bias=bias)
    with poisoned():
        ours = run(lambda x, _, w, b: layer_norm(x, w, b), inputs, grads[:1])
    compare(ours, inputs, [grads[0], torch.zeros_like(grads[1])], dtype)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
def test_references(bias):
    inputs, grads = make(9, 48, torch.float32, bias=bias)
    compare(run(layer_norm_residual_ref, inputs, grads), inputs, grads, torch.float32)
    inputs[1] = None
    ours = run(lambda x, _, w, b: layer_norm_ref(x, w, b), inputs, grads[:1])
    compare(ours, inputs, [grads[0], torch.zeros_like(grads[1])], torch.float32)


@pytest.mark.triton
def test_each_configuration_gives_the_same(monkeypatch):
    """Rows, programs and prefetching change nothing but the order of the parameter gradients' sums."""
    inputs, grads = make(53, 96, torch.float32)
    want = run(layer_norm_residual, inputs, grads)
    for rows, programs, stages in ((1, 3, 1), (4, 1, 2), (8, 100, 3)):
        config, bwd = {"BLOCK_M": rows, "num_warps": 4}, {"programs_per_sm": programs, "STAGES": stages}

        def select(op, *_, config=config, bwd=bwd):
            return config | (bwd if op == "layer_norm_bwd" else {})

        monkeypatch.setattr(configs, "select", select)
        for a, b in zip(run(layer_norm_residual, inputs, grads), want):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-5)


@pytest.mark.triton
def test_unused_outputs():
    """The gradient of an output that nothing consumes counts as zero."""
    inputs, grads = make(5, 64, torch.float32)
    zero = torch.zeros_like(grads[0])
    for used, full in ((0, [grads[0], zero]), (1, [zero, grads[1]])):
        leaves = [t.clone().requires_grad_() for t in inputs]
        layer_norm_residual(*leaves)[used].backward(grads[used])
        for leaf, want in zip(leaves, run(layer_norm_residual, inputs, full)[2:]):
            assert torch.equal(leaf.grad, want)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_noncontiguous(dtype):
    (x, r, weight, bias), (dy, dr) = make(12, 64, dtype)

    def columns(t):  # strided in both dimensions
        return t.t().contiguous().t()

    def rows(t):  # a slice of a wider matrix
        return torch.cat([t, t], 1)[:, : t.shape[1]]

    want = run(layer_norm_residual, [x, r, weight, bias], [dy, dr])
    for view in (columns, rows):
        got = run(lambda x, r, w, b, view=view: layer_norm_residual(view(x), view(r), w, b), [x, r, weight, bias], [dy, dr])
        assert all(torch.equal(a, b) for a, b in zip(got, want))
        alone = run(lambda x, w, b, view=view: layer_norm(view(x), w, b), [x, weight, bias], [dy])
        assert all(torch.equal(a, b) for a, b in zip(alone, run(layer_norm, [x, weight, bias], [dy])))
    expanded = x.detach().requires_grad_()
    layer_norm(expanded, weight).sum().backward()  # a stride-0 gradient
    assert torch.equal(expanded.grad, run(layer_norm, [x, weight], [torch.ones_like(dy)])[1])


@pytest.mark.triton
@pytest.mark.parametrize("which", range(4), ids=["x", "residual", "weight", "bias"])
def test_strided(which):
    inputs, (dy, dr) = make(12, 64, torch.float32)
    want = run(layer_norm_residual, inputs, [dy, dr])
    got = run(
        lambda *a: layer_norm_residual(*a[:which], strided(a[which]), *a[which + 1 :]), inputs, [strided(dy), strided(dr)]
    )
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.triton
def test_shapes_and_empty():
    x = torch.randn(2, 3, 4, 32, device=DEVICE)
    weight = torch.ones(32, device=DEVICE)
    y, r = layer_norm_residual(x, x, weight)
    assert y.shape == r.shape == x.shape
    empty = torch.randn(0, 32, device=DEVICE, requires_grad=True)
    leaf = weight.clone().requires_grad_()
    layer_norm(empty, leaf).sum().backward()
    assert empty.grad.shape == (0, 32)
    assert torch.equal(leaf.grad, torch.zeros_like(weight))


@pytest.mark.triton
def test_row_offsets_are_64_bit():
    """Rows 2^31 - 16 elements apart: in 32 bits row 2 would wrap around to 32 elements before row 0."""
    stride, C = 2**31 - 16, 32
    storage = torch.empty(64 + 2 * stride + C, dtype=torch.float16, device=DEVICE)
    storage[:64] = 0
    x = storage[64:].as_strided((3, C), (stride, 1))
    x.copy_(torch.randn(3, C))
    weight = torch.ones(C, device=DEVICE)
    dy = torch.randn(3, C, device=DEVICE).half()
    strided = x.detach().requires_grad_()
    y = layer_norm(strided, weight)
    y.backward(dy)
    want = run(layer_norm, [x.contiguous(), weight], [dy])
    assert torch.equal(y, want[0])
    assert torch.equal(strided.grad, want[1])


@pytest.mark.triton
def test_deterministic():
    inputs, grads = make(200, 96, torch.float32)
    first, second = (run(layer_norm_residual, inputs, grads) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def dropout_mask(p, shape, dtype=torch.float32):
    """What the op multiplies x by, read off with x = 1 and a residual of 0."""
    ones = torch.ones(shape, dtype=dtype, device=DEVICE)
    return layer_norm_residual(ones, torch.zeros_like(ones), torch.ones(shape[-1], device=DEVICE), dropout_p=p)[1]


@pytest.mark.triton
def test_dropout_mask():
    p, shape = 0.3, (64, 1000)
    torch.manual_seed(0)
    mask = dropout_mask(p, shape)
    assert set(mask.unique().tolist()) == {0.0, torch.tensor(1 / (1 - p)).item()}
    dropped = (mask == 0).float()
    for share, n in ((dropped.mean(), mask.numel()), (dropped.mean(0), shape[0]), (dropped.mean(1), shape[1])):
        assert (share - p).abs().max() < 5 * (p * (1 - p) / n) ** 0.5  # five standard deviations
    assert torch.corrcoef(mask).fill_diagonal_(0).abs().max() < 5 / shape[1] ** 0.5  # rows are independent
    torch.manual_seed(0)
    assert torch.equal(dropout_mask(p, shape), mask)
    assert not torch.equal(dropout_mask(p, shape), mask)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_dropout_gradients(dtype):
    inputs, grads = make(37, 96, dtype)

    def seeded(fn):
        torch.manual_seed(7)
        return fn()

    mask = seeded(lambda: dropout_mask(0.4, (37, 96)))
    ours = seeded(lambda: run(lambda *args: layer_norm_residual(*args, dropout_p=0.4), inputs, grads))
    exact = run(lambda x, *rest: torch_layer_norm(x * mask.to(x.dtype), *rest), cast(inputs, torch.float64), grads)
    same = run(lambda x, *rest: torch_layer_norm(x * mask.to(x.dtype), *rest), cast(inputs, dtype), grads)
    for i, (a, b, c) in enumerate(zip(ours, same, exact)):
        assert_as_accurate(a, b, c, factor=2 if i < 2 else 3)


@pytest.mark.triton
def test_dropout_under_checkpointing():
    inputs, grads = make(8, 64, torch.float32)
    results = []
    for wrap in (lambda fn, *args: fn(*args), lambda fn, *args: checkpoint(fn, *args, use_reentrant=False)):
        torch.manual_seed(3)
        results.append(
            run(lambda *args, wrap=wrap: wrap(lambda *a: layer_norm_residual(*a, dropout_p=0.5), *args), inputs, grads)
        )
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.triton
def test_no_dropout_draws_nothing():
    inputs, _ = make(2, 32, torch.float32)
    state = torch.get_rng_state() if DEVICE == "cpu" else torch.cuda.get_rng_state()
    layer_norm_residual(*inputs, dropout_p=0.0)
    assert torch.equal(state, torch.get_rng_state() if DEVICE == "cpu" else torch.cuda.get_rng_state())


@pytest.mark.triton
def test_opcheck():
    (x, r, weight, bias), (dy, dr) = make(5, 64, torch.float32)
    seed = torch.tensor([3], device=DEVICE)
    torch.library.opcheck(layernorm._layer_norm_fwd, (x, None, weight, bias, None, 1e-5, 0.0))
    torch.library.opcheck(layernorm._layer_norm_fwd, (x, None, weight, None, None, 1e-5, 0.0))
    torch.library.opcheck(layernorm._layer_norm_fwd, (x[None], r[None], weight, bias, None, 1e-5, 0.0))
    torch.library.opcheck(layernorm._layer_norm_fwd, (x, r, weight, bias, seed, 1e-5, 0.5))
    statistics = torch.rand(2, 5, device=DEVICE)
    torch.library.opcheck(layernorm._layer_norm_bwd, (dy, dr, r, weight, statistics, None, True, 0.0))
    torch.library.opcheck(layernorm._layer_norm_bwd, (dy, None, r, weight, statistics, seed, False, 0.5))


@pytest.mark.triton
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_compile(backend):
    inputs, grads = make(6, 64, torch.float32)

    def f(x, r, w, b):
        y, r = layer_norm_residual(x * 2, r, w, b)
        return layer_norm(y, w) + 1, r

    for a, b in zip(run(torch.compile(f, fullgraph=True, backend=backend), inputs, grads), run(f, inputs, grads)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # Inductor contracts x * 2 + r into one rounding


@pytest.mark.gpu
@pytest.mark.triton
def test_graph_capture():
    inputs, (dy, dr) = make(300, 768, torch.bfloat16)
    leaves = [t.requires_grad_() for t in inputs]

    def step():
        outputs = layer_norm_residual(*leaves, dropout_p=0.1)
        return [*outputs, *torch.autograd.grad(outputs, leaves, [dy, dr])]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    torch.manual_seed(5)
    graph.replay()
    first = [t.clone() for t in captured]
    graph.replay()
    assert not torch.equal(first[1], captured[1])  # each replay draws a new mask
    torch.manual_seed(5)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(first, captured))


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda x, w: layer_norm(x, w[:-1]), "weight of shape (31,) for 32 channels"),
        (lambda x, w: layer_norm(x, w, w[:-1]), "bias of shape (31,)"),
        (lambda x, w: layer_norm(torch.randn(1, 8193), torch.ones(8193)), "8193 channels, expected 1..8192"),
        (lambda x, w: layer_norm_residual(x, x.double(), w), "torch.float64"),
        (lambda x, w: layer_norm_residual(x, x[:1], w), "(1, 32)"),
        (lambda x, w: layer_norm_residual(x, x, w, dropout_p=1.0), "dropout_p=1.0"),
    ],
)
def test_errors(fn, message):
    with pytest.raises(ValueError) as error:
        fn(torch.randn(2, 32), torch.ones(32))
    assert message in str(error.value)
