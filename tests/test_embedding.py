"""Token plus position embedding and its deterministic backward: `kernels.embedding`."""

import pytest
import torch
import torch.nn.functional as F

from kernels import configs
from kernels import embedding as module
from kernels.embedding import embedding, embedding_ref
from tests.helpers import DEVICE, DTYPES, assert_as_accurate, dtype_id, poisoned, strided

OFFSET = 3


def make(B, T, V, C, tokens="random"):
    """idx, wte, wpe with positions to spare on both sides, dy in fp32."""
    if tokens == "random":
        idx = torch.randint(0, V, (B, T), device=DEVICE)
    elif tokens == "one":
        idx = torch.full((B, T), V - 1, device=DEVICE)
    else:  # half of all positions hold one token, the rest are rare
        idx = torch.randint(0, V, (B, T), device=DEVICE)
        idx[torch.rand(B, T, device=DEVICE) < 0.5] = V // 2
    wte, wpe = torch.randn(V, C, device=DEVICE), torch.randn(T + 5, C, device=DEVICE)
    return idx, wte, wpe, torch.randn(B, T, C, device=DEVICE)


def run(fn, idx, wte, wpe, dy, dtype, **kwargs):
    """y, dwte, dwpe"""
    wte, wpe = (t.detach().clone().requires_grad_() for t in (wte, wpe))
    y = fn(idx, wte, wpe, dtype, offset=OFFSET, **kwargs)
    y.backward(dy.to(dtype))
    return [y.detach(), wte.grad, wpe.grad]


def torch_embedding(idx, wte, wpe, dy, dtype, mask=1.0):
    """Plain PyTorch with parameters, sum and gradients all in `dtype`, on the gradient the op sees."""
    wte, wpe = (t.detach().clone().to(dtype).requires_grad_() for t in (wte, wpe))
    y = (F.embedding(idx, wte) + F.embedding(torch.arange(OFFSET, OFFSET + idx.shape[1], device=DEVICE), wpe)) * mask
    y.backward(dy.to(dtype))
    return [y.detach(), wte.grad, wpe.grad]


def compare(ours, inputs, dtype, **kwargs):
    *tensors, dy = inputs
    same = torch_embedding(*tensors, dy, dtype, **kwargs)
    exact = torch_embedding(*tensors, dy.to(dtype).double(), torch.float64, **kwargs)
    for i, (a, b, c) in enumerate(zip(ours, same, exact)):
        assert_as_accurate(a, b, c, factor=3 if i else 2)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("tokens", ["random", "one", "frequent"])
@pytest.mark.parametrize(
    ("B", "T", "V", "C"),
    [(1, 1, 5, 32), (3, 37, 11, 48), (2, 129, 3, 33), (4, 32, 500, 300), (70, 1, 2, 64)],
    ids=lambda n: str(n),
)
def test_embedding(B, T, V, C, tokens, dtype):
    inputs = make(B, T, V, C, tokens)
    with poisoned():
        ours = run(embedding, *inputs, dtype)
    assert [t.dtype for t in ours] == [dtype, torch.float32, torch.float32]
    compare(ours, inputs, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_id)
def test_reference(dtype):
    inputs = make(3, 9, 11, 48)
    compare(run(embedding_ref, *inputs, dtype), inputs, dtype)


def runs_of(lengths):
    """Token ids 0, 1, ... occurring so many times, shuffled."""
    tokens = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return tokens[torch.randperm(len(tokens))][None].to(DEVICE)


@pytest.mark.triton
@pytest.mark.parametrize(
    "lengths",
    [
        [4, 4, 4],  # runs end where tiles do
        [3, 5, 1, 7],
        [1, 14, 1],  # begins in the first tile, ends in the last
        [16, 1],  # several whole tiles
        [0, 3, 0, 0, 10, 0],
        [90, 1, 2, 80],  # more partial sums than are loaded at a time
        [1] * 13,
    ],
    ids=lambda lengths: "-".join(map(str, lengths[:7])),
)
def test_runs_across_tiles(lengths, monkeypatch):
    monkeypatch.setattr(
        configs, "select", lambda op, *_: {"num_warps": 1} | ({"ROWS": 4, "BLOCK_C": 32} if "bwd" in op else {})
    )
    idx = runs_of(lengths)
    inputs = make(1, idx.shape[1], len(lengths), 40)
    dy = torch.randint(-8, 8, inputs[3].shape, device=DEVICE).float()  # exact sums
    with poisoned():
        _, dwte, dwpe = run(embedding, idx, *inputs[1:3], dy, torch.float32)
    want = torch.zeros_like(dwte).index_add_(0, idx[0], dy[0])
    assert torch.equal(dwte, want)
    assert torch.equal(dwpe[OFFSET : OFFSET + idx.shape[1]], dy[0])
    assert not dwpe[:OFFSET].any()
    assert not dwpe[OFFSET + idx.shape[1] :].any()


@pytest.mark.triton
def test_deterministic():
    """Bit by bit the same, also where one token is most of the batch."""
    inputs = make(2, 70, 7, 64, "frequent")
    first, second = (run(embedding, *inputs, torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.triton
def test_token_outside_the_vocabulary():
    """NaN in its row alone, and no gradient written anywhere."""
    idx, wte, wpe, dy = make(2, 40, 6, 32)
    idx[0, 3], idx[1, 7] = 6, -1
    inside = (idx >= 0) & (idx < 6)
    y, dwte, _ = run(embedding, idx, wte, wpe, dy, torch.float32)
    assert y[~inside].isnan().all()
    assert not y[inside].isnan().any()
    want = torch.zeros_like(dwte).index_add_(0, idx[inside], dy[inside])
    torch.testing.assert_close(dwte, want, rtol=1e-6, atol=1e-5)


@pytest.mark.triton
def test_noncontiguous():
    idx, wte, wpe, dy = make(4, 12, 6, 32)
    want = run(embedding, idx, wte, wpe, dy, torch.float32)
    got = run(embedding, idx.t().contiguous().t(), wte, wpe, dy.transpose(0, 1).contiguous().transpose(0, 1), torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    got = run(lambda *a, **keys: embedding(*map(strided, a[:3]), *a[3:], **keys), idx, wte, wpe, strided(dy), torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    leaf = wte.clone().requires_grad_()
    embedding(idx, leaf, wpe, torch.float32).sum().backward()  # a stride-0 gradient
    assert torch.equal(leaf.grad, torch.bincount(idx.flatten(), minlength=6)[:, None].expand(-1, 32).float())


@pytest.mark.triton
def test_frozen_positions_and_empty():
    idx, wte, wpe, dy = make(2, 5, 6, 32)
    leaf = wte.clone().requires_grad_()
    embedding(idx, leaf, wpe, torch.float32, offset=OFFSET).backward(dy)
    assert torch.equal(leaf.grad, run(embedding, idx, wte, wpe, dy, torch.float32)[1])
    embedding(idx[:0], leaf, wpe, torch.float32).sum().backward()
    assert embedding(idx[:, :0], wte, wpe, torch.float32).shape == (2, 0, 32)


@pytest.mark.triton
def test_row_offsets_are_64_bit():
    """Rows 2^31 - 16 elements apart: in 32 bits token 2 would wrap around to 32 elements before row 0."""
    stride, C = 2**31 - 16, 32
    storage = torch.empty(64 + 2 * stride + C, dtype=torch.float16, device=DEVICE)
    storage[:64] = 0
    wte = storage[64:].as_strided((3, C), (stride, 1))
    wte.copy_(torch.randn(3, C))
    wpe = torch.zeros(3, C, device=DEVICE)
    idx = torch.tensor([2, 0, 1], device=DEVICE)
    y = torch.empty(3, C, dtype=torch.float16, device=DEVICE)
    module._embedding_fwd_kernel[(3,)](idx, wte, wpe, None, y, stride, C, 3, C, 3, 0, 0.0, BLOCK_C=32)
    assert torch.equal(y, wte[idx])


@pytest.mark.gpu
@pytest.mark.triton
def test_more_than_2_31_elements():
    B, T, C, V = 2800, 1024, 768, 50
    idx = torch.randint(0, V, (B, T), device=DEVICE)
    leaf, wpe = torch.zeros(V, C, device=DEVICE, requires_grad=True), torch.zeros(T, C, device=DEVICE, requires_grad=True)
    y = embedding(idx, leaf, wpe, torch.bfloat16)
    y.backward(torch.ones_like(y))
    assert torch.equal(leaf.grad, torch.bincount(idx.flatten(), minlength=V)[:, None].expand(-1, C).float())
    assert torch.equal(wpe.grad, torch.full_like(wpe, B))


@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_dropout(dtype):
    inputs = make(2, 37, 11, 48)

    def seeded(*args):
        torch.manual_seed(11)
        return run(embedding, *args, dropout_p=0.5)

    idx, wte, wpe, dy = inputs
    mask = seeded(idx, torch.ones_like(wte), torch.zeros_like(wpe), dy, dtype)[0]
    assert mask.unique().tolist() == [0.0, 2.0]
    assert abs((mask == 0).float().mean() - 0.5) < 5 * (0.25 / mask.numel()) ** 0.5
    ours = seeded(*inputs, dtype)
    compare(ours, inputs, dtype, mask=mask)
    assert torch.equal(ours[0], seeded(*inputs, dtype)[0])
    assert not torch.equal(ours[0], run(embedding, *inputs, dtype, dropout_p=0.5)[0])


@pytest.mark.triton
def test_opcheck():
    idx, wte, wpe, dy = make(2, 5, 7, 32)
    wte, wpe = wte.requires_grad_(), wpe.requires_grad_()
    for seed, p in ((None, 0.0), (torch.tensor([3], device=DEVICE), 0.5)):
        torch.library.opcheck(module._embedding_fwd, (idx, wte, wpe, seed, torch.float16, p, 2))
        torch.library.opcheck(module._embedding_bwd, (dy, idx, seed, 7, 10, p, 2))


@pytest.mark.triton
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_compile(backend):
    idx, wte, wpe, dy = make(2, 9, 7, 32)

    def f(idx, wte, wpe, dtype, offset):
        return embedding(idx, wte * 2, wpe, dtype, offset=offset) + 1

    got = run(torch.compile(f, fullgraph=True, backend=backend), idx, wte, wpe, dy, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(got, run(f, idx, wte, wpe, dy, torch.float32)))


@pytest.mark.gpu
@pytest.mark.triton
def test_graph_capture():
    idx, wte, wpe, dy = make(8, 256, 1000, 768, "frequent")
    wte, wpe, dy = wte.requires_grad_(), wpe.requires_grad_(), dy.bfloat16()

    def step():
        y = embedding(idx, wte, wpe, torch.bfloat16, offset=OFFSET)
        return [y.detach(), *torch.autograd.grad(y, [wte, wpe], dy)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        want = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, want))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"offset": 5}, "positions 5..8 of 8"),
        ({"offset": -1}, "positions -1..2 of 8"),
        ({"wpe": torch.zeros(8, 3)}, "wte has 4 channels, wpe 3"),
        ({"dropout_p": -0.1}, "dropout_p=-0.1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_errors(kwargs, message):
    arguments = {"idx": torch.zeros(1, 4, dtype=torch.int64), "wte": torch.zeros(6, 4), "wpe": torch.zeros(8, 4)}
    with pytest.raises(ValueError) as error:
        embedding(**(arguments | {"dtype": torch.float32} | kwargs))
    assert message in str(error.value)
