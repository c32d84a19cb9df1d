"""Timing of calls in turns, and what the device reaches at best.

So that a change of clocks hits all alike, calls take turns, one each a round: device events around each, the L2 cache
overwritten before it, and a short device-side sleep that gives Python a head start, so that kernels and not launches are timed.
On a CPU the clock is ``perf_counter``.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Stats(NamedTuple):
    """Of one provider's calls, in ms."""

    median: float
    p20: float
    p80: float
    n: int


class Work(NamedTuple):
    """What a pass must do at least: FLOPs, and bytes of memory read and written."""

    flops: float = 0.0
    bytes: float = 0.0


def quantiles(times: list[float]) -> Stats:
    times = sorted(times)
    n = len(times)
    return Stats(statistics.median(times), times[int(0.2 * (n - 1))], times[int(0.8 * (n - 1) + 0.5)], n)


@functools.cache
def _l2_eraser(device: str) -> Tensor:
    return torch.empty(256 << 20, dtype=torch.int8, device=device)  # five times the 50 MB of an H100


def interleaved(calls: dict[str, Callable[[], object]], device: str, budget_ms: float) -> dict[str, Stats]:
    """Times each call in turn, round after round, until each had about budget_ms (10 to 200 rounds; 5 without a budget)."""
    if not calls:
        return {}
    gpu = device.startswith("cuda")
    slowest = 0.0
    for call in calls.values():
        call()  # compiles, fills caches
        if gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if gpu:
            torch.cuda.synchronize()
        slowest = max(slowest, 1e3 * (time.perf_counter() - start))
    rounds = int(min(200, max(10, budget_ms / slowest))) if budget_ms else 5
    if not gpu:
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                times[name].append(1e3 * (time.perf_counter() - start))
        return {name: quantiles(t) for name, t in times.items()}
    events: dict[str, list] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            _l2_eraser(device).zero_()
            torch.cuda._sleep(500_000)  # ~0.3 ms
            start.record()
            call()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: quantiles([s.elapsed_time(e) for s, e in pairs]) for name, pairs in events.items()}


@functools.cache
def ceilings(device: str, dtype: torch.dtype) -> Work:
    """Measured (FLOP/s of a square matmul, bytes/s of a copy, reads and writes counted)."""
    gpu = device.startswith("cuda")
    n = 8192 if gpu else 768
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    x = torch.empty((1 << 30) if gpu else (64 << 20), dtype=torch.int8, device=device)
    y = torch.empty_like(x)
    ms = {name: s.median for name, s in interleaved({"mm": lambda: a @ b, "copy": lambda: y.copy_(x)}, device, 100.0).items()}
    return Work(flops=2 * n**3 / ms["mm"] * 1e3, bytes=2 * x.numel() / ms["copy"] * 1e3)
