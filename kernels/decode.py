"""Attention of one new token per sequence against its cached keys and values.

    o = softmax(scale q K^T) V over the first `length` entries of the cache

B batch, H heads, D head size, C = H*D, T_max capacity of the cache. One program per head and sequence walks the cache in tiles
of BLOCK_T entries. Each row of the tile keeps a running maximum, sum and output of its own, in base 2, joined only at the end:
no reduction across warps inside the loop. The bound is memory: 2 * length * D cache elements per head are read once.
"""

import functools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import configs, dispatch
from kernels.library import custom_op
from kernels.triton_compat import next_power_of_2, tl, triton

LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def _decode_kernel(q_ptr, k_ptr, v_ptr, length_ptr, out_ptr, stride_qb, stride_b, stride_h, stride_t, H, scale,
                   D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    b, h = tl.program_id(0) // H, tl.program_id(0) % H
    rows, cols = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    length = tl.load(length_ptr + b)
    q = tl.load(q_ptr + b.to(tl.int64) * stride_qb + h * D + cols, mask=cols < D, other=0.0).to(tl.float32)
    q = q * (scale * LOG2E)
    head = b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h
    m = tl.full([BLOCK_T], -1e30, tl.float32)  # finite, so that a row that never holds an entry meets no inf - inf
    total = tl.zeros([BLOCK_T], tl.float32)
    acc = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for start in tl.range(0, length, BLOCK_T, num_stages=STAGES):
        offsets = head + (start + rows).to(tl.int64)[:, None] * stride_t + cols[None, :]
        mask = (start + rows < length)[:, None] & (cols < D)[None, :]
        k = tl.load(k_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        s = tl.where(start + rows < length, tl.sum(q[None, :] * k, 1), float("-inf"))
        m_new = tl.maximum(m, s)
        p = tl.exp2(s - m_new)
        alpha = tl.exp2(m - m_new)
        total = total * alpha + p
        acc = acc * alpha[:, None] + p[:, None] * v
        m = m_new
    weight = tl.exp2(m - tl.max(m, 0))
    total = tl.sum(total * weight, 0)
    out = tl.sum(acc * weight[:, None], 0) / tl.where(total > 0.0, total, 1.0)
    tl.store(out_ptr + tl.program_id(0).to(tl.int64) * D + cols, out.to(out_ptr.dtype.element_ty), mask=cols < D)


@custom_op("attention_decode")
def attention_decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, length: Tensor, scale: float) -> Tensor:
    B, H, _, D = k_cache.shape
    q, length = q if q.stride(1) == 1 else q.contiguous(), length.contiguous()
    if k_cache.stride() != v_cache.stride() or k_cache.stride(3) != 1:
        k_cache, v_cache = k_cache.contiguous(), v_cache.contiguous()
    out = torch.empty(B, H * D, dtype=q.dtype, device=q.device)

    def launch(config):
        strides = q.stride(0), *k_cache.stride()[:3]
        block_d = max(16, next_power_of_2(D))
        _decode_kernel[(B * H,)](q, k_cache, v_cache, length, out, *strides, H, scale, D, BLOCK_D=block_d, **config)

    bucket = f"d{max(16, next_power_of_2(D))}"
    with torch.cuda.device_of(q):
        launch(configs.select("attention_decode", bucket, functools.partial(candidates, "attention_decode"), launch))
    return out


@torch.library.register_fake(attention_decode)
def _(q, k_cache, v_cache, length, scale):
    return q.new_empty(q.shape)


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        return attention_decode(*args)

    @staticmethod
    def backward(ctx, dout):
        raise RuntimeError("decode_attention has no gradient: it is for inference")


def decode_attention_ref(q: Tensor, k_cache: Tensor, v_cache: Tensor, length: Tensor, scale: float | None = None) -> Tensor:
    B, H, T_max, D = k_cache.shape
    used = int(length.max()) if length.device.type == "cpu" else T_max  # a sum over unused entries is slow, a host sync slower
    valid = torch.arange(used, device=q.device) < length[:, None]  # (B, used)
    # What lies beyond `length` was never written: it may be NaN.
    k, v = (x[:, :, :used].masked_fill(~valid[:, None, :, None], 0.0) for x in (k_cache, v_cache))
    out = F.scaled_dot_product_attention(q.reshape(B, H, 1, D), k, v, attn_mask=valid[:, None, None], scale=scale)
    return out.reshape(B, H * D)


def decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, length: Tensor, scale: float | None = None) -> Tensor:
    """Attention of one query per sequence over its cached keys and values; inference only.

    Args:
        q: (B, C) fp32, fp16 or bf16, the query of the newest token, all heads side by side.
        k_cache, v_cache: (B, H, T_max, D) in q's dtype.
        length: (B,) int32, on q's device: how many entries of each sequence are valid, at least 1, the newest token included.
        scale: positive factor on the scores; None takes 1 / sqrt(D).

    Returns:
        (B, C) in q's dtype.

    Raises:
        ValueError: for shapes or dtypes that do not fit together.
    """
    B, H, _, D = k_cache.shape
    if k_cache.shape != v_cache.shape or q.shape != (B, H * D) or length.shape != (B,):
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k_cache, v_cache, length))
        raise ValueError(f"q, k_cache, v_cache, length of shapes {shapes}: expected (B, H*D), twice (B, H, T_max, D), (B,)")
    if not q.dtype == k_cache.dtype == v_cache.dtype:
        raise ValueError(f"q, k_cache, v_cache of dtypes {q.dtype}, {k_cache.dtype}, {v_cache.dtype}: expected one dtype")
    scale = 1.0 / math.sqrt(D) if scale is None else scale
    if dispatch.choose("attention", q.device.type) != "triton":
        return decode_attention_ref(q, k_cache, v_cache, length, scale)
    return _Decode.apply(q, k_cache, v_cache, length, scale)


def candidates(op: str, arch: int) -> Iterator[dict]:
    for block_t in (16, 32, 64, 128):
        for warps in (2, 4, 8):
            yield {"BLOCK_T": block_t, "STAGES": 3, "num_warps": warps}
