"""Cross-entropy over a vocabulary, and the language-model head's GEMM with it.

    lse = log sum_{v < vocab_size} exp(logits_v);  loss = mean of lse - logits_target over the rows that have a target
    dlogits = (softmax(logits) - onehot(target)) / n_valid;  dx = dlogits W;  dW = dlogits^T x

M rows (B*T), C channels, V columns (the padded vocabulary; columns from vocab_size on count for nothing, gradient 0).

`linear_cross_entropy` never holds more than one chunk of logits: per chunk a GEMM, the row kernel, which overwrites the logits
with their gradient, and the two gradient GEMMs. So the forward computes loss and gradients together, and the backward only
multiplies dx and dW (fp32) by dloss / n_valid; before that dlogits is O(1), where fp16 does not underflow.

Row kernel in Triton: one program a row, two passes. Per logit one read from device memory, one from cache (a row of 50,304 is
100 KB, the second pass starts with what the first read last), one write; two exponentials. The one of csrc/cross_entropy.cu,
first choice where it is built, keeps the row in shared memory between the passes.
"""

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import configs, dispatch
from kernels.library import custom_op, once_differentiable
from kernels.linear import mm, shadow
from kernels.triton_compat import next_power_of_2, tl, triton

# Rows of logits alive at a time. On an H100 the three GEMMs of 16,384 rows (1.6 GB of 16-bit logits at V = 50,304) run at 632,
# 816 and 763 TFLOP/s, those of 8,192 at 609, 733 and 749. On a CPU: 200 MB of fp32 logits.
CHUNK_ROWS = {"cuda": 16384, "cpu": 1024}
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


def cross_entropy_ref(logits: Tensor, targets: Tensor, ignore_index: int = -1, vocab_size: int | None = None) -> Tensor:
    logits = logits[..., :vocab_size].flatten(0, -2).float()
    targets = targets.flatten()
    total = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")
    return total / (targets != ignore_index).sum().clamp(min=1)


def linear_cross_entropy_ref(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -1, vocab_size: int | None = None
) -> Tensor:
    return cross_entropy_ref(F.linear(x, weight.to(x.dtype)), targets, ignore_index, vocab_size)


@triton.jit
def _accumulate(x, m, s):
    """Each lane's running maximum m and sum s of exp(x - m), with one exponential: of the usual two one is exp(0)."""
    above = x - m
    e = tl.exp2(-tl.abs(above) * LOG2E)
    return tl.maximum(m, x), tl.where(above > 0, s * e + 1.0, s + e)


@triton.jit
def _gradient(x, row_max, log2_sum, cols, target):
    return tl.exp2((x.to(tl.float32) - row_max) * LOG2E - log2_sum) - tl.where(cols == target, 1.0, 0.0)


@triton.jit
def _cross_entropy_kernel(
    logits_ptr,  # (M, V), row stride stride_m; overwritten by the gradient of the sum of losses
    targets_ptr,  # (M,)
    losses_ptr,  # (M,) fp32
    stride_m,
    V,
    vocab_size,
    ignore_index,
    WRITE_GRAD: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * stride_m
    target = tl.load(targets_ptr + row)
    offs_v = tl.arange(0, BLOCK_V)
    if target == ignore_index:
        tl.store(losses_ptr + row, 0.0)
        if WRITE_GRAD:
            for start in range(0, V, BLOCK_V):
                cols = start + offs_v
                tl.store(logits_ptr + cols, tl.zeros((BLOCK_V,), logits_ptr.dtype.element_ty), mask=cols < V)
    else:
        # Blocks inside the vocabulary go without a mask: one against 50,257 would turn 16-byte accesses into 2-byte ones.
        end = vocab_size // BLOCK_V * BLOCK_V
        m = tl.full((BLOCK_V,), -1e30, tl.float32)  # finite, which keeps inf - inf out for masked columns
        s = tl.zeros((BLOCK_V,), tl.float32)
        for start in range(0, end, BLOCK_V):
            x = tl.load(logits_ptr + start + offs_v).to(tl.float32)
            m, s = _accumulate(x, m, s)
        for start in range(end, V, BLOCK_V):
            cols = start + offs_v
            x = tl.load(logits_ptr + cols, mask=cols < vocab_size, other=float("-inf")).to(tl.float32)
            m, s = _accumulate(x, m, s)
        row_max = tl.max(m, 0)
        log2_sum = tl.log2(tl.sum(s * tl.exp2((m - row_max) * LOG2E), 0))

        # A target outside the vocabulary makes the loss NaN instead of reading another row.
        inside = (target >= 0) & (target < vocab_size)
        x_target = tl.load(logits_ptr + target, mask=inside, other=float("nan")).to(tl.float32)
        tl.store(losses_ptr + row, row_max - x_target + log2_sum * LN2)
        if WRITE_GRAD:
            tl.debug_barrier()  # every warp has read the target's logit
            for start in range(end, V, BLOCK_V):
                cols = start + offs_v
                x = tl.load(logits_ptr + cols, mask=cols < vocab_size, other=float("-inf"))
                dx = _gradient(x, row_max, log2_sum, cols, target)  # 0 in padded columns
                tl.store(logits_ptr + cols, dx.to(logits_ptr.dtype.element_ty), mask=cols < V)
            for start in range(0, end, BLOCK_V):
                cols = end - BLOCK_V - start + offs_v  # backwards: what was read last is still in the L1 cache
                dx = _gradient(tl.load(logits_ptr + cols), row_max, log2_sum, cols, target)
                tl.store(logits_ptr + cols, dx.to(logits_ptr.dtype.element_ty))


def _bucket(V: int) -> str:
    return "small" if V <= 4096 else "large"


def candidates(arch: int) -> Iterator[dict]:
    for block in (1024, 2048, 4096, 8192, 16384):
        for warps in (4, 8, 16, 32):
            if 4 <= block // (32 * warps) <= 32:
                yield {"BLOCK_V": block, "num_warps": warps}


def _rows_triton(logits: Tensor, targets: Tensor, losses: Tensor, ignore_index: int, vocab_size: int, write_grad: bool) -> None:
    M, V = logits.shape

    def launch(config, logits=logits):
        config["BLOCK_V"] = min(config["BLOCK_V"], next_power_of_2(V))
        args = (logits, targets, losses, logits.stride(0), V, vocab_size, ignore_index)
        _cross_entropy_kernel[(M,)](*args, WRITE_GRAD=write_grad, **config)

    spare = functools.cache(logits.clone)  # to time on: a second run would take the gradient for logits
    with torch.cuda.device_of(logits):
        launch(configs.select("cross_entropy", _bucket(V), candidates, lambda config: launch(config, spare())))


def _rows(logits: Tensor, targets: Tensor, losses: Tensor, ignore_index: int, vocab_size: int, write_grad: bool) -> None:
    """Fills losses (M,) from logits (M, V) and, if asked, overwrites these. All are contiguous: any backend takes any call."""
    if dispatch.choose("cross_entropy", logits.device.type) == "triton":
        _rows_triton(logits, targets, losses, ignore_index, vocab_size, write_grad)
    else:  # cuda and cpp are one op, whose kernel goes by the tensors' device
        torch.ops.nanogpt.cross_entropy_rows_(logits, targets, losses, ignore_index, vocab_size, write_grad)


def _scale(gradient: Tensor, out: Tensor, dloss: Tensor, n_valid: Tensor) -> Tensor:
    """out = gradient * dloss / n_valid, where the gradient is 0 if n_valid is."""
    factor = (dloss / n_valid.clamp(min=1)).reshape(1)  # with one dimension it has a say in the dtype: the product is in fp32
    return torch.mul(gradient, factor, out=out)


def _add_mm(dw: Tensor, a: Tensor, b: Tensor, beta: int) -> None:
    """dw = beta dw + a b in fp32; what was in dw does not matter where beta is 0."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(dw, a, b, out_dtype=torch.float32, beta=beta, out=dw)
    else:
        mm(a.float(), b.float(), out=dw, add=beta > 0)


@custom_op("linear_cross_entropy_fwd")
def _linear_cross_entropy_fwd(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    vocab_size: int,
    chunk_rows: int,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, n_valid, dx (M, C) and dw (V, C) of the sum of losses; gradients that are not needed are empty."""
    M, C = x.shape
    V = weight.shape[0]
    x, targets = x.contiguous(), targets.contiguous()
    losses = torch.empty(M, dtype=torch.float32, device=x.device)
    dx = torch.empty_like(x) if need_dx else x.new_empty(0)
    dw = torch.empty((V, C) if need_dw else 0, dtype=torch.float32, device=x.device)
    # Rows start on 128 bytes whatever V is: cuBLAS and the row kernel then use 16-byte accesses at V = 50,257 too. For the
    # latter, columns from V on are padding like those from vocab_size on.
    buffer = x.new_empty(min(M, chunk_rows), (V + 63) // 64 * 64)
    for start in range(0, M, chunk_rows):
        rows = slice(start, min(start + chunk_rows, M))
        padded = buffer[: rows.stop - start]
        logits = padded[:, :V]
        mm(x[rows], weight.t(), out=logits)
        _rows(padded, targets[rows], losses[rows], ignore_index, vocab_size, need_dx or need_dw)
        if need_dx:
            mm(logits, weight, out=dx[rows])
        if need_dw:
            _add_mm(dw, logits.t(), x[rows], beta=int(start > 0))
    n_valid = (targets != ignore_index).sum()
    return losses.sum() / n_valid.clamp(min=1), n_valid, dx, dw


@torch.library.register_fake(_linear_cross_entropy_fwd)
def _(x, weight, targets, ignore_index, vocab_size, chunk_rows, need_dx, need_dw):
    loss, n_valid = x.new_empty((), dtype=torch.float32), x.new_empty((), dtype=torch.int64)
    dx = x.new_empty(x.shape if need_dx else 0)
    return loss, n_valid, dx, x.new_empty(weight.shape if need_dw else 0, dtype=torch.float32)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, shadow, targets, ignore_index, vocab_size, chunk_rows, need_dx, need_dw):
        sizes = ignore_index, vocab_size, chunk_rows
        rows = x.reshape(-1, x.shape[-1])
        loss, n_valid, dx, dw = _linear_cross_entropy_fwd(rows, shadow, targets.reshape(-1), *sizes, need_dx, need_dw)
        ctx.save_for_backward(n_valid, dx, dw)
        ctx.needs, ctx.shape, ctx.weight_dtype = (need_dx, need_dw), x.shape, weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        n_valid, dx, dw = ctx.saved_tensors
        need_dx, need_dw = ctx.needs
        dx = _scale(dx, torch.empty_like(dx), dloss, n_valid).view(ctx.shape) if need_dx else None
        dw = _scale(dw, torch.empty_like(dw), dloss, n_valid).to(ctx.weight_dtype) if need_dw else None
        return dx, dw, *(None,) * 7


@torch.library.custom_op("nanogpt::cross_entropy_fwd_", mutates_args=("logits",))
def _cross_entropy_fwd(logits: Tensor, targets: Tensor, ignore_index: int, vocab_size: int, write_grad: bool) -> Tensor:
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    _rows(logits, targets.contiguous(), losses, ignore_index, vocab_size, write_grad)
    return losses


@_cross_entropy_fwd.register_fake
def _(logits, targets, ignore_index, vocab_size, write_grad):
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


class _CrossEntropy(torch.autograd.Function):
    """In place. A second backward fails on the version counter."""

    @staticmethod
    def forward(ctx, logits, targets, ignore_index, vocab_size, write_grad):
        n_valid = (targets != ignore_index).sum()
        losses = _cross_entropy_fwd(logits, targets, ignore_index, vocab_size, write_grad)
        ctx.save_for_backward(logits, n_valid)
        return losses.sum() / n_valid.clamp(min=1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        dlogits, n_valid = ctx.saved_tensors
        return _scale(dlogits, dlogits, dloss, n_valid), *(None,) * 4


def _check(op: str, rows: Tensor, targets: Tensor, V: int, vocab_size: int | None) -> int:
    """vocab_size with its default."""
    if targets.shape != rows.shape[:-1]:
        raise ValueError(f"{op}: targets of shape {tuple(targets.shape)} for rows of shape {tuple(rows.shape[:-1])}")
    if targets.device != rows.device:  # the kernels take addresses as they come
        raise ValueError(f"{op}: targets on {targets.device}, expected {rows.device}")
    if targets.dtype != torch.int64:
        raise ValueError(f"{op}: targets of dtype {targets.dtype}, expected torch.int64")
    if targets.numel() == 0:
        raise ValueError(f"{op}: no rows")
    if vocab_size is not None and not 0 < vocab_size <= V:
        raise ValueError(f"{op}: vocab_size={vocab_size}, expected 1..{V}")
    return V if vocab_size is None else vocab_size


def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int = -1, vocab_size: int | None = None) -> Tensor:
    """Mean cross-entropy of logits, which their gradient overwrites where one is needed (the reference leaves them alone).

    Args:
        logits: (..., V), fp32, fp16 or bf16.
        targets: (...) int64 in 0..vocab_size - 1, or ignore_index. Any other value makes the loss NaN.
        ignore_index: the target of rows that count for nothing.
        vocab_size: columns from here on are padding; default V.

    Returns:
        fp32 scalar, 0 where all targets are ignored.

    Raises:
        ValueError: for shapes or devices that do not fit together, targets not int64, no rows, or a vocab_size above V.
    """
    V = logits.shape[-1]
    vocab_size = _check("cross_entropy", logits, targets, V, vocab_size)
    if dispatch.choose("cross_entropy", logits.device.type) == "torch":
        return cross_entropy_ref(logits, targets, ignore_index, vocab_size)
    write_grad = torch.is_grad_enabled() and logits.requires_grad
    return _CrossEntropy.apply(logits.contiguous().view(-1, V), targets.reshape(-1), ignore_index, vocab_size, write_grad)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = -1,
    vocab_size: int | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """Mean cross-entropy of x W^T, chunk by chunk of rows, so that the logits never exist as a whole.

    Args:
        x: (..., C), fp32, fp16 or bf16.
        weight: (V, C) parameter, fp32 (or already the compute dtype, as under FSDP2's mixed precision).
        targets: (...) int64 in 0..vocab_size - 1, or ignore_index. Any other value makes the loss NaN.
        ignore_index: the target of rows that count for nothing.
        vocab_size: rows of weight from here on are padding: outside the softmax, gradient 0; default V.
        chunk_rows: rows of logits alive at a time; default 16384 on a GPU, 1024 on a CPU.

    Returns:
        fp32 scalar, 0 where all targets are ignored. The gradient of weight is accumulated over chunks in fp32.

    Raises:
        ValueError: for shapes or devices that do not fit together, targets not int64, no rows, a vocab_size above V,
            chunk_rows below 1.
    """
    V, C = weight.shape
    if x.shape[-1] != C:
        raise ValueError(f"linear_cross_entropy: x has {x.shape[-1]} channels, weight {C}")
    vocab_size = _check("linear_cross_entropy", x, targets, V, vocab_size)
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"linear_cross_entropy: chunk_rows={chunk_rows}, expected 1 or more")
    if dispatch.choose("cross_entropy", x.device.type) == "torch":
        return linear_cross_entropy_ref(x, weight, targets, ignore_index, vocab_size)
    chunk_rows = chunk_rows or CHUNK_ROWS[x.device.type]
    need_dx = torch.is_grad_enabled() and x.requires_grad
    need_dw = torch.is_grad_enabled() and weight.requires_grad
    args = (ignore_index, vocab_size, chunk_rows, need_dx, need_dw)
    return _LinearCrossEntropy.apply(x, weight, shadow(weight, x.dtype), targets, *args)
