"""Causal attention for Hopper GPUs (sm_90) at head size 64, the size of every GPT-2: the maths of `attention`, in Gluon.

Triton proper waits for each product where its result is first named; here the waits are written out, so that a product runs
while the exponentials of another tile are taken. Tiles are small (64 x 64, one warpgroup): three to five programs share an SM,
and one's exponentials hide behind another's products. At D = 64 that beats one large program with specialised warps, since a
tile's exponentials take an H100 about as long as its two products.

B batch, T sequence, H heads, D head size, C = H*D. Tiles are cut from 2-D views by TMA: qkv and dqkv (B*T, 3C), out and dout
(B*T, C); hence T must be a multiple of 64. Backward is in two kernels without atomics, so it is bitwise repeatable: dQ, which
also makes delta = sum(O * dO) over D, then dK and dV with S and dP transposed, so that P^T and dS^T are operands in registers.

Every loop is one stage deep in products and STAGES - 1 tiles deep in loads; the tile before the current one has been read by
all warps after the barrier in the loop, and its buffer is then refilled.

FLOPs, the masked half not counted: 2 B H T^2 D forward, 5 B H T^2 D backward (7 executed).
"""

import math

import torch
from torch import Tensor

from kernels import dispatch
from kernels.triton_compat import GluonTensorDescriptor as TensorDescriptor
from kernels.triton_compat import gl, gluon, hopper

fence_async_shared, mbarrier, tma = hopper.fence_async_shared, hopper.mbarrier, hopper.tma
warpgroup_mma, warpgroup_mma_wait = hopper.warpgroup_mma, hopper.warpgroup_mma_wait

HEAD_SIZE = 64
TILE = 64  # rows of Q (forward, dQ) or of K and V (dK, dV) that a program owns
NUM_WARPS = 4
# Measured on an H100 SXM at B=64, T=1024: more stages or larger tiles cost programs per SM and lose 5 to 30%.
STREAM = {"attention_fwd": (64, 3), "attention_dq": (64, 3), "attention_dkdv": (32, 4)}  # rows of a streamed tile, stages

# Triton 3.8 and later rename these.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_tile = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@gluon.jit
def _load_pair(a_desc, a_col, a_tile, b_desc, b_col, b_tile, row, ready, pred):
    """Starts the loads of two tiles of the same rows; `ready` completes with both."""
    mbarrier.expect(ready, a_desc.block_type.nbytes + b_desc.block_type.nbytes, pred=pred)
    load_tile(a_desc, [row, a_col], ready, a_tile, pred=pred)
    load_tile(b_desc, [row, b_col], ready, b_tile, pred=pred)


@gluon.jit
def _init(bars, STAGES: gl.constexpr):
    for s in gl.static_range(STAGES):
        mbarrier.init(bars.index(s), count=1)


@gluon.jit
def _fwd_kernel(
    q_desc, kv_desc, out_desc, lse_ptr, lse_stride, T, H, scale_log2e,
    D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_N, 16])  # (BLOCK_M, BLOCK_N)
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, D, 16])  # (BLOCK_M, D)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    tiles_m = T // BLOCK_M
    pid = gl.program_id(0)
    bh = pid // tiles_m  # the tiles of a head run side by side and share its K and V in L2
    m = (tiles_m - 1 - pid % tiles_m) * BLOCK_M  # the longest rows first
    row = bh // H * T
    col = bh % H * D
    C = H * D

    q = gl.allocate_shared_memory(dtype, [BLOCK_M, D], q_desc.layout)
    k = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], kv_desc.layout)
    v = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], kv_desc.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    _init(q_ready, 1)
    _init(ready, STAGES)
    fence_async_shared()
    barrier()

    # Keys from the diagonal down, so that only the first tile needs the mask.
    tiles = m // BLOCK_N + 1
    mbarrier.expect(q_ready.index(0), q_desc.block_type.nbytes)
    load_tile(q_desc, [row + m, col], q_ready.index(0), q)
    for t in gl.static_range(STAGES - 1):
        n = row + m - t * BLOCK_N
        _load_pair(kv_desc, C + col, k.index(t), kv_desc, 2 * C + col, v.index(t), n, ready.index(t), t < tiles)

    offs_m = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, s_layout))
    offs_n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, s_layout))
    zeros = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout=s_layout)
    out = gl.zeros([BLOCK_M, D], gl.float32, layout=o_layout)
    mbarrier.wait(q_ready.index(0), 0)
    mbarrier.wait(ready.index(0), 0)
    s = warpgroup_mma(q, k.index(0).permute((1, 0)), zeros, use_acc=False)
    s = gl.where(offs_n[None, :] <= offs_m[:, None], s, float("-inf"))
    top = gl.max(s, 1)
    p = gl.exp2(s * scale_log2e - (top * scale_log2e)[:, None])
    total = gl.sum(p, 1)
    p16 = gl.convert_layout(p.to(dtype), p_layout)
    for t in range(1, tiles):
        here = t % STAGES
        before = (t - 1) % STAGES
        barrier()
        ahead = t + STAGES - 2  # into the buffer of tile t - 2
        fill = ahead % STAGES
        n = row + m - ahead * BLOCK_N
        _load_pair(
            kv_desc, C + col, k.index(fill), kv_desc, 2 * C + col, v.index(fill), n, ready.index(fill),
            ahead < tiles,
        )  # fmt: skip
        mbarrier.wait(ready.index(here), (t // STAGES) & 1)
        s_acc = warpgroup_mma(q, k.index(here).permute((1, 0)), zeros, use_acc=False, is_async=True)
        out_acc = warpgroup_mma(p16, v.index(before), out, is_async=True)  # runs under the exponentials below
        s = warpgroup_mma_wait(1, deps=[s_acc])
        new_top = gl.maximum(top, gl.max(s, 1))
        shrink = gl.exp2((top - new_top) * scale_log2e)
        top = new_top
        p = gl.exp2(s * scale_log2e - (top * scale_log2e)[:, None])
        total = total * shrink + gl.sum(p, 1)
        out, _ = warpgroup_mma_wait(0, deps=[out_acc, p16])
        out = out * gl.convert_layout(shrink, gl.SliceLayout(1, o_layout))[:, None]
        p16 = gl.convert_layout(p.to(dtype), p_layout)
    out = warpgroup_mma(p16, v.index((tiles - 1) % STAGES), out)
    gl.store(lse_ptr + bh.to(gl.int64) * lse_stride + m + offs_m, top * scale_log2e + gl.log2(total))
    out = out / gl.convert_layout(total, gl.SliceLayout(1, o_layout))[:, None]
    barrier()  # all warps have read Q: its buffer takes the result
    q.store(out.to(dtype))
    fence_async_shared()
    barrier()
    store_tile(out_desc, [row + m, col], q)
    tma.store_wait(0)


@gluon.jit
def _dq_kernel(
    q_desc, kv_desc, out_desc, dout_desc, dq_desc, lse_ptr, delta_ptr, lse_stride, T, H, scale, scale_log2e,
    D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_N, 16])  # (BLOCK_M, BLOCK_N)
    q_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, D, 16])  # (BLOCK_M, D)
    ds_layout: gl.constexpr = gl.DotOperandLayout(0, q_layout, 2)
    tiles_m = T // BLOCK_M
    pid = gl.program_id(0)
    bh = pid // tiles_m
    m = (tiles_m - 1 - pid % tiles_m) * BLOCK_M  # the longest rows first
    row = bh // H * T
    col = bh % H * D
    C = H * D

    q = gl.allocate_shared_memory(dtype, [BLOCK_M, D], q_desc.layout)
    dout = gl.allocate_shared_memory(dtype, [BLOCK_M, D], q_desc.layout)
    out = gl.allocate_shared_memory(dtype, [BLOCK_M, D], q_desc.layout)
    k = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], kv_desc.layout)
    v = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], kv_desc.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    _init(q_ready, 1)
    _init(ready, STAGES)
    fence_async_shared()
    barrier()

    tiles = m // BLOCK_N + 1  # from the diagonal down
    mbarrier.expect(q_ready.index(0), 3 * q_desc.block_type.nbytes)
    load_tile(q_desc, [row + m, col], q_ready.index(0), q)
    load_tile(dout_desc, [row + m, col], q_ready.index(0), dout)
    load_tile(out_desc, [row + m, col], q_ready.index(0), out)
    for t in gl.static_range(STAGES - 1):
        n = row + m - t * BLOCK_N
        _load_pair(kv_desc, C + col, k.index(t), kv_desc, 2 * C + col, v.index(t), n, ready.index(t), t < tiles)

    offs_m = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, s_layout))
    offs_n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, s_layout))
    stats = bh.to(gl.int64) * lse_stride + m + offs_m
    lse = gl.load(lse_ptr + stats)
    zeros = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout=s_layout)
    dq = gl.zeros([BLOCK_M, D], gl.float32, layout=q_layout)
    mbarrier.wait(q_ready.index(0), 0)
    delta = gl.sum(out.load(q_layout).to(gl.float32) * dout.load(q_layout).to(gl.float32), 1)
    delta = gl.convert_layout(delta, gl.SliceLayout(1, s_layout))
    gl.store(delta_ptr + stats, delta)
    mbarrier.wait(ready.index(0), 0)
    s = warpgroup_mma(q, k.index(0).permute((1, 0)), zeros, use_acc=False)
    for t in range(tiles):
        here = t % STAGES
        after = (t + 1) % STAGES
        dp_acc = warpgroup_mma(dout, v.index(here).permute((1, 0)), zeros, use_acc=False, is_async=True)
        p = gl.exp2(s * scale_log2e - lse[:, None])
        if t == 0:
            p = gl.where(offs_n[None, :] <= offs_m[:, None], p, 0.0)
        barrier()
        ahead = t + STAGES - 1  # into the buffer of tile t - 1
        fill = ahead % STAGES
        n = row + m - ahead * BLOCK_N
        _load_pair(
            kv_desc, C + col, k.index(fill), kv_desc, 2 * C + col, v.index(fill), n, ready.index(fill), ahead < tiles
        )  # fmt: skip
        dp = warpgroup_mma_wait(0, deps=[dp_acc])
        ds = gl.convert_layout((p * (dp - delta[:, None])).to(dtype), ds_layout)
        dq_acc = warpgroup_mma(ds, k.index(here), dq, is_async=True)
        if t + 1 < tiles:
            mbarrier.wait(ready.index(after), ((t + 1) // STAGES) & 1)
        s_acc = warpgroup_mma(q, k.index(after).permute((1, 0)), zeros, use_acc=False, is_async=True)  # unused after the last
        dq, s, _ = warpgroup_mma_wait(0, deps=[dq_acc, s_acc, ds])
    barrier()
    q.store((dq * scale).to(dtype))
    fence_async_shared()
    barrier()
    store_tile(dq_desc, [row + m, col], q)
    tma.store_wait(0)


@gluon.jit
def _dkdv_kernel(
    q_desc, kv_desc, dout_desc, dkv_desc, lse_ptr, delta_ptr, lse_stride, T, H, scale, scale_log2e,
    D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_M, 16])  # (BLOCK_N, BLOCK_M)
    k_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, D, 16])  # (BLOCK_N, D)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, k_layout, 2)
    tiles_n = T // BLOCK_N
    pid = gl.program_id(0)
    bh = pid // tiles_n
    n = pid % tiles_n * BLOCK_N  # the longest columns first
    row = bh // H * T + n
    col = bh % H * D
    C = H * D

    k = gl.allocate_shared_memory(dtype, [BLOCK_N, D], kv_desc.layout)
    v = gl.allocate_shared_memory(dtype, [BLOCK_N, D], kv_desc.layout)
    q = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, D], q_desc.layout)
    dout = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, D], q_desc.layout)
    kv_ready = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    _init(kv_ready, 1)
    _init(ready, STAGES)
    fence_async_shared()
    barrier()

    tiles = (T - n) // BLOCK_M  # from the diagonal to the end of the sequence
    _load_pair(kv_desc, C + col, k, kv_desc, 2 * C + col, v, row, kv_ready.index(0), True)
    for t in gl.static_range(STAGES - 1):
        _load_pair(q_desc, col, q.index(t), dout_desc, col, dout.index(t), row + t * BLOCK_M, ready.index(t), t < tiles)

    offs_m = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, s_layout))
    offs_n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, s_layout))
    lse_ptr += bh.to(gl.int64) * lse_stride + n
    delta_ptr += bh.to(gl.int64) * lse_stride + n
    zeros = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, layout=s_layout)
    dk = gl.zeros([BLOCK_N, D], gl.float32, layout=k_layout)
    dv = gl.zeros([BLOCK_N, D], gl.float32, layout=k_layout)
    lse = gl.load(lse_ptr + offs_m)
    mbarrier.wait(kv_ready.index(0), 0)
    mbarrier.wait(ready.index(0), 0)
    s = warpgroup_mma(k, q.index(0).permute((1, 0)), zeros, use_acc=False)  # S^T
    for t in range(tiles):
        here = t % STAGES
        after = (t + 1) % STAGES
        dp_acc = warpgroup_mma(v, dout.index(here).permute((1, 0)), zeros, use_acc=False, is_async=True)
        delta = gl.load(delta_ptr + t * BLOCK_M + offs_m)
        p = gl.exp2(s * scale_log2e - lse[None, :])
        if t < BLOCK_N // BLOCK_M:
            p = gl.where(offs_n[:, None] <= t * BLOCK_M + offs_m[None, :], p, 0.0)
        p16 = gl.convert_layout(p.to(dtype), p_layout)
        barrier()
        ahead = t + STAGES - 1  # into the buffer of tile t - 1
        fill = ahead % STAGES
        _load_pair(
            q_desc, col, q.index(fill), dout_desc, col, dout.index(fill), row + ahead * BLOCK_M, ready.index(fill),
            ahead < tiles,
        )  # fmt: skip
        dp = warpgroup_mma_wait(0, deps=[dp_acc])
        dv_acc = warpgroup_mma(p16, dout.index(here), dv, is_async=True)
        ds = gl.convert_layout((p * (dp - delta[None, :])).to(dtype), p_layout)
        dk_acc = warpgroup_mma(ds, q.index(here), dk, is_async=True)
        lse = gl.load(lse_ptr + gl.minimum(t + 1, tiles - 1) * BLOCK_M + offs_m)
        if t + 1 < tiles:
            mbarrier.wait(ready.index(after), ((t + 1) // STAGES) & 1)
        s_acc = warpgroup_mma(k, q.index(after).permute((1, 0)), zeros, use_acc=False, is_async=True)  # unused after the last
        dv, dk, s, _, _ = warpgroup_mma_wait(0, deps=[dv_acc, dk_acc, s_acc, p16, ds])
    barrier()
    k.store((dk * scale).to(dtype))
    v.store(dv.to(dtype))
    fence_async_shared()
    barrier()
    store_tile(dkv_desc, [row, C + col], k)
    store_tile(dkv_desc, [row, 2 * C + col], v)
    tma.store_wait(0)


def supports(qkv: Tensor, n_head: int, dropout_p: float) -> bool:
    """Whether these kernels take this call; `attention` has others for the rest."""
    B, T, C3 = qkv.shape
    return (
        not dispatch.interpreting()
        and qkv.device.type != "cpu"
        and dispatch.capability(qkv.device) == (9, 0)
        and 3 * n_head * HEAD_SIZE == C3
        and T % TILE == 0
        and B * T > 0
        and dropout_p == 0.0
        and qkv.dtype in (torch.bfloat16, torch.float16)
        and qkv.is_contiguous()
        and qkv.data_ptr() % 16 == 0  # TMA
    )


def _shared_layout() -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


def _tiles(x: Tensor, rows: int) -> TensorDescriptor:
    """x (B, T, columns) as a source or sink of (rows, D) tiles."""
    B, T, columns = x.shape
    return TensorDescriptor(x, [B * T, columns], [columns, 1], [rows, HEAD_SIZE], _shared_layout())


def forward(qkv: Tensor, out: Tensor, lse: Tensor, n_head: int, scale: float) -> None:
    """Writes out (B, T, C) and lse (B, H, >= T), base 2, from qkv (B, T, 3C)."""
    B, T, _ = qkv.shape
    stream, stages = STREAM["attention_fwd"]
    _fwd_kernel[(B * n_head * (T // TILE),)](
        _tiles(qkv, TILE), _tiles(qkv, stream), _tiles(out, TILE), lse, lse.stride(1), T, n_head, scale * math.log2(math.e),
        HEAD_SIZE, TILE, stream, stages, num_warps=NUM_WARPS,
    )  # fmt: skip


def backward(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, delta: Tensor, dqkv: Tensor, n_head: int, scale: float
) -> None:
    """Writes dqkv (B, T, 3C), with delta, shaped as lse, for scratch."""
    B, T, _ = qkv.shape
    grid = (B * n_head * (T // TILE),)
    rest = lse, delta, lse.stride(1), T, n_head, scale, scale * math.log2(math.e), HEAD_SIZE
    stream, stages = STREAM["attention_dq"]
    _dq_kernel[grid](
        _tiles(qkv, TILE), _tiles(qkv, stream), _tiles(out, TILE), _tiles(dout, TILE), _tiles(dqkv, TILE), *rest,
        TILE, stream, stages, num_warps=NUM_WARPS,
    )  # fmt: skip
    stream, stages = STREAM["attention_dkdv"]
    _dkdv_kernel[grid](
        _tiles(qkv, stream), _tiles(qkv, TILE), _tiles(dout, stream), _tiles(dqkv, TILE), *rest,
        stream, TILE, stages, num_warps=NUM_WARPS,
    )  # fmt: skip
