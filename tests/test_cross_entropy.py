"""Cross-entropy, alone and behind the language-model head: `kernels.cross_entropy`."""

import pytest
import torch
import torch.nn.functional as F

from kernels import configs, dispatch
from kernels import cross_entropy as module
from kernels.cross_entropy import cross_entropy, cross_entropy_ref, linear_cross_entropy, linear_cross_entropy_ref
from tests.helpers import DEVICE, DTYPES, assert_as_accurate, dtype_id, poisoned, strided


@pytest.fixture(params=["triton", "cpp", pytest.param("cuda", marks=pytest.mark.gpu)])
def backend(request):
    """Runs a test on every implementation of the row kernel that this machine has."""
    missing = dispatch._unavailable("cross_entropy", request.param, DEVICE)
    if missing:
        pytest.skip(missing)
    dispatch.use(request.param)
    return request.param


def torch_cross_entropy(logits, targets, vocab_size):
    return F.cross_entropy(
        logits[:, :vocab_size].to(torch.promote_types(logits.dtype, torch.float32)), targets, ignore_index=-1
    )


def make(M, C, V, vocab_size, dtype, ignored=0.2):
    """x, weight, targets; logits of standard deviation ~3, so that some targets have p near 1 and most near 0."""
    x = torch.randn(M, C, device=DEVICE).to(dtype)
    weight = torch.randn(V, C, device=DEVICE) * (3 / C**0.5)
    targets = torch.randint(0, vocab_size, (M,), device=DEVICE)
    targets[torch.rand(M, device=DEVICE) < ignored] = -1
    targets[0], targets[-1] = vocab_size - 1, 0
    return x, weight, targets


def run(fn, *inputs, dloss=1.0):
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    loss = fn(*leaves)
    loss.backward(torch.tensor(dloss, dtype=loss.dtype, device=loss.device))
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


def compare(ours, x, weight, targets, vocab_size, dloss=1.0):
    """Against plain PyTorch in x's dtype and in fp64."""

    def head(dtype):
        args = x.to(dtype), weight.to(dtype)
        return run(lambda x, w: torch_cross_entropy(x @ w.t(), targets, vocab_size), *args, dloss=dloss)

    for i, (a, b, c) in enumerate(zip(ours, head(x.dtype), head(torch.float64))):
        assert_as_accurate(a, b, c, factor=3 if i else 2)


@pytest.mark.triton
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(
    ("M", "V", "vocab_size", "chunk_rows"),
    [
        (1, 65, 65, None),
        (37, 512, 500, 10),
        (33, 512, 512, 32),
        (129, 127, 100, 128),
        (6, 50304, 50257, 4),
        (3, 50257, 50257, None),
        (5, 4160, 4097, 5),
    ],
    ids=str,
)
def test_linear_cross_entropy(M, V, vocab_size, chunk_rows, dtype):
    x, weight, targets = make(M, 48, V, vocab_size, dtype)
    with poisoned():
        ours = run(lambda x, w: linear_cross_entropy(x, w, targets, -1, vocab_size, chunk_rows), x, weight, dloss=2.5)
    assert ours[0].dtype == ours[2].dtype == torch.float32
    assert ours[1].dtype == dtype
    compare(ours, x, weight, targets, vocab_size, dloss=2.5)
    assert torch.equal(ours[2][vocab_size:], torch.zeros_like(weight[vocab_size:]))
    assert torch.equal(ours[1][targets == -1], torch.zeros_like(x[targets == -1]))


@pytest.mark.triton
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(
    ("M", "V", "vocab_size"),
    [(1, 2, 2), (37, 130, 100), (3, 50304, 50257), (4, 4096, 4096), (2, 8193, 8193)],
    ids=str,
)
def test_cross_entropy(M, V, vocab_size, dtype):
    logits = (3 * torch.randn(M, V, device=DEVICE)).to(dtype)
    targets = torch.randint(0, vocab_size, (M,), device=DEVICE)
    targets[0] = vocab_size - 1
    targets[1::3] = -1

    def both(fn, dtype):
        return run(lambda logits: fn(logits * 1, targets, vocab_size=vocab_size), logits.to(dtype), dloss=0.5)

    with poisoned():
        ours = both(cross_entropy, dtype)
    for i, (a, b, c) in enumerate(zip(ours, both(torch_cross_entropy, dtype), both(torch_cross_entropy, torch.float64))):
        assert_as_accurate(a, b, c, factor=3 if i else 2)
    assert torch.equal(ours[1][:, vocab_size:], torch.zeros_like(logits[:, vocab_size:]))


@pytest.mark.parametrize("vocab_size", [40, None])
def test_references(vocab_size):
    x, weight, targets = make(9, 16, 48, 40, torch.float32)
    ours = run(lambda x, w: linear_cross_entropy_ref(x, w, targets, vocab_size=vocab_size), x, weight)
    compare(ours, x, weight, targets, 48 if vocab_size is None else vocab_size)
    assert torch.equal(cross_entropy_ref(x @ weight.t(), targets, vocab_size=vocab_size), ours[0])


@pytest.mark.triton
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_gradient_overwrites_logits(dtype):
    """In place, and not yet divided by n_valid, which would underflow in fp16."""
    logits = torch.randn(5, 96, device=DEVICE).to(dtype)
    targets = torch.tensor([3, -1, 0, 79, 5], device=DEVICE)
    before = logits.clone()
    cross_entropy(logits, targets, vocab_size=80)
    assert torch.equal(logits, before)  # no gradient needed, nothing written
    leaf = before.clone().requires_grad_()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            cross_entropy(leaf, targets, vocab_size=80)
        assert torch.equal(leaf, before)
    hidden = before.clone().requires_grad_() * 1
    loss = cross_entropy(hidden, targets, vocab_size=80)
    want = torch.zeros(before.shape, device=DEVICE)
    want[:, :80] = before[:, :80].float().softmax(1)
    want[range(5), targets] -= 1
    want[1] = 0
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(hidden.detach().float(), want, rtol=max(rounding, 1e-5), atol=1e-6)
    address = hidden.data_ptr()
    (gradient,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    assert gradient.data_ptr() == address
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, hidden)


@pytest.mark.triton
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("fn", [linear_cross_entropy, linear_cross_entropy_ref], ids=["ours", "torch"])
def test_all_targets_ignored(fn):
    x, weight, targets = make(5, 16, 64, 60, torch.float32)
    targets.fill_(-1)
    for t in run(lambda x, w: fn(x, w, targets, vocab_size=60), x, weight, dloss=3.0):
        assert torch.equal(t, torch.zeros_like(t))
    logits, *_ = make(5, 64, 1, 1, torch.float32)
    for t in run(lambda x: cross_entropy(x * 1, targets), logits):
        assert torch.equal(t, torch.zeros_like(t))


@pytest.mark.triton
@pytest.mark.usefixtures("backend")
def test_ignore_index():
    x, weight, targets = make(7, 16, 64, 64, torch.float32)
    other = targets.clone()
    other[targets == -1] = 5
    targets[targets == 5] = -1
    other[targets == -1] = 5
    a, b = (run(lambda x, w, t=t, i=i: linear_cross_entropy(x, w, t, i), x, weight) for t, i in ((targets, -1), (other, 5)))
    assert all(torch.equal(u, v) for u, v in zip(a, b))


@pytest.mark.triton
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("target", [100, 64, 60, -2])
def test_target_outside_the_vocabulary(target):
    x, weight, targets = make(4, 16, 64, 60, torch.float32)
    targets[2] = target
    assert linear_cross_entropy(x, weight, targets, vocab_size=60).isnan()


@pytest.mark.triton
@pytest.mark.usefixtures("backend")
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy on inf - inf, in the interpreter
def test_extreme_logits():
    """Logits far beyond exp's range; a row of equal logits; -inf as a mask; an infinite or NaN logit is not hidden."""
    inf = float("inf")
    logits = torch.tensor([[1e4, -1e4, 0, 9e3], [-3e4, -3e4, -3e4, -3e4], [-inf, 2, -inf, 2]], device=DEVICE)
    targets = torch.tensor([0, 2, 1], device=DEVICE)
    ours, want = (run(lambda x, fn=fn: fn(x * 1, targets), logits) for fn in (cross_entropy, cross_entropy_ref))
    torch.testing.assert_close(ours, want, rtol=1e-6, atol=1e-7)
    for bad in (inf, float("nan")):
        logits[0, 3] = bad
        assert not cross_entropy(logits, targets).isfinite()


@pytest.mark.triton
@pytest.mark.usefixtures("backend")
def test_frozen_inputs():
    """Only the gradients that are asked for; none of them without grad mode."""
    x, weight, targets = make(9, 16, 64, 64, torch.float32)
    loss, dx, dw = run(lambda x, w: linear_cross_entropy(x, w, targets), x, weight)
    for a, b, want in ((x.clone().requires_grad_(), weight, dx), (x, weight.clone().requires_grad_(), dw)):
        again = linear_cross_entropy(a, b, targets)
        assert torch.equal(again, loss)
        again.backward()
        assert torch.equal(a.grad if a.requires_grad else b.grad, want)
    with torch.no_grad():
        again = linear_cross_entropy(x.requires_grad_(), weight, targets)
    assert torch.equal(again, loss)
    assert not again.requires_grad


@pytest.mark.triton
def test_loss_scale_beyond_fp16():
    """dloss / n_valid is applied in fp32: 2^16 is infinite in fp16."""
    x, weight, targets = make(4, 16, 64, 64, torch.float16, ignored=0)
    weight *= 0.01
    _, dx, dw = run(lambda x, w: linear_cross_entropy(x, w, targets), x, weight)
    _, scaled_dx, scaled_dw = run(lambda x, w: linear_cross_entropy(x, w, targets), x, weight, dloss=2.0**18)
    torch.testing.assert_close(scaled_dx.float() / 2**18, dx.float(), rtol=torch.finfo(x.dtype).eps, atol=1e-7)
    assert torch.equal(scaled_dw / 2**18, dw)


@pytest.mark.triton
def test_second_backward():
    x, weight, targets = make(9, 16, 64, 64, torch.float32)
    x.requires_grad_()
    loss = linear_cross_entropy(x, weight, targets)
    first = torch.autograd.grad(loss, x, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(loss, x)[0])


@pytest.mark.triton
def test_parameter_in_the_compute_dtype():
    """As under FSDP2's mixed precision: no shadow, and the gradient in the parameter's dtype."""
    x, weight, targets = make(9, 16, 64, 64, torch.float16)
    want = run(lambda x, w: linear_cross_entropy(x, w, targets), x, weight.half().float())
    loss, dx, dw = run(lambda x, w: linear_cross_entropy(x, w, targets), x, weight.half())
    assert torch.equal(loss, want[0])
    assert torch.equal(dx, want[1])
    assert torch.equal(dw, want[2].half())


@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_chunks_change_nothing(dtype):
    """dW is accumulated in fp32, so that many chunks are as good as one."""
    x, weight, targets = make(70, 24, 130, 130, dtype)
    for chunk_rows in (1, 7, 70, 1000):
        compare(
            run(lambda x, w, n=chunk_rows: linear_cross_entropy(x, w, targets, chunk_rows=n), x, weight),
            x,
            weight,
            targets,
            130,
        )


@pytest.mark.triton
@pytest.mark.usefixtures("backend")
def test_noncontiguous():
    x, weight, targets = make(24, 16, 64, 64, torch.float32)
    want = run(lambda x, w: linear_cross_entropy(x, w, targets), x, weight)
    got = run(lambda x, w: linear_cross_entropy(x.t().contiguous().t(), w, strided(targets)), x, weight)
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    got = run(lambda x, w: linear_cross_entropy(strided(x), strided(w), strided(targets)), x, weight)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    batched = run(lambda x, w: linear_cross_entropy(x.view(4, 6, 16), w, targets.view(4, 6)), x, weight)
    assert all(torch.equal(a, b) for a, b in zip(batched, want))
    logits = x @ weight.t()
    plain = [
        run(lambda t, f=f: cross_entropy(f(t), targets), logits)
        for f in (lambda t: t * 1, lambda t: (t * 1).t().contiguous().t(), strided)
    ]
    assert all(torch.equal(a, b) for other in plain[1:] for a, b in zip(plain[0], other))


@pytest.mark.triton
def test_row_offsets_are_64_bit():
    """Rows 2^31 - 16 elements apart: in 32 bits row 2 would wrap around to 32 elements before row 0."""
    stride, V = 2**31 - 16, 32
    storage = torch.empty(64 + 2 * stride + V, dtype=torch.float16, device=DEVICE)
    storage[:64] = 0
    logits = storage[64:].as_strided((3, V), (stride, 1))
    logits.copy_(torch.randn(3, V))
    dense, targets = logits.contiguous(), torch.tensor([1, 2, 3], device=DEVICE)
    losses = torch.empty(2, 3, device=DEVICE)
    for rows, out in ((logits, losses[0]), (dense, losses[1])):
        module._rows_triton(rows, targets, out, -1, V, True)
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(logits, dense)


@pytest.mark.triton
def test_each_configuration_gives_the_same(monkeypatch):
    x, weight, targets = make(5, 16, 1000, 900, torch.float32)
    want = run(lambda x, w: linear_cross_entropy(x, w, targets, vocab_size=900), x, weight)
    for block in (32, 256, 1024):
        monkeypatch.setattr(configs, "select", lambda *_, block=block: {"BLOCK_V": block, "num_warps": 4})
        for a, b in zip(run(lambda x, w: linear_cross_entropy(x, w, targets, vocab_size=900), x, weight), want):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.triton
def test_timing_candidates_leaves_the_logits_alone(monkeypatch):
    logits, targets, losses = (
        torch.randn(5, 300, device=DEVICE),
        torch.arange(5, device=DEVICE),
        torch.empty(2, 5, device=DEVICE),
    )
    rows = [logits.clone(), logits.clone()]
    module._rows_triton(rows[0], targets, losses[0], -1, 300, True)

    def select(op, bucket, candidates, launch):
        for _ in range(2):
            launch(configs.lookup(op, bucket, 80))
        return configs.lookup(op, bucket, 80)

    monkeypatch.setattr(configs, "select", select)
    module._rows_triton(rows[1], targets, losses[1], -1, 300, True)
    assert torch.equal(*rows)
    assert torch.equal(*losses)


@pytest.mark.triton
@pytest.mark.usefixtures("backend")
def test_deterministic():
    x, weight, targets = make(64, 32, 700, 700, torch.float32)
    first, second = (run(lambda x, w: linear_cross_entropy(x, w, targets, chunk_rows=32), x, weight) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.triton
def test_opcheck():
    x, weight, targets = make(5, 16, 64, 60, torch.float32)
    for needs in ((True, True), (True, False), (False, True), (False, False)):
        torch.library.opcheck(module._linear_cross_entropy_fwd, (x, weight, targets, -1, 60, 3, *needs))
    torch.library.opcheck(module._cross_entropy_fwd, (torch.randn(5, 64, device=DEVICE), targets, -1, 60, True))


@pytest.mark.triton
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_compile(compiler, backend):
    x, weight, targets = make(9, 16, 64, 60, torch.float32)

    def head(x, w):
        return linear_cross_entropy(x * 2, w, targets, vocab_size=60, chunk_rows=4) * 3

    def plain(x, w):
        return cross_entropy(x @ w.t(), targets, vocab_size=60) * 3

    for fn in (head, plain):
        for a, b in zip(run(torch.compile(fn, fullgraph=True, backend=compiler), x, weight), run(fn, x, weight)):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.triton
def test_rows_beyond_two_to_the_31(backend):
    M, V = 42_750, 50_304  # the last 59 rows
    logits = torch.randn(M, V, device=DEVICE, dtype=torch.bfloat16)
    targets = torch.randint(V, (M,), device=DEVICE)
    last = logits[-100:].clone()
    losses = [torch.empty(n, device=DEVICE) for n in (M, 100)]
    module._rows(logits, targets, losses[0], -1, V, True)
    module._rows(last, targets[-100:], losses[1], -1, V, True)
    assert torch.equal(losses[0][-100:], losses[1])
    assert torch.equal(logits[-100:], last)


@pytest.mark.gpu
@pytest.mark.triton
@pytest.mark.usefixtures("backend")
def test_graph_capture():
    x, weight, targets = make(512, 256, 1024, 1000, torch.bfloat16)
    x.requires_grad_()
    weight = torch.nn.Parameter(weight)

    def step():
        loss = linear_cross_entropy(x, weight, targets, vocab_size=1000, chunk_rows=200)
        return [loss.detach(), *torch.autograd.grad(loss, [x, weight])]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        want = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, want))


@pytest.mark.gpu
@pytest.mark.triton
def test_memory_is_one_chunk():
    x, weight, targets = make(16384, 64, 32768, 32768, torch.bfloat16)
    x.requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy(x, weight, targets, chunk_rows=1024).backward()
    chunk = 1024 * 32768 * 2
    assert torch.cuda.max_memory_allocated() - before < 2 * chunk  # all logits are 16 chunks


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"vocab_size": 65}, "vocab_size=65, expected 1..64"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"chunk_rows": 0}, "chunk_rows=0"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, "targets of shape (3,) for rows of shape (4,)"),
        ({"targets": torch.zeros(4, dtype=torch.int32)}, "targets of dtype torch.int32, expected torch.int64"),
        ({"targets": torch.zeros(4, dtype=torch.int64, device="meta")}, "targets on meta, expected cpu"),
        ({"weight": torch.randn(64, 15)}, "x has 16 channels, weight 15"),
        ({"x": torch.randn(0, 16), "targets": torch.zeros(0, dtype=torch.int64)}, "no rows"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_errors(kwargs, message):
    arguments = {"x": torch.randn(4, 16), "weight": torch.randn(64, 16), "targets": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(ValueError) as error:
        linear_cross_entropy(**(arguments | kwargs))
    assert message in str(error.value)
