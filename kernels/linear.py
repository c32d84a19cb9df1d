"""y = x W^T + b on cuBLAS, or on a CPU's matrix units, with fp32 parameters and no casts in the step.

Parameters are fp32; GEMMs read a compute-dtype copy of each, its *shadow*, which hangs on the parameter as ``.shadow`` and
which the AdamW kernel writes together with the parameter. The weight gradient leaves its GEMM in fp32 (the accumulators are
fp32 anyway), so that neither the gradient nor its sum over micro-steps is ever rounded to 16 bits.

M rows (B*T), K inputs, N outputs. FLOPs: 2MNK forward, 4MNK backward.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from kernels import dispatch
from kernels.library import once_differentiable


def shadow(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """The copy of a parameter in ``dtype``, brought up to date if the parameter was changed by other means than our AdamW.

    The parameter itself where it already has that dtype. A step of any optimizer of PyTorch's brings it up to date, other
    changes are noticed by the parameter's version counter outside of ``torch.compile``. Writes through ``parameter.data`` go
    unnoticed.
    """
    if parameter.dtype == dtype:
        return parameter.detach()
    copy = getattr(parameter, "shadow", None)
    stale = copy is None or copy.dtype != dtype or copy.device != parameter.device
    if torch.compiler.is_compiling():
        if not stale:
            return copy
    elif parameter.is_inference():  # which has no version counter
        return parameter.to(dtype)
    if stale or parameter.shadow_version != parameter._version:
        # A copy first made while sampling must serve training too.
        with torch.inference_mode(False), torch.no_grad():
            if stale:
                parameter.shadow = parameter.detach().to(dtype)
            else:
                copy.copy_(parameter)
        parameter.shadow_version = parameter._version
    return parameter.shadow


@torch.no_grad()
def _renew(optimizer: torch.optim.Optimizer, *_) -> None:
    """After a step: compiled code takes shadows as they are, and fused optimizers leave the version counters alone."""
    if not getattr(optimizer, "writes_shadows", False):
        for group in optimizer.param_groups:
            for p in group["params"]:
                if hasattr(p, "shadow"):
                    p.shadow.copy_(p)
                    p.shadow_version = p._version


register_optimizer_step_post_hook(_renew)


def linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def mm(a: Tensor, b: Tensor, bias: Tensor | None = None, out: Tensor | None = None, add: bool = False) -> Tensor:
    """a b + bias, or a b into ``out`` or added to it; every product of the CPU path but attention's, which has its own.

    fp32 on a CPU with AMX, where ``torch.set_float32_matmul_precision`` allows ("high" or "medium"): each factor as the sum of
    two bfloat16 numbers, as PyTorch defines "high", with fp32 accumulators: off by 3 * 2^-16 of the sum of magnitudes at most.

    Args:
        a, b: (M, K) and (K, N), of one dtype, transposed views included.
        bias: (N,), the same dtype.
        out: (M, N), rows of neighbouring elements.
    """
    if _splits(a):
        out = a.new_empty(a.shape[0], b.shape[1]) if out is None else out
        a, b = (t if 1 in t.stride() else t.contiguous() for t in (a, b))
        torch.ops.nanogpt.split_mm_(out, a, b, None if bias is None else bias.contiguous(), add)
        return out
    if out is None:
        return a @ b if bias is None else torch.addmm(bias, a, b)
    return out.addmm_(a, b) if add else torch.mm(a, b, out=out)


def _splits(a: Tensor) -> bool:
    """Whether to multiply by split factors. Below 32 rows, as in decoding, reading b is what takes time: that does not pay."""
    fits = a.dtype == torch.float32 and a.device.type == "cpu" and a.shape[0] >= 32 and a.shape[1] > 0
    return fits and not torch.is_autocast_enabled("cpu") and split_products()


@torch.compiler.assume_constant_result
def split_products() -> bool:
    """Whether :func:`mm` splits fp32 on this machine, with these settings."""
    return torch.get_float32_matmul_precision() != "highest" and dispatch.choose("linear", "cpu") == "cpp" and _has_amx()


@functools.cache
def _has_amx() -> bool:
    return torch.ops.nanogpt.cpu_has_amx()


def mm_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a (M, K) times b (K, N) -> fp32 (M, N), the accumulators of the 16-bit GEMM unrounded."""
    if a.dtype == torch.float32 or not a.is_cuda:
        return mm(a.float(), b.float())
    return torch.mm(a, b, out_dtype=torch.float32)


class _Linear(torch.autograd.Function):
    """Plain PyTorch calls and :func:`mm`: torch.compile, DDP and graph capture see through it."""

    @staticmethod
    def forward(ctx, x, weight, bias, weight_shadow, bias_shadow):
        ctx.save_for_backward(x, weight_shadow)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        if _splits(x2 := x.reshape(-1, x.shape[-1])):
            return mm(x2, weight_shadow.t(), bias_shadow).view(*x.shape[:-1], -1)
        return F.linear(x, weight_shadow, bias_shadow)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dy2 = dy.reshape(-1, dy.shape[-1])  # (M, N)
        dx = mm(dy2, weight).view(x.shape) if ctx.needs_input_grad[0] else None
        dw = mm_fp32(dy2.t(), x.reshape(-1, x.shape[-1])).to(ctx.dtypes[0]) if ctx.needs_input_grad[1] else None
        db = dy2.sum(0, dtype=torch.float32).to(ctx.dtypes[1]) if ctx.needs_input_grad[2] else None
        return dx, dw, db, None, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Linear layer with the gradient of fp32 parameters in fp32.

    Args:
        x: (..., K), compute dtype.
        weight: (N, K) parameter, fp32 (or already the compute dtype, as under FSDP2's mixed precision).
        bias: (N,) parameter or None.

    Returns:
        (..., N) in x's dtype.
    """
    if dispatch.choose("linear", x.device.type) == "torch":
        return linear_ref(x, weight, bias)
    return _Linear.apply(x, weight, bias, shadow(weight, x.dtype), None if bias is None else shadow(bias, x.dtype))
