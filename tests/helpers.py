"""Shared by the kernel tests: the device under test, its dtypes, the error rule, and memory that shows what was not written."""

import os
from contextlib import contextmanager

import torch
from torch import Tensor

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRET else "cpu"
# The interpreter multiplies the raw bits of bf16, so bf16 is tested on silicon only.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


def dtype_id(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}.get(dtype, str(dtype))


def assert_as_accurate(ours: Tensor, same_dtype: Tensor, exact: Tensor, factor: float = 2.0, atol: float = 1e-6) -> None:
    """max|ours - exact| <= factor * max|same_dtype - exact| + atol, where `exact` is an fp32 (or fp64) reference.

    `same_dtype` is what plain PyTorch gives in ours's dtype: its own rounding sets the tolerance. Gradients take factor 3.
    """
    assert ours.shape == exact.shape, f"{tuple(ours.shape)} instead of {tuple(exact.shape)}"
    error = (ours.double() - exact.double()).abs().max().item()
    allowed = factor * (same_dtype.double() - exact.double()).abs().max().item() + atol
    assert error <= allowed, f"max error {error:.3g} > {allowed:.3g} allowed"  # NaN fails as well


def strided(t: Tensor) -> Tensor:
    """The same values with another between any two of them, NaN where there is one: what is read as contiguous shows."""
    wide = torch.full([2 * n for n in t.shape], float("nan") if t.is_floating_point() else 0, dtype=t.dtype, device=t.device)
    return wide[(slice(None, None, 2),) * t.dim()].copy_(t)


@contextmanager
def poisoned():
    """Fills `torch.empty` and its relatives with NaN, integers with their maximum: what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # PyTorch fills memory in this mode only
    try:
        assert torch.empty(1).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
