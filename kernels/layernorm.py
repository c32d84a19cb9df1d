"""LayerNorm, alone or after the residual addition that precedes it.

    r = residual + dropout(x)        (x itself without a residual)
    y = (r - mean) rstd w + b        mean, rstd over the C channels of a row

    backward, with n = (r - mean) rstd and g = dy w:
    dr = rstd (g - mean(g) - n mean(g n)) + dnew_residual;  dresidual = dr;  dx = dropout mask * dr
    dw = sum over rows of dy n;  db = sum over rows of dy

M rows (B*T), C channels. Saved for backward: r, mean and rstd (fp32). r is rounded to its dtype before the statistics,
so that forward and backward see the same numbers. Bytes per element, 16-bit: forward reads x, residual and writes y, r
(8; 4 alone); backward reads dy, dr, r and writes dr (8; 6 alone). Parameters and statistics are small beside them.
"""

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import configs, cpu, dispatch
from kernels.dropout import check_dropout, draw_seed, dropout_factor
from kernels.library import custom_op, once_differentiable
from kernels.triton_compat import cdiv, next_power_of_2, tl, triton

MAX_C = 8192


def layer_norm_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    return F.layer_norm(x.float(), x.shape[-1:], weight.float(), None if bias is None else bias.float(), eps).to(x.dtype)


def layer_norm_residual_ref(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, dropout_p: float = 0.0
) -> tuple[Tensor, Tensor]:
    new_residual = residual + F.dropout(x, dropout_p)
    return layer_norm_ref(new_residual, weight, bias, eps), new_residual


@triton.jit
def _layer_norm_fwd_kernel(
    x_ptr,  # (M, C), row stride stride_xm
    residual_ptr,  # (M, C) or None
    weight_ptr,
    bias_ptr,  # or None
    seed_ptr,  # None without dropout
    y_ptr,
    r_out_ptr,  # (M, C), None without a residual
    mean_ptr,
    rstd_ptr,
    stride_xm,
    M,
    C,
    eps,
    dropout_p,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.arange(0, BLOCK_C)
    mask_m = rows < M
    mask_c = offs_c < C
    mask = mask_m[:, None] & mask_c[None, :]
    rows_2d = rows.to(tl.int64)[:, None]
    offs = rows_2d * C + offs_c[None, :]

    x = tl.load(x_ptr + rows_2d * stride_xm + offs_c[None, :], mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        if seed_ptr is not None:
            x *= dropout_factor(seed_ptr, rows[:, None], offs_c[None, :], dropout_p)
        r = (x + tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)).to(r_out_ptr.dtype.element_ty)
        tl.store(r_out_ptr + offs, r, mask=mask)
        x = r.to(tl.float32)

    mean = tl.sum(x, 1) / C
    centred = tl.where(mask, x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / C + eps)
    tl.store(mean_ptr + rows, mean, mask=mask_m)
    tl.store(rstd_ptr + rows, rstd, mask=mask_m)

    y = centred * rstd[:, None] * tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _layer_norm_bwd_kernel(
    dy_ptr,  # (M, C)
    dr_out_ptr,  # gradient of the new residual stream, or None
    r_ptr,  # (M, C), row stride stride_rm
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    seed_ptr,  # None without dropout
    dr_ptr,  # (M, C)
    dx_ptr,  # (M, C) with dropout, else None: dx is dr
    dw_ptr,  # (P, C) fp32, one row a program
    db_ptr,  # (P, C) fp32 or None
    stride_rm,
    M,
    C,
    dropout_p,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    pid = tl.program_id(0)
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    weight = tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    db = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    # STAGES - 1 iterations' rows are on their way into shared memory while one is computed.
    for start in tl.range(pid * BLOCK_M, M, tl.num_programs(0) * BLOCK_M, num_stages=STAGES):
        rows = start + tl.arange(0, BLOCK_M)
        mask_m = rows < M
        mask = mask_m[:, None] & mask_c[None, :]
        rows_2d = rows.to(tl.int64)[:, None]
        offs = rows_2d * C + offs_c[None, :]
        dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        r = tl.load(r_ptr + rows_2d * stride_rm + offs_c[None, :], mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + rows, mask=mask_m, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=mask_m, other=0.0)

        n = (r - mean[:, None]) * rstd[:, None]  # masked columns hold -mean rstd, but dy = 0 there
        g = dy * weight[None, :]
        dr = rstd[:, None] * (g - (tl.sum(g, 1) / C)[:, None] - n * (tl.sum(g * n, 1) / C)[:, None])
        if dr_out_ptr is not None:
            dr += tl.load(dr_out_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        tl.store(dr_ptr + offs, dr.to(dr_ptr.dtype.element_ty), mask=mask)
        if dx_ptr is not None:
            dx = dr * dropout_factor(seed_ptr, rows[:, None], offs_c[None, :], dropout_p)
            tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        dw += dy * n
        if db_ptr is not None:
            db += dy

    offs_p = pid.to(tl.int64) * C + offs_c
    tl.store(dw_ptr + offs_p, tl.sum(dw, 0), mask=mask_c)
    if db_ptr is not None:
        tl.store(db_ptr + offs_p, tl.sum(db, 0), mask=mask_c)


def _bucket(C: int) -> tuple[str, int]:
    """Name in the config table and BLOCK_C."""
    block = max(next_power_of_2(C), 32)
    return f"c{max(block, 256)}", block


def _for_dropout(config: dict, block: int) -> dict:
    """Philox for more than 32 elements a thread spills registers."""
    return config | {"num_warps": max(config["num_warps"], config["BLOCK_M"] * block // 1024)}


def fwd_candidates(arch: int) -> Iterator[dict]:
    for rows in (1, 2, 4, 8):
        for warps in (1, 2, 4, 8, 16):
            yield {"BLOCK_M": rows, "num_warps": warps}


def bwd_candidates(arch: int) -> Iterator[dict]:
    for rows in (1, 2, 4):
        for warps, programs in ((1, (8, 12, 16)), (2, (4, 6, 8, 12)), (4, (2, 3, 4, 5, 6, 8)), (8, (1, 2, 3, 4)), (16, (1, 2))):
            for n, stages in itertools.product(programs, (1, 2, 3) if rows < 4 else (1,)):
                yield {"BLOCK_M": rows, "STAGES": stages, "num_warps": warps, "programs_per_sm": n}


def _rows(x: Tensor) -> Tensor:
    """x (..., C) as (M, C), each row of neighbouring elements."""
    x2 = x.reshape(-1, x.shape[-1])
    return x2 if x2.stride(1) == 1 else x2.contiguous()


@custom_op("layer_norm_fwd")
def _layer_norm_fwd(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, seed: Tensor | None, eps: float, dropout_p: float
) -> list[Tensor]:
    """[y (..., C), statistics (2, M)], and with a residual r (..., C)."""
    x2 = _rows(x)
    M, C = x2.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    r = None if residual is None else torch.empty_like(y)
    residual, weight, bias = (None if t is None else t.contiguous() for t in (residual, weight, bias))
    statistics = torch.empty((2, M), dtype=torch.float32, device=x.device)
    mean, rstd = statistics.unbind()
    bucket, block = _bucket(C)

    def launch(config):
        config = config if seed is None else _for_dropout(config, block)
        grid = (cdiv(M, config["BLOCK_M"]),)
        args = (x2, residual, weight, bias, seed, y, r, mean, rstd, x2.stride(0), M, C, eps, dropout_p)
        _layer_norm_fwd_kernel[grid](*args, BLOCK_C=block, **config)

    with torch.cuda.device_of(x):
        if M:
            launch(configs.select("layer_norm_fwd", bucket, fwd_candidates, launch))
    return [y, statistics] if r is None else [y, statistics, r]


@torch.library.register_fake(_layer_norm_fwd)
def _(x, residual, weight, bias, seed, eps, dropout_p):
    statistics = x.new_empty((2, x.numel() // x.shape[-1]), dtype=torch.float32)
    return [x.new_empty(x.shape), statistics] + ([] if residual is None else [x.new_empty(x.shape)])


@custom_op("layer_norm_bwd")
def _layer_norm_bwd(
    dy: Tensor,
    dr_out: Tensor | None,
    r: Tensor,
    weight: Tensor,
    statistics: Tensor,
    seed: Tensor | None,
    has_bias: bool,
    dropout_p: float,
) -> list[Tensor]:
    """[dr (..., C), parameter gradients (1 or 2, C)], and dx (..., C) with dropout."""
    r2 = _rows(r)
    M, C = r2.shape
    dy, weight, dr_out = dy.contiguous(), weight.contiguous(), None if dr_out is None else dr_out.contiguous()
    dr = torch.empty(r.shape, dtype=r.dtype, device=r.device)
    dx = None if seed is None else torch.empty_like(dr)
    mean, rstd = statistics.unbind()
    bucket, block = _bucket(C)
    partials = None

    def launch(config):
        nonlocal partials
        limit = config.pop("programs_per_sm") * configs.multiprocessors(r.device)
        programs = max(min(limit, cdiv(M, config["BLOCK_M"])), 1)
        partials = torch.empty((1 + has_bias, programs, C), dtype=torch.float32, device=r.device)
        dw, db = partials.unbind() if has_bias else (partials, None)
        args = (dy, dr_out, r2, weight, mean, rstd, seed, dr, dx, dw, db, r2.stride(0), M, C, dropout_p)
        _layer_norm_bwd_kernel[(programs,)](*args, BLOCK_C=block, **config)

    with torch.cuda.device_of(r):
        launch(configs.select("layer_norm_bwd", bucket, bwd_candidates, launch))
    return [dr, partials.sum(1)] + ([] if dx is None else [dx])


@torch.library.register_fake(_layer_norm_bwd)
def _(dy, dr_out, r, weight, statistics, seed, has_bias, dropout_p):
    parameters = r.new_empty((1 + has_bias, r.shape[-1]), dtype=torch.float32)
    return [r.new_empty(r.shape), parameters] + ([] if seed is None else [r.new_empty(r.shape)])


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, seed, eps, dropout_p):
        y, statistics, *r = _layer_norm_fwd(x, residual, weight, bias, seed, eps, dropout_p)
        ctx.save_for_backward(r[0] if r else x, weight, statistics, seed)
        ctx.bias_dtype, ctx.dropout_p = None if bias is None else bias.dtype, dropout_p
        ctx.has_residual = residual is not None
        ctx.set_materialize_grads(False)  # the last block's residual stream has no consumer, hence no gradient
        return (y, r[0]) if r else y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dr_out=None):
        r, weight, statistics, seed = ctx.saved_tensors
        dy = torch.zeros_like(r) if dy is None else dy
        has_bias = ctx.bias_dtype is not None
        dr, parameters, *dx = _layer_norm_bwd(dy, dr_out, r, weight, statistics, seed, has_bias, ctx.dropout_p)
        db = parameters[1].to(ctx.bias_dtype) if has_bias else None
        return dx[0] if dx else dr, dr if ctx.has_residual else None, parameters[0].to(weight.dtype), db, None, None, None


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    C = x.shape[-1]
    if not 0 < C <= MAX_C:
        raise ValueError(f"layer_norm: {C} channels, expected 1..{MAX_C}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != (C,):
            raise ValueError(f"layer_norm: {name} of shape {tuple(parameter.shape)} for {C} channels")


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """LayerNorm over the last dimension (Ba et al., arXiv:1607.06450), computed in fp32.

    Args:
        x: (..., C), C <= 8192; fp32, fp16 or bf16.
        weight: (C,) fp32, or 16 bits as under FSDP2's mixed precision.
        bias: (C,), likewise, or None.
        eps: added to the variance.

    Returns:
        (..., C) in x's dtype. The gradients of weight and bias are summed in fp32.

    Raises:
        ValueError: for shapes that do not fit together or more than 8192 channels.
    """
    _check(x, weight, bias)
    backend = dispatch.choose("layer_norm", x.device.type)
    if backend == "torch":
        return layer_norm_ref(x, weight, bias, eps)
    if backend == "cpp":
        return cpu.layer_norm(x, weight, bias, eps)
    return _LayerNorm.apply(x, None, weight, bias, None, eps, 0.0)


def layer_norm_residual(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, dropout_p: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Adds a branch to the residual stream, with dropout on the branch, and normalises the sum.

    Args:
        x: (..., C) the branch, C <= 8192; fp32, fp16 or bf16.
        residual: the stream, x's shape and dtype.
        weight: (C,) fp32, or 16 bits as under FSDP2's mixed precision.
        bias: (C,), likewise, or None.
        eps: added to the variance.
        dropout_p: probability of dropping an element of x; 0 in evaluation.

    Returns:
        (y, new_residual), both (..., C) in x's dtype: LayerNorm(new_residual) and residual + dropout(x).

    Raises:
        ValueError: for shapes or dtypes that do not fit together, more than 8192 channels, dropout_p outside [0, 1).
    """
    _check(x, weight, bias)
    check_dropout(dropout_p)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        stream = f"{tuple(residual.shape)} {residual.dtype}"
        raise ValueError(f"layer_norm_residual: x is {tuple(x.shape)} {x.dtype}, the residual stream {stream}")
    backend = dispatch.choose("layer_norm", x.device.type)
    if backend == "torch":
        return layer_norm_residual_ref(x, residual, weight, bias, eps, dropout_p)
    if backend == "cpp":
        return cpu.layer_norm_residual(x, residual, weight, bias, eps, dropout_p)
    return _LayerNorm.apply(x, residual, weight, bias, draw_seed(x.device, dropout_p), eps, dropout_p)
