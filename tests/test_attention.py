"""Triton attention against PyTorch's: forward, all gradients, dropout, decoding, and what the ops owe to PyTorch."""

import math

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from tests.helpers import DEVICE, DTYPES, INTERPRET, assert_as_accurate, dtype_id

pytest.importorskip("triton")
from kernels import configs, dispatch
from kernels.attention import attention_bwd, attention_fwd, causal_attention, causal_attention_ref
from kernels.decode import attention_decode, decode_attention, decode_attention_ref

triton_test = pytest.mark.triton
TILES = {
    "shipped": None,
    "16x32": {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2, "TMA": 0},
    "32x16": {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4, "num_stages": 2, "TMA": 0},
    "32x32-tma": {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2, "TMA": 1},
}


def use_tiles(monkeypatch, name: str) -> None:
    """Small tiles, so that a short sequence has several, wide and high, and the descriptor variant on any device."""
    if TILES[name]:
        if TILES[name]["TMA"] and DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0):
            pytest.skip("needs sm_90")
        monkeypatch.setattr(configs, "lookup", lambda op, bucket, arch: dict(TILES[name]))


def run(attention, qkv: Tensor, dout: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
    qkv = qkv.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = attention(qkv, *args, **kwargs)
    out.backward(dout.to(out.dtype))
    return out.detach(), qkv.grad


def check(ours, qkv, dout, H, scale=None, reference=causal_attention_ref):
    """Forward, and the gradients of q, k and v each by itself, against PyTorch in the same dtype and in fp64."""
    same = run(reference, qkv, dout, H, scale=scale)
    exact = run(reference, qkv.double(), dout.double(), H, scale=scale)
    assert_as_accurate(ours[0], same[0], exact[0])
    for got, plain, true in zip(*(grad.chunk(3, dim=2) for grad in (ours[1], same[1], exact[1]))):
        assert_as_accurate(got, plain, true, factor=3)


def inputs(B, T, H, D, dtype):
    qkv = torch.randn(B, T, 3 * H * D, device=DEVICE, dtype=dtype)
    return qkv, torch.randn(B, T, H * D, device=DEVICE, dtype=dtype)


@triton_test
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(
    ("B", "T", "H", "D"),
    [(1, 1, 1, 64), (2, 37, 3, 16), (1, 128, 2, 64), (1, 129, 1, 64), (1, 65, 2, 128), (2, 33, 2, 80), (1, 40, 3, 8)],
    ids=lambda n: str(n),
)
def test_forward_and_backward(B, T, H, D, dtype):
    qkv, dout = inputs(B, T, H, D, dtype)
    check(run(causal_attention, qkv, dout, H), qkv, dout, H)


@triton_test
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("tiles", [name for name in TILES if TILES[name]])
@pytest.mark.parametrize(("T", "D"), [(96, 32), (75, 24)])
def test_several_tiles_wide_and_high(T, D, tiles, dtype, monkeypatch):
    use_tiles(monkeypatch, tiles)
    qkv, dout = inputs(2, T, 2, D, dtype)
    check(run(causal_attention, qkv, dout, 2), qkv, dout, 2)


@triton_test
@pytest.mark.parametrize("scale", [0.03, 1.0])
def test_scale(scale):
    qkv, dout = inputs(1, 40, 2, 32, torch.float32)
    check(run(causal_attention, qkv, dout, 2, scale=scale), qkv, dout, 2, scale)


@triton_test
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_large_logits_stay_finite(dtype):
    qkv, dout = inputs(1, 64, 2, 32, dtype)
    for x in run(causal_attention, 40 * qkv, dout, 2):
        assert torch.isfinite(x).all()


@triton_test
@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize(("T", "D"), [(37, 24), (64, 32)])
def test_every_output_is_written_and_nothing_else_is_read(T, D, tiles, monkeypatch):
    """Fresh memory holds NaN, and so does what lies around the input: neither may show."""
    use_tiles(monkeypatch, tiles)
    empty, new_empty = torch.empty, Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(math.nan))
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(math.nan))
    around = torch.full((2, T + 64, 6 * D), math.nan, device=DEVICE)
    qkv = around[:, 8 : T + 8]
    qkv.copy_(torch.randn_like(qkv))
    out, lse = attention_fwd(qkv, None, 2, 0.0, 0.2)
    grad = attention_bwd(torch.randn_like(out), qkv, out, lse, None, 2, 0.0, 0.2)
    for x in (out, lse, grad):
        assert torch.isfinite(x).all()


@triton_test
@pytest.mark.parametrize("layout", ["rows of a longer buffer", "time before batch", "columns apart", "one sequence twice"])
def test_strided_qkv(layout):
    B, T, H, D = 2, 37, 2, 16
    wide = torch.randn(B, T, 3 * H * D, device=DEVICE)
    dout = torch.randn(B, T, H * D, device=DEVICE)
    qkv = {
        "rows of a longer buffer": lambda: torch.cat([wide, wide], 1)[:, 3 : T + 3],
        "time before batch": lambda: wide.transpose(0, 1).contiguous().transpose(0, 1),
        "columns apart": lambda: torch.stack([wide, wide], 3)[..., 0],
        "one sequence twice": lambda: wide[:1].expand(B, -1, -1),
    }[layout]()
    assert not qkv.is_contiguous()
    x = qkv.detach().requires_grad_()
    out = causal_attention(x, H)
    out.backward(dout)
    check((out.detach(), x.grad), qkv.contiguous(), dout, H)


@triton_test
@pytest.mark.parametrize(
    ("B", "T", "stride_b", "stride_t"), [(3, 20, 2**30, 96), (1, 193, 96, 2**24 - 8)], ids=["batch", "time"]
)
def test_offsets_beyond_32_bits(B, T, stride_b, stride_t):
    """Strides of 32 bits, their multiples beyond; only the touched pages are ever backed by memory."""
    H, D = 2, 16
    far = torch.empty((B - 1) * stride_b + (T - 1) * stride_t + 96, dtype=torch.float16, device=DEVICE)
    qkv = far.as_strided((B, T, 96), (stride_b, stride_t, 1))
    qkv.copy_(torch.randn(B, T, 96))
    dout = torch.randn(B, T, H * D, device=DEVICE, dtype=torch.float16)
    out, lse = attention_fwd(qkv, None, H, 0.0, 0.25)
    near, near_lse = attention_fwd(qkv.contiguous(), None, H, 0.0, 0.25)
    assert torch.equal(out, near)
    grad = attention_bwd(dout, qkv, out, lse, None, H, 0.0, 0.25)
    assert torch.equal(grad, attention_bwd(dout, qkv.contiguous(), near, near_lse, None, H, 0.0, 0.25))


@triton_test
def test_expanded_gradient():
    qkv, _ = inputs(1, 33, 2, 16, torch.float32)
    x = qkv.clone().requires_grad_()
    causal_attention(x, 2).sum().backward()
    assert torch.equal(x.grad, run(causal_attention, qkv, torch.ones(1, 33, 32, device=DEVICE), 2)[1])


@triton_test
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_repeats_bit_for_bit(dropout_p):
    qkv, dout = inputs(2, 80, 2, 32, torch.float16)
    results = []
    for _ in range(3):
        torch.manual_seed(7)
        results.append(run(causal_attention, qkv, dout, 2, dropout_p))
    for out, grad in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(grad, results[0][1])


def kept(T: int, H: int, dropout_p: float, seed: int, D: int = 64) -> Tensor:
    """Which of the weights (H, T, T) dropout keeps: equal weights on values that are rows of the identity show them."""
    qkv = torch.zeros(1, T, 3, H, D, device=DEVICE)
    qkv[0, :, 2] = torch.eye(T, D, device=DEVICE)[:, None]
    torch.manual_seed(seed)
    weights = causal_attention(qkv.view(1, T, -1), H, dropout_p).view(T, H, D).transpose(0, 1)[..., :T]
    return weights > 0


@triton_test
@pytest.mark.parametrize("p", [0.3, 0.6])
@pytest.mark.parametrize("tiles", TILES)
def test_dropout_mask(tiles, p, monkeypatch):
    T, H = 60, 4
    wanted = kept(T, H, p, seed=1)
    use_tiles(monkeypatch, tiles)
    mask = kept(T, H, p, seed=1)
    assert torch.equal(mask, wanted)  # whatever the tiles
    below = torch.ones(T, T, dtype=torch.bool, device=DEVICE).tril()
    assert not mask[:, ~below].any()
    n = H * int(below.sum())
    assert abs(mask[:, below].float().mean().item() - (1 - p)) < 4 * math.sqrt(p * (1 - p) / n)
    other = kept(T, H, p, seed=2)
    rows, columns = (mask[0, 1:, :-1], mask[0, :-1, :-1]), (mask[0, :, 1:], mask[0, :, :-1])
    for a, b in [(mask[0], mask[1]), (mask[0], other[0]), rows, columns]:
        both = below[: a.shape[0], : a.shape[1]].tril(-1)
        agree, chance = (a == b)[both].float().mean().item(), p * p + (1 - p) ** 2  # as independent draws do
        assert abs(agree - chance) < 4 * math.sqrt(chance * (1 - chance) / int(both.sum()))


@triton_test
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("tiles", TILES)
def test_dropout_forward_and_backward(tiles, dtype, monkeypatch):
    """Against plain PyTorch with the very mask that the kernels draw; forward and both backward kernels must agree on it."""
    use_tiles(monkeypatch, tiles)
    T, H, D, p = 60, 2, 64, 0.25
    mask = kept(T, H, p, seed=3)
    qkv, dout = inputs(1, T, H, D, dtype)

    def reference(x, n_head, scale=None):
        q, k, v = x.view(1, T, 3, H, D).permute(2, 0, 3, 1, 4)
        s = (q @ k.mT) / math.sqrt(D)
        weights = s.masked_fill(~torch.ones(T, T, dtype=torch.bool, device=DEVICE).tril(), -math.inf).softmax(-1)
        return (weights * mask / (1 - p) @ v).transpose(1, 2).reshape(1, T, H * D)

    torch.manual_seed(3)
    check(run(causal_attention, qkv, dout, H, p), qkv, dout, H, reference=lambda x, n, scale: reference(x.view_as(x), n))


@triton_test
def test_no_dropout_draws_nothing():
    qkv, _ = inputs(1, 16, 1, 16, torch.float32)
    state = torch.get_rng_state() if DEVICE == "cpu" else torch.cuda.get_rng_state()
    causal_attention(qkv, 1)
    assert torch.equal(state, torch.get_rng_state() if DEVICE == "cpu" else torch.cuda.get_rng_state())


@triton_test
def test_recomputed_activations_drop_the_same_weights():
    qkv, dout = inputs(1, 40, 2, 16, torch.float32)
    plain, again = (run(f, qkv, dout, 2, 0.4) for f in _seeded(causal_attention, _checkpointed))
    assert torch.equal(plain[0], again[0])
    assert torch.equal(plain[1], again[1])


def _checkpointed(x, H, dropout_p):
    return checkpoint(causal_attention, x, H, dropout_p, use_reentrant=False)


def _seeded(*functions):
    for f in functions:
        torch.manual_seed(11)
        yield f


@triton_test
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_opcheck(dropout_p):
    qkv, dout = inputs(2, 20, 2, 16, torch.float32)
    seed = torch.tensor([5], device=DEVICE) if dropout_p else None
    opcheck(attention_fwd, (qkv, seed, 2, dropout_p, 0.25))
    out, lse = attention_fwd(qkv, seed, 2, dropout_p, 0.25)
    opcheck(attention_bwd, (dout, qkv, out, lse, seed, 2, dropout_p, 0.25))
    q, k, v = caches(2, 2, 20, 16, torch.float32)
    opcheck(attention_decode, (q, k, v, lengths(3, 20), 0.25))


@triton_test
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_compile_fullgraph(dropout_p):
    qkv, dout = inputs(1, 40, 2, 16, torch.float32)
    compiled = torch.compile(causal_attention, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    eager, ours = (run(f, qkv, dout, 2, dropout_p) for f in _seeded(causal_attention, compiled))
    if dropout_p == 0.0 or DEVICE == "cpu":  # inductor draws its random numbers in an order of its own
        assert torch.equal(eager[0], ours[0])
        assert torch.equal(eager[1], ours[1])
    assert torch.isfinite(ours[1]).all()


def test_bad_arguments():
    qkv = torch.randn(1, 8, 48)
    for other, n_head in ((qkv, 5), (qkv, 0), (qkv[0], 2), (qkv[:, :, :0], 2)):
        with pytest.raises(ValueError, match=f"n_head={n_head}"):
            causal_attention(other, n_head)
    for scale in (-1.0, 0.0, math.nan):
        with pytest.raises(ValueError, match=f"scale={scale}"):
            causal_attention(qkv, 2, scale=scale)
    with pytest.raises(ValueError, match=r"dropout_p=1\.0"):
        causal_attention(qkv, 2, dropout_p=1.0)


@triton_test
@pytest.mark.parametrize(("D", "dtype"), [(160, torch.float32), (16, torch.float64)])
def test_what_the_kernels_do_not_take(D, dtype):
    with pytest.raises(ValueError, match=f"head size {D}"):
        causal_attention(torch.randn(1, 8, 3 * D, device=DEVICE, dtype=dtype), 1)


def caches(B, H, T_max, D, dtype):
    q = torch.randn(B, H * D, device=DEVICE, dtype=dtype)
    return q, *torch.randn(2, B, H, T_max, D, device=DEVICE, dtype=dtype)


def lengths(*n):
    return torch.tensor(n, dtype=torch.int32, device=DEVICE)


def forget(cache: Tensor, length: Tensor) -> Tensor:
    """NaN in what was never written."""
    unused = torch.arange(cache.shape[2], device=DEVICE) >= length[:, None]
    return cache.masked_fill(unused[:, None, :, None], math.nan)


@triton_test
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(("H", "T_max", "D"), [(1, 1, 64), (3, 200, 64), (2, 129, 128), (2, 40, 24), (2, 65, 8)])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_decode(H, T_max, D, scale, dtype):
    length = lengths(T_max, 1, max(1, T_max // 2), max(1, T_max - 1))
    q, k, v = caches(4, H, T_max, D, dtype)
    ours = decode_attention(q, forget(k, length), forget(v, length), length, scale)
    same = decode_attention_ref(q, k, v, length, scale)
    exact = decode_attention_ref(q.double(), k.double(), v.double(), length, scale)
    assert_as_accurate(ours, same, exact)


@triton_test
def test_decode_continues_causal_attention():
    B, T, H, D = 2, 50, 2, 32
    qkv = torch.randn(B, T, 3 * H * D, device=DEVICE)
    _, k, v = qkv.view(B, T, 3, H, D).permute(2, 0, 3, 1, 4)
    last = decode_attention(qkv[:, -1, : H * D], k, v, lengths(T, T))  # all of them strided views
    exact = causal_attention_ref(qkv.double(), H)[:, -1]
    assert_as_accurate(last, causal_attention_ref(qkv, H)[:, -1], exact)


@triton_test
@pytest.mark.parametrize("layout", ["a slice of the batch", "different strides", "columns apart", "lengths apart"])
def test_decode_strided_caches(layout):
    q, k, v = caches(4, 2, 33, 16, torch.float32)
    length = lengths(33, 5)
    wanted = decode_attention(q[:2].contiguous(), k[1:3].contiguous(), v[1:3].contiguous(), length)
    if layout == "different strides":
        v = v.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "columns apart":
        q, k = (torch.stack([x, x], -1)[..., 0] for x in (q, k))
    if layout == "lengths apart":
        length = lengths(33, 1, 5)[::2]
    assert torch.equal(decode_attention(q[:2], k[1:3], v[1:3], length), wanted)


@triton_test
@pytest.mark.parametrize(
    ("stride_b", "stride_h", "stride_t"),
    [(2**30, 144, 16), (144, 2**30, 16), (48, 16, 2**28)],
    ids=["batch", "head", "time"],
)
def test_decode_offsets_beyond_32_bits(stride_b, stride_h, stride_t):
    B, H, T, D = 3, 3, 9, 16
    far = torch.empty(2 * stride_b + 2 * stride_h + 8 * stride_t + D, dtype=torch.float16, device=DEVICE)
    k = far.as_strided((B, H, T, D), (stride_b, stride_h, stride_t, 1))
    k.copy_(torch.randn(B, H, T, D))
    q = torch.randn(B, H * D, device=DEVICE, dtype=torch.float16)
    ours = decode_attention(q, k, k, lengths(T, T, T))
    assert torch.equal(ours, decode_attention(q, k.contiguous(), k.contiguous(), lengths(T, T, T)))


@triton_test
def test_decode_of_an_empty_sequence_is_zero():
    q, k, v = caches(2, 2, 20, 16, torch.float32)
    out = decode_attention(q, k, v, lengths(0, 20))
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert out[1].abs().min() > 0


def test_decode_reference_ignores_unwritten_entries():
    length = torch.tensor([3, 1, 7], dtype=torch.int32)
    q, k, v = torch.randn(3, 32), *torch.randn(2, 3, 2, 9, 16)
    unused = (torch.arange(9) >= length[:, None])[:, None, :, None]
    ours = decode_attention_ref(q, k.masked_fill(unused, math.nan), v.masked_fill(unused, math.nan), length)
    for b, n in enumerate(length.tolist()):
        s = torch.einsum("hd,htd->ht", q[b].view(2, 16), k[b, :, :n]) / 4
        torch.testing.assert_close(ours[b], torch.einsum("ht,htd->hd", s.softmax(-1), v[b, :, :n]).flatten())


def test_decode_bad_arguments():
    q, k, v = torch.randn(2, 32), *torch.randn(2, 2, 2, 9, 16)
    length = torch.ones(2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"\(2, 30\)"):
        decode_attention(q[:, :30], k, v, length)
    with pytest.raises(ValueError, match=r"\(1,\)"):
        decode_attention(q, k, v, length[:1])
    with pytest.raises(ValueError, match="float16"):
        decode_attention(q.half(), k, v, length)


@pytest.mark.skipif(INTERPRET or DEVICE == "cuda", reason="on the torch backend")
def test_torch_backend_takes_any_head_size():
    qkv = torch.randn(1, 8, 3 * 160, dtype=torch.float64)
    dispatch.use("torch")
    assert torch.equal(causal_attention(qkv, 1), causal_attention_ref(qkv, 1))


@pytest.mark.gpu
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize(("T", "D"), [(256, 64), (200, 64), (256, 128), (256, 32)])
def test_captured_in_a_graph(T, D, dropout_p):
    qkv, dout = inputs(2, T, 4, D, torch.bfloat16)
    x = qkv.clone().requires_grad_()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # compiles
        causal_attention(x, 4, dropout_p).backward(dout)
    torch.cuda.synchronize()
    x.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = causal_attention(x, 4, dropout_p)
        out.backward(dout)
    x.data.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.isfinite(out).all()
    if dropout_p == 0.0:
        check((out.detach(), x.grad), x.detach(), dout, 4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("op", ["attention_fwd", "attention_dq", "attention_dkdv"])
@pytest.mark.parametrize("D", [64, 128])
def test_descriptors_and_pointers_agree(D, op, dropout_p, dtype, monkeypatch):
    """The same tiles read by the copy engine and through pointers give the same bits."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs sm_90")
    qkv, dout = inputs(2, 300, 4, D, dtype)  # ragged: never the Gluon kernels
    lookup, results = configs.lookup, []
    for tma in (0, 1):
        monkeypatch.setattr(configs, "lookup", lambda o, b, a, tma=tma: lookup(o, b, a) | ({"TMA": tma} if o == op else {}))
        torch.manual_seed(1)
        results.append(run(causal_attention, qkv, dout, 4, dropout_p))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.gpu
def test_on_another_device_than_the_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    qkv, dout = (x.to("cuda:1") for x in inputs(1, 100, 2, 64, torch.bfloat16))
    check(run(causal_attention, qkv, dout, 2), qkv, dout, 2)
