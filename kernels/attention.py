"""Causal multi-head attention on packed projections: O = softmax(scale Q K^T + causal mask) V.

B batch, T sequence, H heads, D head size, C = H*D. qkv is the packed output (B, T, 3C) of one projection, read where it lies
as (B, T, 3H, D); O is written as (B, T, C) and the gradients of q, k and v into one packed (B, T, 3C), so that nothing is
transposed, split or concatenated around the op.

Forward (FlashAttention-2, arXiv:2307.08691): one program owns BLOCK_M query rows and walks the keys in tiles of BLOCK_N with
a running maximum m and sum l, in base 2. Saved for backward: lse = m + log2(l), fp32 (B, H, T). Backward, with
delta = sum(O * dO) over D:

    P = exp2(S - lse)    dP = dO V^T    dS = P * (dP - delta)    dQ = scale dS K    dK = scale dS^T Q    dV = P^T dO

in two kernels without atomics, hence bitwise repeatable: dQ, which also makes delta, then dK and dV. The latter computes S and
dP transposed, so that P^T and dS^T are left operands straight from registers.

FLOPs, the masked half not counted: 2 B H T^2 D forward, 5 B H T^2 D backward (7 executed: S and dP are formed twice). At D = 64
the exponentials of a tile take an H100 as long as its two products, so several small programs per SM, whose phases overlap,
beat one large one. There, `attention_hopper` takes the calls that it supports.

Dropout draws from Philox with the counters (column / 4, row, batch * H + head), whatever the tiles; backward draws again.
"""

import functools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import attention_hopper, configs, cpu, decode, dispatch
from kernels.dropout import check_dropout, draw_seed
from kernels.library import custom_op, once_differentiable
from kernels.triton_compat import TensorDescriptor, cdiv, next_power_of_2, tl, triton

decode_attention = decode.decode_attention  # the other half of the op's interface, from a file of its own

LOG2E = tl.constexpr(math.log2(math.e))
STATS_ROWS = tl.constexpr(128)  # lse and delta are padded with zeros to a multiple of any BLOCK_M: no masks in the loop


@triton.jit
def _offsets(stride_t, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Of a tile's elements from its first: 32 bits suffice within a tile, and spare registers."""
    return tl.arange(0, ROWS)[:, None] * stride_t + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def _load(x, b, head, start, stride_b, stride_t, T, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
          EVEN: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """Rows start .. start + ROWS of one head, (ROWS, BLOCK_D); zero beyond T and D. x is a descriptor if TMA."""
    if TMA:
        tile = x.load([b, head, start, 0]).reshape([ROWS, BLOCK_D])
    else:
        base = x + (b.to(tl.int64) * stride_b + tl.cast(start, tl.int64) * stride_t + head * D)
        ptrs = base + _offsets(stride_t, ROWS, BLOCK_D)
        inside = (start + tl.arange(0, ROWS) < T)[:, None]
        if EVEN and D == BLOCK_D:
            tile = tl.load(ptrs)
        elif D == BLOCK_D:
            tile = tl.load(ptrs, mask=inside, other=0.0)
        else:
            tile = tl.load(ptrs, mask=inside & (tl.arange(0, BLOCK_D) < D)[None, :], other=0.0)
    return tile


@triton.jit
def _store(x, tile, b, head, start, stride_b, stride_t, T, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    base = x + (b.to(tl.int64) * stride_b + tl.cast(start, tl.int64) * stride_t + head * D)
    inside = (start + tl.arange(0, ROWS) < T)[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    tl.store(base + _offsets(stride_t, ROWS, BLOCK_D), tile.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _load_stats(x, bh, start, T, ROWS: tl.constexpr, TMA: tl.constexpr):
    """Rows start .. start + ROWS of lse or delta: (ROWS,), zero beyond T."""
    if TMA:
        stats = x.load([bh, start]).reshape([ROWS])
    else:
        stats = tl.load(x + (bh.to(tl.int64) * _padded(T) + start) + tl.arange(0, ROWS))
    return stats


@triton.jit
def _padded(T):
    return tl.cdiv(T, STATS_ROWS) * STATS_ROWS


@triton.jit
def _keep(seed, bh, row, col, ROWS: tl.constexpr, COLS: tl.constexpr, P: tl.constexpr):
    """Which weights of the tile at (row, col) survive dropout: (ROWS, COLS), each with probability 1 - P."""
    offs_row = row + tl.arange(0, ROWS)
    offs_col = col // 4 + tl.arange(0, COLS // 4)  # one draw gives four words, for four neighbours in a row
    r0, r1, r2, r3 = tl.philox(seed, offs_col[None, :], offs_row[:, None], bh, 0)
    LIMIT: tl.constexpr = int(P * 4294967296.0)
    return tl.join(tl.join(r0 >= LIMIT, r2 >= LIMIT), tl.join(r1 >= LIMIT, r3 >= LIMIT)).reshape([ROWS, COLS])


@triton.jit
def _fwd_kernel(q_src, kv_src, out_ptr, lse_ptr, seed_ptr, stride_b, stride_t, T, H, scale,
                D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                EVEN: tl.constexpr, TMA: tl.constexpr, DROPOUT: tl.constexpr):  # fmt: skip
    n_m = tl.cdiv(T, BLOCK_M)
    row = (n_m - 1 - tl.program_id(0) % n_m) * BLOCK_M  # longest first; the tiles of one head share its keys in L2
    bh = tl.program_id(0) // n_m
    b, h = bh // H, bh % H
    qk_scale = scale * LOG2E  # applied in fp32 after the product, not to 16-bit operands
    seed = tl.load(seed_ptr) if DROPOUT > 0 else 0
    offs_m = row + tl.arange(0, BLOCK_M)
    q = _load(q_src, b, h, row, stride_b, stride_t, T, D, BLOCK_M, BLOCK_D, EVEN, TMA)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    mid = row // BLOCK_N * BLOCK_N
    for diagonal in tl.static_range(2):  # first the tiles left of the diagonal, which need no mask, then those on it
        for col in range(mid * diagonal, min(row + BLOCK_M, T) if diagonal else mid, BLOCK_N):
            k = _load(kv_src, b, H + h, col, stride_b, stride_t, T, D, BLOCK_N, BLOCK_D, EVEN, TMA)
            s = tl.dot(q, k.T, input_precision="ieee")  # (BLOCK_M, BLOCK_N)
            if diagonal:  # keys beyond T are beyond every row too
                s = tl.where(offs_m[:, None] >= col + tl.arange(0, BLOCK_N)[None, :], s, float("-inf"))
            m_new = tl.maximum(m, tl.max(s, 1) * qk_scale)  # finite: column 0 is visible to every row
            p = tl.exp2(s * qk_scale - m_new[:, None])
            alpha = tl.exp2(m - m_new)
            total = total * alpha + tl.sum(p, 1)
            acc = acc * alpha[:, None]
            m = m_new
            if DROPOUT > 0:
                p = tl.where(_keep(seed, bh, row, col, BLOCK_M, BLOCK_N, DROPOUT), p, 0.0)
            v = _load(kv_src, b, 2 * H + h, col, stride_b, stride_t, T, D, BLOCK_N, BLOCK_D, EVEN, TMA)
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")

    acc = acc * (1.0 / (total * (1.0 - DROPOUT)))[:, None]
    stride_ot = H * D
    _store(out_ptr, acc, b, h, row, tl.cast(T, tl.int64) * stride_ot, stride_ot, T, D, BLOCK_M, BLOCK_D)
    tl.store(lse_ptr + bh.to(tl.int64) * _padded(T) + offs_m, m + tl.log2(total), mask=offs_m < T)


@triton.jit
def _dq_kernel(q_src, kv_src, out_src, dout_src, dqkv_ptr, lse_ptr, delta_ptr, seed_ptr, stride_b, stride_t, T, H, scale,
               D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
               EVEN: tl.constexpr, TMA: tl.constexpr, DROPOUT: tl.constexpr):  # fmt: skip
    n_m = tl.cdiv(T, BLOCK_M)
    row = (n_m - 1 - tl.program_id(0) % n_m) * BLOCK_M
    bh = tl.program_id(0) // n_m
    b, h = bh // H, bh % H
    qk_scale = scale * LOG2E
    seed = tl.load(seed_ptr) if DROPOUT > 0 else 0
    offs_m = row + tl.arange(0, BLOCK_M)
    stride_ot = H * D
    stride_ob = tl.cast(T, tl.int64) * stride_ot

    out = _load(out_src, b, h, row, stride_ob, stride_ot, T, D, BLOCK_M, BLOCK_D, EVEN, TMA)
    do = _load(dout_src, b, h, row, stride_ob, stride_ot, T, D, BLOCK_M, BLOCK_D, EVEN, TMA)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta_ptr + bh.to(tl.int64) * _padded(T) + offs_m, delta, mask=offs_m < T)
    lse = _load_stats(lse_ptr, bh, row, T, BLOCK_M, False)

    q = _load(q_src, b, h, row, stride_b, stride_t, T, D, BLOCK_M, BLOCK_D, EVEN, TMA)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    mid = row // BLOCK_N * BLOCK_N
    for diagonal in tl.static_range(2):
        for col in range(mid * diagonal, min(row + BLOCK_M, T) if diagonal else mid, BLOCK_N):
            k = _load(kv_src, b, H + h, col, stride_b, stride_t, T, D, BLOCK_N, BLOCK_D, EVEN, TMA)
            v = _load(kv_src, b, 2 * H + h, col, stride_b, stride_t, T, D, BLOCK_N, BLOCK_D, EVEN, TMA)
            s = tl.dot(q, k.T, input_precision="ieee")  # (BLOCK_M, BLOCK_N)
            dp = tl.dot(do, v.T, input_precision="ieee")
            p = tl.exp2(s * qk_scale - lse[:, None])
            if diagonal:
                p = tl.where(offs_m[:, None] >= col + tl.arange(0, BLOCK_N)[None, :], p, 0.0)
            if DROPOUT > 0:
                keep = _keep(seed, bh, row, col, BLOCK_M, BLOCK_N, DROPOUT)
                dp = tl.where(keep, dp * (1.0 / (1.0 - DROPOUT)), 0.0)
            ds = p * (dp - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    _store(dqkv_ptr, dq * scale, b, h, row, 3 * stride_ob, 3 * stride_ot, T, D, BLOCK_M, BLOCK_D)


@triton.jit
def _dkdv_kernel(q_src, kv_src, dout_src, dqkv_ptr, lse_src, delta_src, seed_ptr, stride_b, stride_t, T, H, scale,
                 D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                 EVEN: tl.constexpr, TMA: tl.constexpr, DROPOUT: tl.constexpr):  # fmt: skip
    n_n = tl.cdiv(T, BLOCK_N)
    col = tl.program_id(0) % n_n * BLOCK_N  # longest first
    bh = tl.program_id(0) // n_n
    b, h = bh // H, bh % H
    qk_scale = scale * LOG2E
    seed = tl.load(seed_ptr) if DROPOUT > 0 else 0
    offs_n = col + tl.arange(0, BLOCK_N)
    stride_ot = H * D
    stride_ob = tl.cast(T, tl.int64) * stride_ot

    k = _load(kv_src, b, H + h, col, stride_b, stride_t, T, D, BLOCK_N, BLOCK_D, EVEN, TMA)
    v = _load(kv_src, b, 2 * H + h, col, stride_b, stride_t, T, D, BLOCK_N, BLOCK_D, EVEN, TMA)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    lo = col // BLOCK_M * BLOCK_M
    mid = min(tl.cdiv(col + BLOCK_N, BLOCK_M) * BLOCK_M, T)
    for below in tl.static_range(2):  # first the tiles on the diagonal, then those below it
        for row in range(mid if below else lo, T if below else mid, BLOCK_M):
            q = _load(q_src, b, h, row, stride_b, stride_t, T, D, BLOCK_M, BLOCK_D, EVEN, TMA)
            do = _load(dout_src, b, h, row, stride_ob, stride_ot, T, D, BLOCK_M, BLOCK_D, EVEN, TMA)
            lse = _load_stats(lse_src, bh, row, T, BLOCK_M, TMA)  # rows beyond T: p = 1, but do = 0
            delta = _load_stats(delta_src, bh, row, T, BLOCK_M, TMA)
            s = tl.dot(k, q.T, input_precision="ieee")  # (BLOCK_N, BLOCK_M), as are dp, p and ds
            dp = tl.dot(v, do.T, input_precision="ieee")
            p = tl.exp2(s * qk_scale - lse[None, :])
            if not below:
                p = tl.where(row + tl.arange(0, BLOCK_M)[None, :] >= offs_n[:, None], p, 0.0)
            p_kept = p
            if DROPOUT > 0:
                keep = tl.trans(_keep(seed, bh, row, col, BLOCK_M, BLOCK_N, DROPOUT))
                p_kept = tl.where(keep, p * (1.0 / (1.0 - DROPOUT)), 0.0)
                dp = tl.where(keep, dp * (1.0 / (1.0 - DROPOUT)), 0.0)
            dv = tl.dot(p_kept.to(do.dtype), do, dv, input_precision="ieee")
            ds = p * (dp - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    _store(dqkv_ptr, dk * scale, b, H + h, col, 3 * stride_ob, 3 * stride_ot, T, D, BLOCK_N, BLOCK_D)
    _store(dqkv_ptr, dv, b, 2 * H + h, col, 3 * stride_ob, 3 * stride_ot, T, D, BLOCK_N, BLOCK_D)


KERNELS = {"attention_fwd": _fwd_kernel, "attention_dq": _dq_kernel, "attention_dkdv": _dkdv_kernel}
MAX_HEAD_SIZE = 128


def _block_d(D: int) -> int:
    return max(16, next_power_of_2(D))


def _bucket(D: int, dtype: torch.dtype, dropout_p: float) -> str:
    kind = "_fp32" if dtype == torch.float32 else "_dropout" if dropout_p else ""
    return f"d{_block_d(D)}{kind}"


def _arguments(kernel, config: dict, H: int, dropout_p: float, scale: float, qkv: Tensor, lse: Tensor, **tensors) -> dict:
    """All arguments of a launch by name; tensors: those of out, dout, dqkv, delta, seed that the kernel takes."""
    B, T, C3 = qkv.shape
    D = C3 // 3 // H
    rows = {"q": config["BLOCK_M"], "kv": config["BLOCK_N"], "out": config["BLOCK_M"], "dout": config["BLOCK_M"]}
    tensors |= {"q": qkv, "kv": qkv, "lse": lse}
    # The copy engine wants 16-byte aligned bases and strides, none of them zero as in an expanded batch.
    aligned = all(n > 0 and n * qkv.element_size() % 16 == 0 for n in (D, qkv.stride(0), qkv.stride(1)))
    tma = bool(config["TMA"]) and aligned and all(x.data_ptr() % 16 == 0 for x in tensors.values() if x is not None)

    def source(name):
        x = tensors[name]
        if not tma:
            return x
        if name in rows:  # (B, T, heads * D) seen as (B, heads, T, D): clipped at the end of each sequence
            shape, strides = [B, x.shape[2] // D, T, D], [x.stride(0), D, x.stride(1), 1]
            return TensorDescriptor(x, shape, strides, [1, 1, rows[name], _block_d(D)])
        return TensorDescriptor(x, [B * H, x.shape[2]], [x.shape[2], 1], [1, config["BLOCK_M"]])

    even = T % config["BLOCK_M"] == 0 and T % config["BLOCK_N"] == 0
    values = {"stride_b": qkv.stride(0), "stride_t": qkv.stride(1), "T": T, "H": H, "scale": scale, "D": D, "EVEN": even}
    values |= config | {"BLOCK_D": _block_d(D), "TMA": tma, "DROPOUT": dropout_p}
    values |= {f"{name}_ptr": x for name, x in tensors.items()}
    return {name: source(name.removesuffix("_src")) if name.endswith("_src") else values[name] for name in kernel.arg_names}


def _launch(op: str, n_head: int, dropout_p: float, scale: float, qkv: Tensor, **tensors) -> None:
    kernel = KERNELS[op]
    B, T, C3 = qkv.shape

    def launch(config):
        tiles = cdiv(T, config["BLOCK_N" if op == "attention_dkdv" else "BLOCK_M"])
        arguments = _arguments(kernel, config, n_head, dropout_p, scale, qkv, **tensors)
        options = {name: value for name, value in config.items() if name not in kernel.arg_names}
        kernel[(B * n_head * tiles,)](**arguments, **options)

    bucket = _bucket(C3 // 3 // n_head, qkv.dtype, dropout_p)
    with torch.cuda.device_of(qkv):
        launch(configs.select(op, bucket, functools.partial(candidates, op), launch))


def _readable(qkv: Tensor) -> Tensor:
    """qkv itself if its rows are contiguous and 32-bit offsets span a tile."""
    return qkv if qkv.stride(2) == 1 and qkv.stride(1) < 2**24 else qkv.contiguous()


def _empty_stats(qkv: Tensor, H: int) -> Tensor:
    """Room for lse or delta, (B, H, T) with T padded; the padding is zero."""
    B, T, _ = qkv.shape
    padded = cdiv(T, STATS_ROWS.value) * STATS_ROWS.value
    make = qkv.new_empty if padded == T else qkv.new_zeros
    return make(B, H, padded, dtype=torch.float32)


@custom_op("attention_fwd")
def attention_fwd(qkv: Tensor, seed: Tensor | None, n_head: int, dropout_p: float, scale: float) -> tuple[Tensor, Tensor]:
    B, T, C3 = qkv.shape
    qkv = _readable(qkv)
    out = torch.empty(B, T, C3 // 3, dtype=qkv.dtype, device=qkv.device)
    lse = _empty_stats(qkv, n_head)
    if attention_hopper.supports(qkv, n_head, dropout_p):
        with torch.cuda.device_of(qkv):
            attention_hopper.forward(qkv, out, lse, n_head, scale)
        return out, lse
    _launch("attention_fwd", n_head, dropout_p, scale, qkv, out=out, lse=lse, seed=seed)
    return out, lse


@torch.library.register_fake(attention_fwd)
def _(qkv, seed, n_head, dropout_p, scale):
    B, T, C3 = qkv.shape
    return qkv.new_empty(B, T, C3 // 3), _empty_stats(qkv, n_head)


@custom_op("attention_bwd")
def attention_bwd(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, seed: Tensor | None, n_head: int, dropout_p: float, scale: float
) -> Tensor:
    dout = dout.contiguous()
    qkv = _readable(qkv)
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    delta = _empty_stats(qkv, n_head)
    if attention_hopper.supports(qkv, n_head, dropout_p) and dout.data_ptr() % 16 == 0:
        with torch.cuda.device_of(qkv):
            attention_hopper.backward(dout, qkv, out, lse, delta, dqkv, n_head, scale)
        return dqkv
    tensors = {"dout": dout, "dqkv": dqkv, "lse": lse, "delta": delta, "seed": seed}
    _launch("attention_dq", n_head, dropout_p, scale, qkv, out=out, **tensors)
    _launch("attention_dkdv", n_head, dropout_p, scale, qkv, **tensors)
    return dqkv


@torch.library.register_fake(attention_bwd)
def _(dout, qkv, out, lse, seed, n_head, dropout_p, scale):
    return qkv.new_empty(qkv.shape)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, seed, *rest):
        out, lse = attention_fwd(qkv, seed, *rest)
        ctx.save_for_backward(qkv, out, lse, seed)
        ctx.rest = rest
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        return attention_bwd(dout, *ctx.saved_tensors, *ctx.rest), None, None, None, None


def causal_attention_ref(qkv: Tensor, n_head: int, dropout_p: float = 0.0, scale: float | None = None) -> Tensor:
    B, T, C3 = qkv.shape
    q, k, v = qkv.view(B, T, 3, n_head, C3 // 3 // n_head).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True, scale=scale)
    return out.transpose(1, 2).reshape(B, T, C3 // 3)


def causal_attention(qkv: Tensor, n_head: int, dropout_p: float = 0.0, scale: float | None = None) -> Tensor:
    """Causal self-attention of all heads.

    Args:
        qkv: (B, T, 3C) fp32, fp16 or bf16; the queries, keys and values of all heads side by side, C = n_head * D.
        n_head: number of heads; D at most 128 on the Triton backend.
        dropout_p: probability of dropping an attention weight, in [0, 1); drawn from PyTorch's generator.
        scale: positive factor on the scores; None takes 1 / sqrt(D).

    Returns:
        (B, T, C) in qkv's dtype.

    Raises:
        ValueError: for a shape or value outside of the above.
    """
    if qkv.dim() != 3 or n_head < 1 or qkv.shape[2] == 0 or qkv.shape[2] % (3 * n_head):
        raise ValueError(f"qkv of shape {tuple(qkv.shape)} is not (B, T, 3 * n_head * head size), with n_head={n_head}")
    D = qkv.shape[2] // (3 * n_head)
    check_dropout(dropout_p)
    scale = 1.0 / math.sqrt(D) if scale is None else scale
    if not scale > 0.0:
        raise ValueError(f"scale={scale}: expected a positive number")
    backend = dispatch.choose("attention", qkv.device.type)
    if backend == "torch" or (backend == "cpp" and dropout_p):  # csrc has no dropout inside attention
        return causal_attention_ref(qkv, n_head, dropout_p, scale)
    if backend == "cpp":
        return cpu.attention(qkv, n_head, scale)
    if D > MAX_HEAD_SIZE or qkv.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            f"head size {D}, {qkv.dtype}: the Triton attention takes head sizes up to {MAX_HEAD_SIZE} in fp32, fp16 or bf16; "
            "others need the torch backend"
        )
    return _Attention.apply(qkv, draw_seed(qkv.device, dropout_p), n_head, dropout_p, scale)


# BLOCK_M, BLOCK_N, num_warps, num_stages and, where one more program per SM is worth a tight fit, registers per thread.
TILES = {
    "attention_fwd": (
        (64, 64, 4, 2, 96), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 4), (64, 128, 4, 2), (64, 128, 4, 3),
        (64, 32, 4, 3), (128, 32, 4, 3), (128, 64, 4, 2, 168), (128, 64, 4, 2), (128, 64, 4, 3),
        (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (128, 128, 8, 3),
    ),
    "attention_dq": (
        (64, 32, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (128, 32, 4, 2), (128, 64, 4, 2),
        (128, 32, 8, 2), (128, 32, 8, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2),
    ),
    "attention_dkdv": (
        (16, 64, 4, 3), (32, 64, 4, 2, 128), (32, 64, 4, 2), (32, 64, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3),
        (32, 128, 8, 3, 128), (32, 128, 8, 2), (32, 128, 8, 3), (64, 64, 8, 2), (64, 128, 8, 2), (64, 128, 8, 3),
    ),
}  # fmt: skip


def candidates(op: str, arch: int) -> Iterator[dict]:
    """Configurations worth timing for head sizes of 64 and 128; some need more shared memory than the smaller GPUs have."""
    for m, n, warps, stages, *maxnreg in TILES[op]:
        config = {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages, "TMA": int(arch >= 90)}
        if not maxnreg:
            yield config
        elif arch >= 90:  # pointers take more registers than descriptors
            yield config | {"maxnreg": maxnreg[0]}
