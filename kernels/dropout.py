"""Dropout inside other kernels: one Philox draw per element, made again in backward instead of saved.

The seed is a device tensor from PyTorch's generator, so `manual_seed`, a restored RNG state and activation recompute all
reproduce the mask without a host synchronisation.
"""

import torch
from torch import Tensor

from kernels.triton_compat import tl, triton


def check_dropout(dropout_p: float) -> None:
    """ValueError for a probability outside [0, 1)."""
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p={dropout_p}: expected 0 <= dropout_p < 1")


def draw_seed(device: torch.device, dropout_p: float) -> Tensor | None:
    """(1,) int64 seed on `device`; None without dropout, which draws nothing from the generator."""
    return torch.randint(0, 2**31 - 1, (1,), device=device, dtype=torch.int64) if dropout_p > 0.0 else None


@triton.jit
def dropout_factor(seed_ptr, rows, columns, dropout_p):
    """0 or 1 / (1 - p) for each element of rows (M, 1) x columns (N,).

    Row and column are two of Philox's four 32-bit counters: no element index to overflow, and none of its 64-bit variant.
    """
    columns = (rows * 0).to(tl.int32) + columns
    rows = rows.to(tl.int32) + columns * 0
    draw, _, _, _ = tl.philox(tl.load(seed_ptr), columns, rows, columns * 0, columns * 0)
    return tl.where(tl.random.uint_to_uniform_float(draw) >= dropout_p, 1.0 / (1.0 - dropout_p), 0.0)
