"""The MLP's two products that meet GELU, in cuBLASLt's epilogues: the ``cuda`` backend of `gelu_mlp` (csrc/linear_gelu.cpp).

    linear_gelu    pre = x w^T + bias;  post = gelu(pre)               GELU_AUX_BIAS
    linear_dgelu   dpre = (dy w) * gelu'(pre);  dbias = column sums    DGELU_BGRAD, DGELU in fp16

cuBLASLt's GELU is the tanh form, as NVIDIA's TensorRT-LLM relies on (pull request 17693). Its bias gradient has the compute
dtype ("the same type as the output elements", cublasLt.h): rounded once to bf16, where the other backends' is fp32.

Where the library has no algorithm for a shape, cuBLAS and PyTorch's elementwise kernels run, and `dispatch.explain` says so.
M rows (B*T), K inputs, N outputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import dispatch

_ops = torch.ops.nanogpt


def uncovered(dtype: torch.dtype, approximate: str) -> str:
    """Why a whole MLP cannot run here; empty if it can."""
    if approximate != "tanh":
        return "cuBLASLt's GELU is the tanh form, the model's is erf"
    return "" if dtype in (torch.bfloat16, torch.float16) else f"for bf16 and fp16, not {str(dtype).removeprefix('torch.')}"


def _misfit(a: Tensor, w: Tensor) -> str:
    """Why cuBLASLt cannot be asked: its epilogues read whole units of 16 bytes."""
    if w.numel() == 0:
        return "empty weights"
    if any(size % 8 for size in w.shape):
        return f"{tuple(w.shape)} weights: no multiples of 8"
    return "" if a.data_ptr() % 16 == w.data_ptr() % 16 == 0 else "matrices that do not begin at a multiple of 16 bytes"


def _without(name: str, M: int, N: int, K: int, reason: str) -> None:
    dispatch.fell_back("gelu_mlp", "cuda", "torch", f"{name} of {M} x {N} x {K}: {reason}")


def linear_gelu(x: Tensor, w: Tensor, bias: Tensor | None, with_pre: bool) -> tuple[Tensor, Tensor]:
    """gelu(x w^T + bias) and gelu's argument.

    Args:
        x: (M, K), fp16 or bf16, contiguous, as all.
        w: (N, K).
        bias: (N,) or None.
        with_pre: whether the argument is wanted.

    Returns:
        post (M, N) and pre, (0, N) if it is not wanted.
    """
    (M, K), N = x.shape, w.shape[0]
    post, pre = x.new_empty(M, N), x.new_empty(M if with_pre else 0, N)
    if M == 0:
        return post, pre
    reason = _misfit(x, w) or _ops.linear_gelu_(x, w, bias, post, pre if with_pre else None)
    if reason:
        _without("linear_gelu", M, N, K, reason)
        argument = F.linear(x, w, bias)
        return F.gelu(argument, approximate="tanh"), argument if with_pre else pre
    return post, pre


def linear_dgelu(dy: Tensor, w: Tensor, pre: Tensor, has_bias: bool) -> tuple[Tensor, Tensor]:
    """The gradient of gelu's argument, from that of the product of gelu's value with w.

    Args:
        dy: (M, K).
        w: (K, N).
        pre: (M, N), from :func:`linear_gelu`.
        has_bias: whether the bias gradient is wanted.

    Returns:
        dpre (M, N), and its column sums (N,) in fp32; (0,) if they are not wanted.
    """
    (M, K), N = dy.shape, w.shape[1]
    # The epilogue's sums have dy's dtype: M rows of scaled gradients may overflow fp16 where fp32 does not, which costs a step.
    fused_bias = has_bias and dy.dtype == torch.bfloat16
    dpre, dbias = torch.empty_like(pre), dy.new_empty(N if fused_bias else 0)
    if M == 0:
        return dpre, dy.new_zeros(N if has_bias else 0, dtype=torch.float32)
    reason = _misfit(dy, w) or _ops.linear_dgelu_(dy, w, pre, dpre, dbias if fused_bias else None)
    if reason:
        _without("linear_dgelu", M, N, K, reason)
        dpre = torch.ops.aten.gelu_backward(dy @ w, pre, approximate="tanh")
    if has_bias and (reason or not fused_bias):
        return dpre, dpre.sum(0, dtype=torch.float32)
    return dpre, dbias.float()
