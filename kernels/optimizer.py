"""AdamW and the global gradient norm, each one pass over all parameters.

    m = beta1 m + (1 - beta1) g        v = beta2 v + (1 - beta2) g^2        g = gradient * clip / grad_scale
    p = p (1 - lr wd) - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

Decoupled weight decay (Loshchilov & Hutter, arXiv:1711.05101), in torch.optim.AdamW's order of operations. Parameters,
gradients, m and v are fp32; a parameter's compute-dtype shadow (see kernels.linear) is written in the same pass. Per
parameter: read p g m v, write p m v and the zeroed gradient, write a 2-byte shadow: 34 bytes. The norm reads 4 bytes.

Whatever decides an update is a device scalar (lr, step, norm, grad_scale), so the host never waits and a CUDA graph can
hold the step.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import dispatch


def grad_norm_ref(grads: Sequence[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))).float()


def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """Global L2 norm of all gradients, without a host synchronisation.

    Args:
        grads: fp32 gradients of any shape, on one device.

    Returns:
        fp32 scalar on that device; inf or nan where any gradient is not finite.

    Raises:
        ValueError: for no gradients at all, or one that is not contiguous fp32 on the first one's device.
    """
    _check("gradient", grads)
    backend = dispatch.choose("grad_norm", grads[0].device.type)
    if backend == "torch":
        return grad_norm_ref(grads)
    return torch.ops.nanogpt.grad_norm(grads)


def adamw_ref(
    params,
    grads,
    exp_avgs,
    exp_avg_sqs,
    *,
    lr,
    step,
    beta1,
    beta2,
    eps,
    weight_decays,
    norm=None,
    max_norm=0.0,
    grad_scale=None,
) -> None:
    """The bare update, on PyTorch's fused AdamW, which takes the gradients' divisor and the skip flag as device scalars."""
    divisor, skip = grad_scale, None
    if norm is not None:
        skip = (~norm.isfinite()).float()
        if max_norm > 0:
            true_norm = norm if grad_scale is None else norm / grad_scale
            clip = (max_norm / (true_norm + 1e-6)).clamp(max=1.0)
            divisor = 1 / clip if grad_scale is None else grad_scale / clip
    next_step = step + 1
    for decay in dict.fromkeys(weight_decays):
        chosen = [i for i, d in enumerate(weight_decays) if d == decay]
        torch._fused_adamw_(
            *([tensors[i] for i in chosen] for tensors in (params, grads, exp_avgs, exp_avg_sqs)),
            max_exp_avg_sqs=[],
            state_steps=[next_step] * len(chosen),
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
            grad_scale=divisor,
            found_inf=skip,
        )
    step.copy_(next_step if skip is None else next_step - skip)


@torch.no_grad()
def adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    lr: Tensor,
    step: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decays: Sequence[float],
    norm: Tensor | None = None,
    max_norm: float = 0.0,
    grad_scale: Tensor | None = None,
    zero_grad: bool = False,
) -> None:
    """One AdamW update of all parameters, in place.

    Args:
        params, grads, exp_avgs, exp_avg_sqs: fp32, contiguous, one device, equal shapes. The gradients' values are used up:
            zero afterwards if ``zero_grad``, else undefined.
        lr: learning rate, fp32 device scalar.
        step: number of completed updates, fp32 device scalar, advanced here.
        weight_decays: one per parameter.
        norm: ``grad_norm`` of the gradients as given, so before the division by ``grad_scale``. If it is not finite, nothing
            but the zeroing happens.
        max_norm: largest norm of the update's gradient, 0 for no clipping: coefficient
            ``min(1, max_norm / (norm / grad_scale + 1e-6))``.
        grad_scale: loss scale that the gradients are divided by, fp32 device scalar.
        zero_grad: zero the gradients in the same pass.

    A parameter's ``.shadow`` is written too, and its ``.shadow_version`` set.

    Raises:
        ValueError: for lists of unequal length, tensors of another dtype or device, or ``max_norm`` without ``norm``.
    """
    if not params:
        return
    _check("parameter", params)
    device = params[0].device
    for name, tensors in (("gradient", grads), ("exp_avg", exp_avgs), ("exp_avg_sq", exp_avg_sqs)):
        _check(name, tensors, like=params)
    if len(weight_decays) != len(params):
        raise ValueError(f"weight_decays: {len(weight_decays)} values for {len(params)} parameters")
    for name, scalar in (("lr", lr), ("step", step), ("norm", norm), ("grad_scale", grad_scale)):
        if scalar is not None and (scalar.dtype != torch.float32 or scalar.numel() != 1 or scalar.device != device):
            raise ValueError(
                f"{name}: expected one fp32 value on {device}, got {scalar.dtype} {tuple(scalar.shape)} on {scalar.device}"
            )
    if max_norm > 0 and norm is None:
        raise ValueError(f"max_norm={max_norm} needs norm")

    backend = dispatch.choose("adamw", device.type)
    shadowed = [p for p in params if getattr(p, "shadow", None) is not None]
    if backend == "torch":
        adamw_ref(
            params, grads, exp_avgs, exp_avg_sqs, lr=lr, step=step, beta1=beta1, beta2=beta2, eps=eps,
            weight_decays=weight_decays, norm=norm, max_norm=max_norm, grad_scale=grad_scale,
        )  # fmt: skip
        if shadowed:
            torch._foreach_copy_([p.shadow for p in shadowed], shadowed)
        if zero_grad:
            torch._foreach_zero_(grads)
    else:
        if shadowed:
            none = params[0].new_empty(0, dtype=shadowed[0].shadow.dtype)
            shadows = [none if getattr(p, "shadow", None) is None else p.shadow for p in params]
        torch.ops.nanogpt.adamw_(
            params, grads, exp_avgs, exp_avg_sqs, shadows if shadowed else [], lr, step, weight_decays,
            beta1, beta2, eps, norm, max_norm, grad_scale, zero_grad,
        )  # fmt: skip
    # None of these kernels moves the version counters, which autograd and kernels.linear.shadow read.
    torch.autograd.graph.increment_version(params)
    for p in shadowed:
        p.shadow_version = p._version


def _check(name: str, tensors: Sequence[Tensor], like: Sequence[Tensor] | None = None) -> None:
    if not tensors:
        raise ValueError(f"no {name}s")
    if like is not None and len(tensors) != len(like):
        raise ValueError(f"{len(tensors)} {name}s for {len(like)} parameters")
    device = tensors[0].device if like is None else like[0].device
    for i, t in enumerate(tensors):
        if t.dtype != torch.float32 or t.device != device or not t.is_contiguous():
            layout = "contiguous" if t.is_contiguous() else "strided"
            raise ValueError(f"{name} {i}: expected contiguous fp32 on {device}, got {layout} {t.dtype} on {t.device}")
        if like is not None and t.shape != like[i].shape:
            raise ValueError(f"{name} {i}: shape {tuple(t.shape)} for a parameter of shape {tuple(like[i].shape)}")
