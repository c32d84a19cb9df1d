"""The compiled CPU kernels as differentiable functions: what the ``cpp`` backend of the ops in this folder runs.

Matrix products are linear.mm's; what lies between them is one C++ call each way. M rows (B*T), C channels, N hidden size.
"""

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from kernels.library import once_differentiable
from kernels.linear import mm, mm_fp32, shadow

_ops = torch.ops.nanogpt


def keep_memory() -> None:
    """Tells the C library, where that is glibc, how a training step uses memory.

    What is freed it keeps for the next step: by default it hands large blocks back to the system, which costs some 400 page
    faults a step of nanoGPT's CPU recipe, 4% of its time. And the first 512 MiB that it takes from now on may lie in pages of
    2 MiB, where Linux grants them on request, its default: with pages of 4 KiB finding them costs a step 4 to 9%."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return
    trim_threshold, mmap_max, huge_pages = -1, -4, 14  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h, MADV_HUGEPAGE
    libc.mallopt(trim_threshold, 2**30)
    libc.mallopt(mmap_max, 0)
    libc.malloc.restype, size, page = ctypes.c_void_p, 2**29, 2**12
    block = libc.malloc(ctypes.c_size_t(size))
    if block:
        libc.madvise(ctypes.c_void_p(-(-block // page) * page), ctypes.c_size_t(size - page), huge_pages)
        libc.free(ctypes.c_void_p(block))


class _LayerNorm(Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps):
        y, r, statistics = _ops.row_layer_norm(x, residual, weight, bias, eps)
        ctx.save_for_backward(x if residual is None else r, weight, statistics)
        ctx.has_residual, ctx.has_bias = residual is not None, bias is not None
        ctx.set_materialize_grads(False)
        return y if residual is None else (y, r)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dr=None):
        r, weight, statistics = ctx.saved_tensors
        dy = torch.zeros_like(r) if dy is None else dy.contiguous()
        dr = None if dr is None else dr.contiguous()
        dx, dw, db = _ops.row_layer_norm_backward(dy, dr, r, weight, statistics, ctx.has_bias)
        return dx, dx if ctx.has_residual else None, dw, db if ctx.has_bias else None, None


def _fp32(parameter: Tensor | None) -> Tensor | None:
    """As the kernels take it; mixed precision of PyTorch's own, such as FSDP2's, hands over 16-bit parameters."""
    return None if parameter is None else parameter.float().contiguous()


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return _LayerNorm.apply(x.contiguous(), None, _fp32(weight), _fp32(bias), eps)


def layer_norm_residual(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dropout_p: float
) -> tuple[Tensor, Tensor]:
    x = F.dropout(x, dropout_p) if dropout_p else x
    return _LayerNorm.apply(x.contiguous(), residual.contiguous(), _fp32(weight), _fp32(bias), eps)


class _GeluMlp(Function):
    """Forward keeps gelu's derivative instead of its argument, so that backward is one multiplication."""

    @staticmethod
    def forward(ctx, x, w_fc, b_fc, w_proj, b_proj, tanh, shadows, wanted):
        s_fc, s_proj, s_b_proj = shadows
        post = mm(x, s_fc.t())  # (M, N), the argument until the next line
        derivative = _ops.gelu_(post, b_fc, tanh, wanted)
        ctx.save_for_backward(x, post, derivative, s_fc, s_proj)
        ctx.dtypes = [None if p is None else p.dtype for p in (w_fc, b_fc, w_proj, b_proj)]
        return mm(post, s_proj.t(), s_b_proj)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, post, derivative, w_fc, w_proj = ctx.saved_tensors
        dy = dy.contiguous()
        dpre = mm(dy, w_proj)
        db_fc = _ops.gelu_backward_(dpre, derivative, ctx.dtypes[1] is not None)
        dx = mm(dpre, w_fc) if ctx.needs_input_grad[0] else None
        dw_fc, dw_proj = mm_fp32(dpre.t(), x), mm_fp32(dy.t(), post)
        db_proj = None if ctx.dtypes[3] is None else dy.sum(0, dtype=torch.float32)
        gradients = (dw_fc, db_fc, dw_proj, db_proj)
        return dx, *(None if t is None else g.to(t) for g, t in zip(gradients, ctx.dtypes)), None, None, None


def gelu_mlp(x: Tensor, w_fc: Tensor, b_fc: Tensor | None, w_proj: Tensor, b_proj: Tensor | None, tanh: bool) -> Tensor:
    shadows = [None if p is None else shadow(p, x.dtype) for p in (w_fc, w_proj, b_proj)]
    inputs = x.reshape(-1, x.shape[-1]), w_fc, _fp32(b_fc), w_proj, b_proj
    # Asked here: in forward() there is no telling that gradients are off
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    y = _GeluMlp.apply(*inputs, tanh, shadows, wanted)
    return y.view(*x.shape[:-1], w_proj.shape[0])


class _Attention(Function):
    @staticmethod
    def forward(ctx, qkv, n_head, scale):
        out, lse = _ops.head_attention(qkv, n_head, scale)
        ctx.save_for_backward(qkv, lse)
        ctx.n_head, ctx.scale = n_head, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        return _ops.head_attention_backward(dout.contiguous(), *ctx.saved_tensors, ctx.n_head, ctx.scale), None, None


def attention(qkv: Tensor, n_head: int, scale: float) -> Tensor:
    """Without dropout, which only the reference has on a CPU."""
    return _Attention.apply(qkv.contiguous(), n_head, scale)
