"""Tile configurations per architecture: a committed table, so that no start-up tunes and all ranks agree.

``configs.json`` holds ``{"sm_90": {"attention_fwd": {"d64": {"BLOCK_M": 128, ..., "num_warps": 8, "num_stages": 2}}}}``;
``scripts/tune.py`` rewrites it on a GPU. ``NANOGPT_AUTOTUNE=1`` times an op's candidates on first use instead.
"""

import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from kernels import dispatch

TABLE = Path(__file__).with_name("configs.json")
ARCHS = (80, 86, 89, 90)  # those with ahead-of-time checks

# What one program may use, bytes of shared memory: A100, RTX 30 and 40, H100.
SHARED_LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448}


@functools.cache
def _table() -> dict:
    return json.loads(TABLE.read_text())


def arch() -> int:
    """80, 86, 89, 90: the newest entry of the table that the current GPU can run (sm_80 under the interpreter)."""
    if dispatch.interpreting():
        return 80
    major, minor = dispatch.capability()
    if major == 12:  # GeForce and RTX PRO of the Blackwell generation: the shared memory of sm_89, no wgmma
        return 89
    return max(a for a in ARCHS if a <= major * 10 + minor)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; elsewhere three, so that under the interpreter each program walks several tiles."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def lookup(op: str, bucket: str, arch: int) -> dict[str, int]:
    """The configuration of ``op`` for a shape bucket such as ``d64``; a copy.

    An architecture without an entry takes the next older one's.
    """
    for a in sorted((a for a in ARCHS if a <= arch), reverse=True):
        entry = _table().get(f"sm_{a}", {}).get(op, {})
        if bucket in entry:
            return dict(entry[bucket])
    raise KeyError(f"configs.json has no entry for {op}/{bucket} at sm_{arch} or older")


_tuned: dict[tuple[str, str, int], dict[str, int]] = {}


def select(op: str, bucket: str, candidates: Callable[[int], Iterator[dict]], launch: Callable[[dict], object]) -> dict:
    """The configuration to launch ``op`` with on the current GPU.

    Args:
        candidates: arch -> configurations worth timing; read only under ``NANOGPT_AUTOTUNE=1`` and by ``scripts/tune.py``.
        launch: runs the op once with a configuration, which it may take apart; must be safe to repeat.
    """
    a = arch()
    if os.environ.get("NANOGPT_AUTOTUNE") != "1" or dispatch.interpreting():
        return lookup(op, bucket, a)
    key = (op, bucket, a)
    if key not in _tuned:
        _tuned[key] = min(measure(candidates(a), launch), key=lambda row: row[0])[1]
    return dict(_tuned[key])


def measure(candidates, launch) -> Iterator[tuple[float, dict]]:
    """(median ms, configuration) of each candidate that fits the GPU."""
    import triton
    from triton.runtime.errors import OutOfResources

    for config in candidates:
        try:
            ms = triton.testing.do_bench(lambda c=config: launch(dict(c)), return_mode="median")
        except OutOfResources:
            continue
        yield ms, config
