"""GELU and its gradient as Triton functions, for epilogues, and as elementwise kernels.

    gelu(x) = x Phi(x), Phi(x) = (1 + erf(x / sqrt 2)) / 2          exact: "none", nanoGPT
    gelu(x) = x sigmoid(2u), u = sqrt(2 / pi) (x + 0.044715 x^3)    "tanh", OpenAI's GPT-2 weights

Both are written max(x, 0) - |x| tail(|x|) with tail(a) = 1 - Phi(a), which loses no digits on either side of 0.
Hendrycks and Gimpel 2016, arXiv:1606.08415.

gelu_: read (M, N), write it twice (once without the slope). dgelu_: read two, write one. Both run at the memory's speed.
"""

import torch
from torch import Tensor

from kernels.triton_compat import cdiv, tl, triton

GELU_TILE = {"BLOCK": 1024, "num_warps": 4}  # one 16-byte access a thread
DGELU_TILE = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4}  # 16-byte accesses; tall, so that partial sums of the bias are few

# log2 tail(a) on [0, 5.5] as a polynomial, weighted for the error of a * tail(a): 1.2e-7 at most, which is fp32 rounding.
# Six FMAs and one exponential; CUDA's erff takes ~25 instructions, and a GEMM's epilogue is bound by issue slots.
P0, P1, P2 = tl.constexpr(-0.9999990463256836), tl.constexpr(-1.1511468887329102), tl.constexpr(-0.45892417430877686)
P3, P4, P5 = tl.constexpr(-0.05322571098804474), tl.constexpr(0.007971392944455147), tl.constexpr(-0.0007390823448076844)
P6 = tl.constexpr(2.9989252652740106e-05)
PDF_SCALE = tl.constexpr(0.3989422804)  # 1 / sqrt(2 pi)
PDF_RATE = tl.constexpr(-0.7213475204)  # -log2(e) / 2
TANH_LINEAR = tl.constexpr(-2.302208198)  # -2 sqrt(2 / pi) log2(e)
TANH_CUBIC = tl.constexpr(-0.1029432397)  # the same times 0.044715
SLOPE_LINEAR = tl.constexpr(1.5957691216)  # 2u' = 2 sqrt(2 / pi) (1 + 3 * 0.044715 x^2)
SLOPE_CUBIC = tl.constexpr(0.2140644488)


@triton.jit
def _tail(x, TANH: tl.constexpr):
    a = tl.abs(x)
    if TANH:
        e = tl.exp2(a * tl.fma(TANH_CUBIC, a * a, TANH_LINEAR))
        return e / (1.0 + e)
    else:
        a = tl.minimum(a, 10.0)  # the polynomial turns upwards at 24; there the tail is e-23
        p = tl.fma(tl.full(x.shape, P6, tl.float32), a, P5)
        p = tl.fma(p, a, P4)
        p = tl.fma(p, a, P3)
        p = tl.fma(p, a, P2)
        p = tl.fma(p, a, P1)
        return tl.exp2(tl.fma(p, a, P0))


@triton.jit
def gelu_of(x, TANH: tl.constexpr):
    """gelu of an fp32 tile."""
    return tl.maximum(x, 0.0) - tl.abs(x) * _tail(x, TANH)


@triton.jit
def gelu_and_slope_of(x, TANH: tl.constexpr):
    """gelu(x) and gelu'(x) = Phi(x) + x Phi'(x) of an fp32 tile."""
    tail = _tail(x, TANH)
    post = tl.maximum(x, 0.0) - tl.abs(x) * tail
    cdf = tl.where(x > 0, 1.0 - tail, tail)
    pdf = tail * (1.0 - tail) * tl.fma(x * x, SLOPE_CUBIC, SLOPE_LINEAR) if TANH else tl.exp2(x * x * PDF_RATE) * PDF_SCALE
    return post, tl.fma(x, pdf, cdf)


@triton.jit
def _gelu_kernel(pre_ptr, post_ptr, size, WITH_SLOPE: tl.constexpr, TANH: tl.constexpr, BLOCK: tl.constexpr):
    """post = gelu(pre), and pre becomes the slope there if it is wanted."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    pre = tl.load(pre_ptr + offs, mask=offs < size, other=0.0).to(tl.float32)
    if WITH_SLOPE:
        post, slope = gelu_and_slope_of(pre, TANH)
        tl.store(pre_ptr + offs, slope.to(pre_ptr.dtype.element_ty), mask=offs < size)
    else:
        post = gelu_of(pre, TANH)
    tl.store(post_ptr + offs, post.to(post_ptr.dtype.element_ty), mask=offs < size)


@triton.jit
def _dgelu_kernel(
    grad_ptr, slope_ptr, partial_ptr,  # (M, N) twice, (tiles of M, N) fp32
    M, N, stride_m,
    HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """grad *= slope in place, and the column sums of each tile of the result."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    offs = rows.to(tl.int64)[:, None] * stride_m + cols[None, :]
    grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    grad *= tl.load(slope_ptr + offs, mask=mask, other=0.0)
    tl.store(grad_ptr + offs, grad.to(grad_ptr.dtype.element_ty), mask=mask)
    if HAS_BIAS:
        tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * N + cols, tl.sum(grad, axis=0), mask=cols < N)


def gelu_(pre: Tensor, tanh: bool, with_slope: bool) -> Tensor:
    """gelu(pre), elementwise, of a contiguous matrix; pre is overwritten by gelu'(pre) if that is wanted."""
    post = torch.empty_like(pre)
    grid = (cdiv(pre.numel(), GELU_TILE["BLOCK"]),)
    _gelu_kernel[grid](pre, post, pre.numel(), WITH_SLOPE=with_slope, TANH=tanh, **GELU_TILE)
    return post


def dgelu_(grad: Tensor, slope: Tensor, has_bias: bool) -> Tensor:
    """Turns the gradient of gelu's value into that of its argument, in place; both (M, N) contiguous.

    Returns:
        The partial sums over rows of the new gradient, (tiles, N) in fp32; without a bias (0, N).
    """
    M, N = slope.shape
    grid = (cdiv(M, DGELU_TILE["BLOCK_M"]), cdiv(N, DGELU_TILE["BLOCK_N"]))
    partial = grad.new_empty(grid[0] if has_bias else 0, N, dtype=torch.float32)
    _dgelu_kernel[grid](grad, slope, partial, M, N, N, HAS_BIAS=has_bias, **DGELU_TILE)
    return partial
