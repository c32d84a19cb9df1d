"""Uninitialised memory that shows: what a kernel forgets to write is NaN."""

from contextlib import contextmanager

import torch


@contextmanager
def poisoned():
    """Fills `torch.empty` and its relatives with NaN, integers with their maximum."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # PyTorch fills memory in this mode only
    try:
        assert torch.empty(1).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
