"""Causal multi-head attention on packed projections: O = softmax(scale Q K^T + causal mask) V.

B batch, T sequence, H heads, D head size, C = H*D. qkv is the packed output (B, T, 3C) of one projection, read as
(B, T, 3, H, D) where it lies; O is written as (B, T, C) and the gradients of q, k and v into one packed (B, T, 3C), so that
nothing is transposed, split or concatenated around the op.

Forward (FlashAttention-2, arXiv:2307.08691): one program owns BLOCK_M query rows and walks the keys in tiles of BLOCK_N with a
running maximum m and sum l, in base 2; saved for backward: lse = m + log2(l), fp32 (B, H, T). Backward, with
delta = sum(O * dO) over D: P = exp2(S - lse), dS = P * (dP - delta), dP = dO V^T, in two kernels without atomics, hence bitwise
repeatable: dQ = dS K (which also makes delta), then dK = dS^T Q and dV = P^T dO. S and dP are computed transposed in the latter, so
that P^T and dS^T are left operands straight from registers.

FLOPs, the masked half not counted: 2 B H T^2 D forward, 5 B H T^2 D backward (7 executed, as S and dP are formed twice). At D = 64 an
H100 needs as long for the exponentials of a tile as for its two products, so what matters is that the two overlap.

Dropout draws from Philox with the counter (column / 4, row, batch and head), whatever the tiles, and backward draws again.
"""

import itertools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import configs, dispatch

LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def _load(x, b, head, start, stride_b, stride_t, T, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
          EVEN: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """Rows start .. start+ROWS of one head, (ROWS, BLOCK_D); zero beyond T and D."""
    if TMA:
        tile = x.load([b, head, start, 0]).reshape([ROWS, BLOCK_D])
    else:
        rows = tl.arange(0, ROWS)
        cols = tl.arange(0, BLOCK_D)
        ptrs = x + b.to(tl.int64) * stride_b + tl.cast(start, tl.int64) * stride_t + head * D
        ptrs = ptrs + rows.to(tl.int64)[:, None] * stride_t + cols[None, :]
        if EVEN and D == BLOCK_D:
            tile = tl.load(ptrs)
        elif EVEN:
            tile = tl.load(ptrs, mask=cols[None, :] < D, other=0.0)
        else:
            tile = tl.load(ptrs, mask=(start + rows < T)[:, None] & (cols < D)[None, :], other=0.0)
    return tile


@triton.jit
def _store(x, tile, b, head, start, stride_b, stride_t, T, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    rows = tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    ptrs = x + b.to(tl.int64) * stride_b + tl.cast(start, tl.int64) * stride_t + head * D
    ptrs = ptrs + rows.to(tl.int64)[:, None] * stride_t + cols[None, :]
    tl.store(ptrs, tile.to(x.dtype.element_ty), mask=(start + rows < T)[:, None] & (cols < D)[None, :])


@triton.jit
def _keep(seed, bh, row, col, ROWS: tl.constexpr, COLS: tl.constexpr, P: tl.constexpr):
    """Which weights of the tile at (row, col) survive dropout: (ROWS, COLS), each with probability 1 - P."""
    offs_row = row + tl.arange(0, ROWS)
    offs_col = col // 4 + tl.arange(0, COLS // 4)  # one call gives four words, for four neighbours in a row
    r0, r1, r2, r3 = tl.philox(seed, offs_col[None, :], offs_row[:, None], bh, 0)
    LIMIT: tl.constexpr = int(P * 4294967296.0)
    return tl.join(tl.join(r0 >= LIMIT, r2 >= LIMIT), tl.join(r1 >= LIMIT, r3 >= LIMIT)).reshape([ROWS, COLS])


@triton.jit
def _fwd_steps(acc, l, m, q, kv, seed, b, h, H, row, lo, hi, qk_scale, stride_b, stride_t, T,
               D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr,
               TMA: tl.constexpr, DROPOUT: tl.constexpr, DIAGONAL: tl.constexpr):  # fmt: skip
    for col in range(lo, hi, BLOCK_N):
        k = _load(kv, b, H + h, col, stride_b, stride_t, T, D, BLOCK_N, BLOCK_D, EVEN, TMA)
        s = tl.dot(q, k.T, input_precision="ieee")  # (BLOCK_M, BLOCK_N)
        if DIAGONAL:  # keys beyond T are beyond every row too
            s = tl.where(row + tl.arange(0, BLOCK_M)[:, None] >= col + tl.arange(0, BLOCK_N)[None, :], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * qk_scale)  # finite: column 0 is visible to every row
        p = tl.exp2(s * qk_scale - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        l = l * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        m = m_new
        if DROPOUT > 0:
            p = tl.where(_keep(seed, b * H + h, row, col, BLOCK_M, BLOCK_N, DROPOUT), p, 0.0)
        v = _load(kv, b, 2 * H + h, col, stride_b, stride_t, T, D, BLOCK_N, BLOCK_D, EVEN, TMA)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    return acc, l, m


@triton.jit
def _fwd_kernel(q_ptr, kv_ptr, out_ptr, lse_ptr, seed_ptr, stride_b, stride_t, T, H, scale,
                D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                EVEN: tl.constexpr, TMA: tl.constexpr, DROPOUT: tl.constexpr):  # fmt: skip
    n_m = tl.cdiv(T, BLOCK_M)
    row = (n_m - 1 - tl.program_id(0) % n_m) * BLOCK_M  # longest first; tiles of a head side by side share its keys in L2
    bh = tl.program_id(0) // n_m
    b, h = bh // H, bh % H
    qk_scale = scale * LOG2E  # applied in fp32 after the product, not to 16-bit operands
    seed = tl.load(seed_ptr) if DROPOUT > 0 else 0

    q = _load(q_ptr, b, h, row, stride_b, stride_t, T, D, BLOCK_M, BLOCK_D, EVEN, TMA)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    mid = row // BLOCK_N * BLOCK_N
    acc, l, m = _fwd_steps(acc, l, m, q, kv_ptr, seed, b, h, H, row, 0, mid, qk_scale, stride_b, stride_t, T,
                           D, BLOCK_M, BLOCK_N, BLOCK_D, EVEN, TMA, DROPOUT, False)  # fmt: skip
    acc, l, m = _fwd_steps(acc, l, m, q, kv_ptr, seed, b, h, H, row, mid, min(row + BLOCK_M, T), qk_scale, stride_b, stride_t, T,
                           D, BLOCK_M, BLOCK_N, BLOCK_D, EVEN, TMA, DROPOUT, True)  # fmt: skip

    acc = acc * (1.0 / (l * (1.0 - DROPOUT)))[:, None]
    _store(out_ptr, acc, b, h, row, tl.cast(T, tl.int64) * H * D, H * D, T, D, BLOCK_M, BLOCK_D)
    offs_m = row + tl.arange(0, BLOCK_M)
    tl.store(lse_ptr + bh.to(tl.int64) * T + offs_m, m + tl.log2(l), mask=offs_m < T)


@triton.jit
def _dq_steps(dq, q, do, lse, delta, kv, seed, b, h, H, row, lo, hi, qk_scale, stride_b, stride_t, T,
              D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr,
              TMA: tl.constexpr, DROPOUT: tl.constexpr, DIAGONAL: tl.constexpr):  # fmt: skip
    for col in range(lo, hi, BLOCK_N):
        k = _load(kv, b, H + h, col, stride_b, stride_t, T, D, BLOCK_N, BLOCK_D, EVEN, TMA)
        v = _load(kv, b, 2 * H + h, col, stride_b, stride_t, T, D, BLOCK_N, BLOCK_D, EVEN, TMA)
        s = tl.dot(q, k.T, input_precision="ieee")  # (BLOCK_M, BLOCK_N)
        dp = tl.dot(do, v.T, input_precision="ieee")
        p = tl.exp2(s * qk_scale - lse[:, None])
        if DIAGONAL:
            p = tl.where(row + tl.arange(0, BLOCK_M)[:, None] >= col + tl.arange(0, BLOCK_N)[None, :], p, 0.0)
        if DROPOUT > 0:
            dp = tl.where(_keep(seed, b * H + h, row, col, BLOCK_M, BLOCK_N, DROPOUT), dp * (1.0 / (1.0 - DROPOUT)), 0.0)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit
def _dq_kernel(q_ptr, kv_ptr, out_ptr, dout_ptr, dqkv_ptr, lse_ptr, delta_ptr, seed_ptr, stride_b, stride_t, T, H, scale,
               D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
               EVEN: tl.constexpr, TMA: tl.constexpr, DROPOUT: tl.constexpr):  # fmt: skip
    n_m = tl.cdiv(T, BLOCK_M)
    row = (n_m - 1 - tl.program_id(0) % n_m) * BLOCK_M
    bh = tl.program_id(0) // n_m
    b, h = bh // H, bh % H
    qk_scale = scale * LOG2E
    seed = tl.load(seed_ptr) if DROPOUT > 0 else 0
    stride_ot = H * D
    stride_ob = tl.cast(T, tl.int64) * stride_ot

    out = _load(out_ptr, b, h, row, stride_ob, stride_ot, T, D, BLOCK_M, BLOCK_D, EVEN, TMA)
    do = _load(dout_ptr, b, h, row, stride_ob, stride_ot, T, D, BLOCK_M, BLOCK_D, EVEN, TMA)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    offs_m = row + tl.arange(0, BLOCK_M)
    stats = bh.to(tl.int64) * T + offs_m
    tl.store(delta_ptr + stats, delta, mask=offs_m < T)
    lse = tl.load(lse_ptr + stats, mask=offs_m < T, other=float("inf"))  # p = 0 in rows beyond T

    q = _load(q_ptr, b, h, row, stride_b, stride_t, T, D, BLOCK_M, BLOCK_D, EVEN, TMA)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    mid = row // BLOCK_N * BLOCK_N
    dq = _dq_steps(dq, q, do, lse, delta, kv_ptr, seed, b, h, H, row, 0, mid, qk_scale, stride_b, stride_t, T,
                   D, BLOCK_M, BLOCK_N, BLOCK_D, EVEN, TMA, DROPOUT, False)  # fmt: skip
    dq = _dq_steps(dq, q, do, lse, delta, kv_ptr, seed, b, h, H, row, mid, min(row + BLOCK_M, T), qk_scale, stride_b, stride_t, T,
                   D, BLOCK_M, BLOCK_N, BLOCK_D, EVEN, TMA, DROPOUT, True)  # fmt: skip
    _store(dqkv_ptr, dq * scale, b, h, row, 3 * stride_ob, 3 * stride_ot, T, D, BLOCK_M, BLOCK_D)


@triton.jit
def _dkdv_steps(dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, seed, b, h, H, col, lo, hi, qk_scale, stride_b, stride_t, T,
                D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr,
                TMA: tl.constexpr, DROPOUT: tl.constexpr, DIAGONAL: tl.constexpr):  # fmt: skip
    stride_ot = H * D
    for row in range(lo, hi, BLOCK_M):
        q = _load(q_ptr, b, h, row, stride_b, stride_t, T, D, BLOCK_M, BLOCK_D, EVEN, TMA)
        do = _load(dout_ptr, b, h, row, tl.cast(T, tl.int64) * stride_ot, stride_ot, T, D, BLOCK_M, BLOCK_D, EVEN, TMA)
        offs_m = row + tl.arange(0, BLOCK_M)
        stats = (b * H + h).to(tl.int64) * T + offs_m
        if EVEN:
            lse = tl.load(lse_ptr + stats)
            delta = tl.load(delta_ptr + stats)
        else:
            lse = tl.load(lse_ptr + stats, mask=offs_m < T, other=float("inf"))
            delta = tl.load(delta_ptr + stats, mask=offs_m < T, other=0.0)
        s = tl.dot(k, q.T, input_precision="ieee")  # (BLOCK_N, BLOCK_M)
        dp = tl.dot(v, do.T, input_precision="ieee")
        p = tl.exp2(s * qk_scale - lse[None, :])
        if DIAGONAL:
            p = tl.where(offs_m[None, :] >= col + tl.arange(0, BLOCK_N)[:, None], p, 0.0)
        p_kept = p
        if DROPOUT > 0:
            keep = tl.trans(_keep(seed, b * H + h, row, col, BLOCK_M, BLOCK_N, DROPOUT))
            p_kept = tl.where(keep, p * (1.0 / (1.0 - DROPOUT)), 0.0)
            dp = tl.where(keep, dp * (1.0 / (1.0 - DROPOUT)), 0.0)
        dv = tl.dot(p_kept.to(do.dtype), do, dv, input_precision="ieee")
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _dkdv_kernel(q_ptr, kv_ptr, dout_ptr, dqkv_ptr, lse_ptr, delta_ptr, seed_ptr, stride_b, stride_t, T, H, scale,
                 D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                 EVEN: tl.constexpr, TMA: tl.constexpr, DROPOUT: tl.constexpr):  # fmt: skip
    n_n = tl.cdiv(T, BLOCK_N)
    col = tl.program_id(0) % n_n * BLOCK_N  # longest first
    bh = tl.program_id(0) // n_n
    b, h = bh // H, bh % H
    qk_scale = scale * LOG2E
    seed = tl.load(seed_ptr) if DROPOUT > 0 else 0

    k = _load(kv_ptr, b, H + h, col, stride_b, stride_t, T, D, BLOCK_N, BLOCK_D, EVEN, TMA)
    v = _load(kv_ptr, b, 2 * H + h, col, stride_b, stride_t, T, D, BLOCK_N, BLOCK_D, EVEN, TMA)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    lo = col // BLOCK_M * BLOCK_M
    mid = min(tl.cdiv(col + BLOCK_N, BLOCK_M) * BLOCK_M, T)
    dk, dv = _dkdv_steps(dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, seed, b, h, H, col, lo, mid, qk_scale,
                         stride_b, stride_t, T, D, BLOCK_M, BLOCK_N, BLOCK_D, EVEN, TMA, DROPOUT, True)  # fmt: skip
    dk, dv = _dkdv_steps(dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, seed, b, h, H, col, mid, T, qk_scale,
                         stride_b, stride_t, T, D, BLOCK_M, BLOCK_N, BLOCK_D, EVEN, TMA, DROPOUT, False)  # fmt: skip
    stride_dt = 3 * H * D
    stride_db = tl.cast(T, tl.int64) * stride_dt
    _store(dqkv_ptr, dk * scale, b, H + h, col, stride_db, stride_dt, T, D, BLOCK_N, BLOCK_D)
    _store(dqkv_ptr, dv, b, 2 * H + h, col, stride_db, stride_dt, T, D, BLOCK_N, BLOCK_D)


class _Shape:
    """What the three launches share: sizes, strides, constexpr arguments, and how a tensor is handed over."""

    def __init__(self, qkv: Tensor, n_head: int, dropout_p: float):
        self.B, self.T, C3 = qkv.shape
        self.H, self.D = n_head, C3 // 3 // n_head
        self.dropout = dropout_p
        self.bucket = f"d{max(16, triton.next_power_of_2(self.D))}" + ("_fp32" if qkv.dtype == torch.float32 else "")
        # The copy engine wants 16-byte aligned bases and strides.
        width = qkv.element_size()
        self.tma = qkv.data_ptr() % 16 == 0 and all(n * width % 16 == 0 for n in (self.D, *qkv.stride()[:2]))

    def constants(self, config: dict) -> dict:
        tile = max(config["BLOCK_M"], config["BLOCK_N"])
        config["TMA"] = bool(config.get("TMA")) and self.tma
        block_d = max(16, triton.next_power_of_2(self.D))
        return dict(config, D=self.D, BLOCK_D=block_d, EVEN=self.T % tile == 0, DROPOUT=self.dropout)

    def source(self, x: Tensor, constants: dict, rows: str):
        """x (B, T, heads * D), or for TMA its view as (B, heads, T, D): clipped at the end of each sequence."""
        if not constants["TMA"]:
            return x
        shape = [self.B, x.shape[2] // self.D, self.T, self.D]
        strides = [x.stride(0), self.D, x.stride(1), 1]
        return TensorDescriptor(x, shape, strides, [1, 1, constants[rows], constants["BLOCK_D"]])


def _op_fwd(qkv, seed, n_head, dropout_p, scale):
    qkv = qkv if qkv.stride(2) == 1 else qkv.contiguous()
    shape = _Shape(qkv, n_head, dropout_p)
    B, T, H = shape.B, shape.T, shape.H
    out = torch.empty(B, T, H * shape.D, dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(B, H, T, dtype=torch.float32, device=qkv.device)

    def launch(config):
        c = shape.constants(config)
        grid = (triton.cdiv(T, c["BLOCK_M"]) * B * H,)
        _fwd_kernel[grid](shape.source(qkv, c, "BLOCK_M"), shape.source(qkv, c, "BLOCK_N"), out, lse, seed,
                          qkv.stride(0), qkv.stride(1), T, H, scale, **c)  # fmt: skip

    with torch.cuda.device_of(qkv):
        launch(configs.select("attention_fwd", shape.bucket, lambda arch: candidates("attention_fwd", arch), launch))
    return out, lse


def _op_bwd(dout, qkv, out, lse, seed, n_head, dropout_p, scale):
    qkv = qkv if qkv.stride(2) == 1 else qkv.contiguous()
    shape = _Shape(qkv, n_head, dropout_p)
    B, T, H = shape.B, shape.T, shape.H
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    delta = torch.empty_like(lse)
    strides = qkv.stride(0), qkv.stride(1)

    def launch_dq(config):
        c = shape.constants(config)
        grid = (triton.cdiv(T, c["BLOCK_M"]) * B * H,)
        m, n = "BLOCK_M", "BLOCK_N"
        _dq_kernel[grid](shape.source(qkv, c, m), shape.source(qkv, c, n), shape.source(out, c, m), shape.source(dout, c, m),
                         dqkv, lse, delta, seed, *strides, T, H, scale, **c)  # fmt: skip

    def launch_dkdv(config):
        c = shape.constants(config)
        grid = (triton.cdiv(T, c["BLOCK_N"]) * B * H,)
        m, n = "BLOCK_M", "BLOCK_N"
        _dkdv_kernel[grid](shape.source(qkv, c, m), shape.source(qkv, c, n), shape.source(dout, c, m),
                           dqkv, lse, delta, seed, *strides, T, H, scale, **c)  # fmt: skip

    with torch.cuda.device_of(qkv):
        launch_dq(configs.select("attention_dq", shape.bucket, lambda arch: candidates("attention_dq", arch), launch_dq))
        launch_dkdv(
            configs.select("attention_dkdv", shape.bucket, lambda arch: candidates("attention_dkdv", arch), launch_dkdv)
        )
    return dqkv


@torch.library.custom_op("nanogpt::attention_fwd", mutates_args=())
def attention_fwd(qkv: Tensor, seed: Tensor | None, n_head: int, dropout_p: float, scale: float) -> tuple[Tensor, Tensor]:
    return _op_fwd(qkv, seed, n_head, dropout_p, scale)


@attention_fwd.register_fake
def _(qkv, seed, n_head, dropout_p, scale):
    B, T, C3 = qkv.shape
    return qkv.new_empty(B, T, C3 // 3), qkv.new_empty(B, n_head, T, dtype=torch.float32)


@torch.library.custom_op("nanogpt::attention_bwd", mutates_args=())
def attention_bwd(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, seed: Tensor | None, n_head: int, dropout_p: float,
                  scale: float) -> Tensor:  # fmt: skip
    return _op_bwd(dout.contiguous(), qkv, out, lse, seed, n_head, dropout_p, scale)


@attention_bwd.register_fake
def _(dout, qkv, out, lse, seed, n_head, dropout_p, scale):
    return qkv.new_empty(qkv.shape)


def _setup_context(ctx, inputs, output):
    qkv, seed, *ctx.rest = inputs
    ctx.save_for_backward(qkv, *output, seed)


def _backward(ctx, dout, dlse):
    return attention_bwd(dout, *ctx.saved_tensors, *ctx.rest), None, None, None, None


attention_fwd.register_autograd(_backward, setup_context=_setup_context)


def causal_attention_ref(qkv: Tensor, n_head: int, dropout_p: float = 0.0, scale: float | None = None) -> Tensor:
    B, T, C3 = qkv.shape
    q, k, v = qkv.view(B, T, 3, n_head, C3 // 3 // n_head).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True, scale=scale)
    return out.transpose(1, 2).reshape(B, T, C3 // 3)


def causal_attention(qkv: Tensor, n_head: int, dropout_p: float = 0.0, scale: float | None = None) -> Tensor:
    """Causal self-attention of all heads.

    Args:
        qkv: (B, T, 3C) fp32, fp16 or bf16; the queries, keys and values of all heads side by side, C = n_head * D.
        n_head: number of heads; D must be 16 to 128 on the Triton backend.
        dropout_p: probability of dropping an attention weight, in [0, 1); drawn from PyTorch's generator.
        scale: positive factor on the scores; None takes 1 / sqrt(D).

    Returns:
        (B, T, C) in qkv's dtype.

    Raises:
        ValueError: for a shape or value outside of the above.
    """
    B, T, C3 = qkv.shape
    D, rest = divmod(C3, 3 * n_head)
    if rest:
        raise ValueError(f"qkv's last dimension {C3} is not 3 * n_head * head size, with n_head={n_head}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p={dropout_p}: expected 0 <= dropout_p < 1")
    scale = 1.0 / math.sqrt(D) if scale is None else scale
    if scale <= 0.0:
        raise ValueError(f"scale={scale}: expected a positive number")
    if dispatch.choose("attention", qkv.device.type) == "torch":
        return causal_attention_ref(qkv, n_head, dropout_p, scale)
    if not 16 <= D <= 128:
        raise ValueError(f"head size {D}: the Triton attention takes 16 to 128; use kernels=torch")
    seed = torch.randint(0, 2**31 - 1, (1,), device=qkv.device) if dropout_p > 0 else None
    return attention_fwd(qkv, seed, n_head, dropout_p, scale)[0]


def candidates(op: str, arch: int) -> Iterator[dict]:
    """Tiles worth timing on a GPU of this architecture, for head sizes of 64 and 128."""
    for m, n, warps, stages in itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3)):
        for tma in (0, 1) if arch >= 90 else (0,):
            yield {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages, "TMA": tma}


KERNELS = {"attention_fwd": _fwd_kernel, "attention_dq": _dq_kernel, "attention_dkdv": _dkdv_kernel}
_DTYPES = {"q_ptr": "x", "kv_ptr": "x", "out_ptr": "x", "dout_ptr": "x", "dqkv_ptr": "x", "lse_ptr": "*fp32", "delta_ptr": "*fp32",
           "seed_ptr": "*i64", "scale": "fp32"}  # fmt: skip


def aot_case(op: str, bucket: str, config: dict, dropout: float = 0.0, even: bool = True) -> configs.AotCase:
    """One kernel variant as it is launched for a head size (a power of two) and the 16-bit or fp32 bucket."""
    kernel = KERNELS[op]
    D = int(bucket.removesuffix("_fp32")[1:])
    dtype = "fp32" if bucket.endswith("_fp32") else "bf16"
    options = {name: config[name] for name in ("num_warps", "num_stages")}
    constants = {name: config[name] for name in ("BLOCK_M", "BLOCK_N")}
    constants |= {"D": D, "BLOCK_D": D, "EVEN": even, "TMA": bool(config["TMA"]), "DROPOUT": dropout}
    rows = {
        "q_ptr": config["BLOCK_M"],
        "kv_ptr": config["BLOCK_N"],
        "out_ptr": config["BLOCK_M"],
        "dout_ptr": config["BLOCK_M"],
    }
    described = rows if config["TMA"] else {}
    if op == "attention_fwd":
        described = {name: described[name] for name in ("q_ptr", "kv_ptr") if name in described}
    signature = {name: _DTYPES.get(name, "i32").replace("x", f"*{dtype}") for name in kernel.arg_names}
    signature |= {name: f"tensordesc<{dtype}[1, 1, {n}, {D}]>" for name, n in described.items() if name in signature}
    if dropout == 0.0:
        constants["seed_ptr"] = None
    aligned = tuple(n for n in kernel.arg_names if n not in (*described, *constants, "T" * (not even), "H", "scale"))
    name = f"{op}/{bucket}" + ("" if even else "-ragged") + ("-dropout" if dropout else "")
    return configs.AotCase(name, kernel, signature, constants, options, aligned)


def aot_cases(arch: int) -> Iterator[configs.AotCase]:
    for op in KERNELS:
        for bucket in ("d16", "d32", "d64", "d128", "d16_fp32", "d32_fp32", "d64_fp32", "d128_fp32"):
            config = configs.lookup(op, bucket, arch)
            yield aot_case(op, bucket, config)
            yield aot_case(op, bucket, config, even=False)
            yield aot_case(op, bucket, config, dropout=0.1)
