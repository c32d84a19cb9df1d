"""Token plus position embedding, y[b, t] = dropout(wte[idx[b, t]] + wpe[offset + t]), and its deterministic backward.

M rows (B*T), C channels, V tokens. Read from the fp32 parameters, summed in fp32, rounded once.

    backward   dwpe[offset + t] = sum over b of dy[b, t];  dwte[v] = sum over the rows whose token is v

No atomics: rows are ordered by token (a stable sort, so equal tokens keep their order), and each program sums ROWS of them in
order. A run of equal tokens inside its rows it writes to dwte itself; the part of a run that crosses its border goes to a
partial sum, and a second kernel adds the partial sums of each such run, again in order. The work of both is even however
often one token occurs. Bytes: forward 6 per element (4 from wte, mostly cached, and 2 written); backward reads dy twice.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import configs, dispatch
from kernels.dropout import check_dropout, draw_seed, dropout_factor
from kernels.library import custom_op, once_differentiable
from kernels.triton_compat import cdiv, next_power_of_2, tl, triton

HEADS = 16  # partial sums of a long run loaded at a time


def embedding_ref(idx: Tensor, wte: Tensor, wpe: Tensor, dtype: torch.dtype, dropout_p: float = 0.0, offset: int = 0) -> Tensor:
    return F.dropout((F.embedding(idx, wte) + wpe[offset : offset + idx.shape[1]]).to(dtype), dropout_p)


@triton.jit(do_not_specialize=["offset"])
def _embedding_fwd_kernel(
    idx_ptr,  # (M,) = (B, T)
    wte_ptr,  # (V, C), row stride stride_te
    wpe_ptr,  # (positions, C), row stride stride_pe
    seed_ptr,  # None without dropout
    y_ptr,  # (M, C)
    stride_te,
    stride_pe,
    T,
    C,
    V,
    offset,
    dropout_p,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0)
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    token = tl.load(idx_ptr + row).to(tl.int64)
    position = (row % T + offset).to(tl.int64)
    # A token outside the vocabulary gives NaN instead of whatever lies there.
    width = tl.where((token >= 0) & (token < V), C, 0)
    y = tl.load(wte_ptr + token * stride_te + offs_c, mask=offs_c < width, other=float("nan")).to(tl.float32)
    y += tl.load(wpe_ptr + position * stride_pe + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    if seed_ptr is not None:
        y *= tl.reshape(dropout_factor(seed_ptr, row + tl.zeros((1, 1), tl.int32), offs_c[None, :], dropout_p), (BLOCK_C,))
    tl.store(y_ptr + row.to(tl.int64) * C + offs_c, y.to(y_ptr.dtype.element_ty), mask=mask_c)


@triton.jit
def _dy_row(dy_ptr, seed_ptr, row, offs_c, C, dropout_p, BLOCK_C: tl.constexpr):
    """Row `row` of dy (M, C) behind dropout, fp32."""
    dy = tl.load(dy_ptr + row.to(tl.int64) * C + offs_c, mask=offs_c < C, other=0.0).to(tl.float32)
    if seed_ptr is not None:
        rows = row.to(tl.int32) + tl.zeros((1, 1), tl.int32)
        dy *= tl.reshape(dropout_factor(seed_ptr, rows, offs_c[None, :], dropout_p), (BLOCK_C,))
    return dy


@triton.jit
def _embedding_dwpe_kernel(
    dy_ptr,  # (B, T, C)
    seed_ptr,
    dwpe_ptr,  # (T, C) fp32: positions offset..offset + T - 1
    B,
    T,
    C,
    dropout_p,
    BLOCK_C: tl.constexpr,
):
    t = tl.program_id(0)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_C,), tl.float32)
    for b in range(B):
        total += _dy_row(dy_ptr, seed_ptr, b * T + t, offs_c, C, dropout_p, BLOCK_C)
    tl.store(dwpe_ptr + t.to(tl.int64) * C + offs_c, total, mask=offs_c < C)


@triton.jit
def _embedding_dwte_kernel(
    dy_ptr,  # (M, C)
    seed_ptr,
    tokens_ptr,  # (M,) ascending
    rows_ptr,  # (M,) row of dy that each comes from
    dwte_ptr,  # (V, C) fp32, zero
    partials_ptr,  # (tiles, 2, C) fp32: sums of the tile's rows whose run began before it, and whose run goes on behind it
    M,
    C,
    V,
    dropout_p,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = tile * ROWS
    last = tl.minimum(first + ROWS, M)
    token = tl.load(tokens_ptr + first)
    from_before = (first > 0) & (tl.load(tokens_ptr + first - 1, mask=first > 0, other=-1) == token)
    total = tl.zeros((BLOCK_C,), tl.float32)
    for i in range(first, last):
        total += _dy_row(dy_ptr, seed_ptr, tl.load(rows_ptr + i), offs_c, C, dropout_p, BLOCK_C)
        following = tl.load(tokens_ptr + i + 1, mask=i + 1 < M, other=-1)
        goes_on = (i + 1 < M) & (following == token)
        if (i + 1 == last) | (following != token):
            width = tl.where(from_before | goes_on, C, 0)
            slot = 2 * tile + tl.where(from_before, 0, 1)
            tl.store(partials_ptr + slot * C + offs_c, total, mask=offs_c < width)
            width = tl.where(from_before | goes_on | (token < 0) | (token >= V), 0, C)
            tl.store(dwte_ptr + token * C + offs_c, total, mask=offs_c < width)
            token = following
            from_before = first < 0  # the tile's later runs begin in it
            total = tl.zeros((BLOCK_C,), tl.float32)


@triton.jit
def _embedding_runs_kernel(
    tokens_ptr, partials_ptr, dwte_ptr, M, C, V, ROWS: tl.constexpr, HEADS: tl.constexpr, BLOCK_C: tl.constexpr
):
    """dwte of the run that begins in this tile and ends in a later one: its tail plus the heads of the tiles it reaches."""
    tile = tl.program_id(0).to(tl.int64)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    n_tiles = tl.cdiv(M, ROWS)
    border = (tile + 1) * ROWS
    if border < M:
        token = tl.load(tokens_ptr + border - 1)
        begins_here = (tile == 0) | (tl.load(tokens_ptr + tile * ROWS - 1, mask=tile > 0, other=-1) != token)
        goes_on = tl.load(tokens_ptr + border) == token
        if begins_here & goes_on & (token >= 0) & (token < V):
            # The tiles after this one whose first token is still the same: binary search for where that ends.
            low = tile + 1
            high = tl.zeros_like(low) + n_tiles
            while low < high:
                middle = (low + high) // 2
                same = tl.load(tokens_ptr + middle * ROWS) == token
                low = tl.where(same, middle + 1, low)
                high = tl.where(same, high, middle)
            total = tl.zeros((HEADS, BLOCK_C), tl.float32)
            for start in range(tile + 1, high, HEADS):
                heads = start + tl.arange(0, HEADS)
                mask = (heads < high)[:, None] & mask_c[None, :]
                total += tl.load(partials_ptr + 2 * heads[:, None] * C + offs_c[None, :], mask=mask, other=0.0)
            tail = tl.load(partials_ptr + (2 * tile + 1) * C + offs_c, mask=mask_c, other=0.0)
            tl.store(dwte_ptr + token * C + offs_c, tail + tl.sum(total, 0), mask=mask_c)


def _bucket(C: int) -> tuple[str, int]:
    """Name in the config table and BLOCK_C."""
    block = max(next_power_of_2(C), 32)
    return f"c{min(max(block, 256), 8192)}", block


def fwd_candidates(arch: int) -> Iterator[dict]:
    for warps in (1, 2, 4, 8):
        yield {"num_warps": warps}


def bwd_candidates(arch: int) -> Iterator[dict]:
    for block, warps in ((128, 1), (256, 1), (256, 2), (512, 2), (1024, 4)):
        for rows in (16, 32, 64):
            yield {"BLOCK_C": block, "ROWS": rows, "num_warps": warps}


@custom_op("embedding_fwd")
def _embedding_fwd(
    idx: Tensor, wte: Tensor, wpe: Tensor, seed: Tensor | None, dtype: torch.dtype, dropout_p: float, offset: int
) -> Tensor:
    B, T = idx.shape
    V, C = wte.shape
    idx, wte, wpe = idx.contiguous(), wte.contiguous(), wpe.contiguous()
    y = torch.empty((B, T, C), dtype=dtype, device=idx.device)
    bucket, block = _bucket(C)

    def launch(config):
        args = (idx, wte, wpe, seed, y, wte.stride(0), wpe.stride(0), T, C, V, offset, dropout_p)
        _embedding_fwd_kernel[(B * T,)](*args, BLOCK_C=block, **config)

    with torch.cuda.device_of(idx):
        if B * T:
            launch(configs.select("embedding_fwd", bucket, fwd_candidates, launch))
    return y


@torch.library.register_fake(_embedding_fwd)
def _(idx, wte, wpe, seed, dtype, dropout_p, offset):
    return wte.new_empty((*idx.shape, wte.shape[1]), dtype=dtype)


@custom_op("embedding_bwd")
def _embedding_bwd(
    dy: Tensor, idx: Tensor, seed: Tensor | None, V: int, positions: int, dropout_p: float, offset: int
) -> tuple[Tensor, Tensor]:
    B, T, C = dy.shape
    M = B * T
    dy = dy.contiguous()
    dwte = torch.zeros((V, C), dtype=torch.float32, device=dy.device)
    dwpe = torch.zeros((positions, C), dtype=torch.float32, device=dy.device)
    tokens, rows = torch.sort(idx.flatten(), stable=True)

    def launch(config):
        tile = config.pop("ROWS")
        tiles = cdiv(M, tile)
        partials = torch.empty((tiles, 2, C), dtype=torch.float32, device=dy.device)
        blocks = cdiv(C, config["BLOCK_C"])
        _embedding_dwpe_kernel[(T, blocks)](dy, seed, dwpe[offset:], B, T, C, dropout_p, **config)
        args = (dy, seed, tokens, rows, dwte, partials, M, C, V, dropout_p)
        _embedding_dwte_kernel[(tiles, blocks)](*args, ROWS=tile, **config)
        _embedding_runs_kernel[(tiles, blocks)](tokens, partials, dwte, M, C, V, ROWS=tile, HEADS=HEADS, **config)

    with torch.cuda.device_of(dy):
        if M:
            launch(configs.select("embedding_bwd", "all", bwd_candidates, launch))
    return dwte, dwpe


@torch.library.register_fake(_embedding_bwd)
def _(dy, idx, seed, V, positions, dropout_p, offset):
    C = dy.shape[2]
    return dy.new_empty((V, C), dtype=torch.float32), dy.new_empty((positions, C), dtype=torch.float32)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, idx, wte, wpe, seed, dtype, dropout_p, offset):
        ctx.save_for_backward(idx, seed)
        ctx.shapes, ctx.dtypes = (wte.shape[0], wpe.shape[0]), (wte.dtype, wpe.dtype)
        ctx.dropout_p, ctx.offset = dropout_p, offset
        return _embedding_fwd(idx, wte, wpe, seed, dtype, dropout_p, offset)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        idx, seed = ctx.saved_tensors
        dwte, dwpe = _embedding_bwd(dy, idx, seed, *ctx.shapes, ctx.dropout_p, ctx.offset)
        return None, dwte.to(ctx.dtypes[0]), dwpe.to(ctx.dtypes[1]), None, None, None, None


def embedding(idx: Tensor, wte: Tensor, wpe: Tensor, dtype: torch.dtype, dropout_p: float = 0.0, offset: int = 0) -> Tensor:
    """Token plus position embedding, with dropout.

    Args:
        idx: (B, T) int64 token ids. One outside 0..V - 1 gives a row of NaN and no gradient.
        wte: (V, C) token embedding, fp32, or 16 bits as under FSDP2's mixed precision.
        wpe: (positions, C) position embedding, likewise.
        dtype: of the result: fp32, fp16 or bf16.
        dropout_p: probability of dropping an element; 0 in evaluation.
        offset: position of the first token, where idx continues a longer text.

    Returns:
        (B, T, C) in `dtype`. The gradients of wte and wpe are summed in fp32 and the same bit by bit every time.

    Raises:
        ValueError: for positions beyond wpe, embeddings of different width, dropout_p outside [0, 1).
    """
    _, T = idx.shape
    check_dropout(dropout_p)
    if not 0 <= offset <= wpe.shape[0] - T:
        raise ValueError(f"embedding: positions {offset}..{offset + T - 1} of {wpe.shape[0]}")
    if wte.shape[1] != wpe.shape[1]:
        raise ValueError(f"embedding: wte has {wte.shape[1]} channels, wpe {wpe.shape[1]}")
    if dispatch.choose("embedding", idx.device.type) == "torch":
        return embedding_ref(idx, wte, wpe, dtype, dropout_p, offset)
    return _Embedding.apply(idx, wte, wpe, draw_seed(idx.device, dropout_p), dtype, dropout_p, offset)
