"""The one place that decides which implementation of an op runs.

Backends: ``triton`` (this folder), ``cuda`` and ``cpp`` (the compiled extension of ``csrc/``, on a GPU and on a CPU), and
``torch`` (the PyTorch reference that stands beside every op). Nothing falls back in silence: :func:`explain` gives the
backend of each op on a device, and the reason.
"""

import functools
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kernels import triton_compat

BACKENDS = ("triton", "cuda", "cpp", "torch")

# What `auto` prefers, first to last; the first that is available wins, so what stands behind torch runs on request only. A
# backend that an op does not have is not named.
PREFERENCE = {
    "attention": ("triton", "cpp", "torch"),
    "layer_norm": ("triton", "cpp", "torch"),
    "gelu_mlp": ("triton", "cpp", "torch", "cuda"),  # cuda: cuBLASLt's epilogues, not measured yet
    # H100, 16,384 rows of 50,304 in bf16: cuda 1.22 ms (90% of a copy's bandwidth), triton 1.44 ms.
    "cross_entropy": ("cuda", "triton", "cpp", "torch"),
    "embedding": ("triton", "torch"),
    # "triton": cuBLAS on the shadow, weight gradient in fp32, no kernel of its own. "cpp": see linear.mm.
    "linear": ("triton", "cpp", "torch"),
    "adamw": ("cuda", "cpp", "torch"),
    "grad_norm": ("cuda", "cpp", "torch"),
}

# What a backend covers of its op; other calls take the next one, which is said as they come.
LIMITS = {("gelu_mlp", "cuda"): "tanh GELU in bf16 and fp16 only"}

_fallbacks: dict[str, list[str]] = {}  # by op
_requested = os.environ.get("NANOGPT_KERNELS", "auto")
_assumed: tuple[int, int] | None = None  # the capability of a GPU that is not there


def interpreting() -> bool:
    """True where Triton's interpreter stands in for a GPU (``TRITON_INTERPRET=1``), so that kernels take CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@contextmanager
def assuming(capability: tuple[int, int]) -> Iterator[None]:
    """Tensors on the meta device take the kernels of a GPU of this capability, for `kernels.report` to look at the launches."""
    global _assumed
    _assumed = capability
    _resolve.cache_clear()
    try:
        yield
    finally:
        _assumed = None
        _resolve.cache_clear()


def capability(device: torch.device | int | None = None) -> tuple[int, int]:
    """(9, 0) for an H100; by default of the current GPU."""
    return _assumed or _capability(torch.cuda.current_device() if device is None else device)


@functools.cache
def _capability(device: torch.device | int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def use(backend: str) -> None:
    """Asks for one backend for every op that has it; the other ops go on as under ``auto``.

    Raises:
        ValueError: for a name that is none of ``auto`` and :data:`BACKENDS`.
    """
    global _requested
    _check("kernels", backend)
    _requested = backend
    _fallbacks.clear()


def _check(key: str, backend: str) -> None:
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"{key}={backend}: expected one of auto, {', '.join(BACKENDS)}")


def requested() -> str:
    return _requested


@torch.compiler.assume_constant_result
def choose(op: str, device_type: str) -> str:
    """The backend that ``op`` takes for tensors on a device of this type (``"cpu"``, ``"cuda"``, ``"mps"``)."""
    return _resolve(op, device_type, _requested)[0]


def explain(device_type: str) -> dict[str, tuple[str, str]]:
    """For every op: its backend on this device and why, for the start-up banner; and what has run on another one so far."""
    chosen = {}
    for op in PREFERENCE:
        backend, reason = _resolve(op, device_type, _requested)
        limit = [LIMITS[op, backend]] if (op, backend) in LIMITS else []
        chosen[op] = backend, "; ".join([reason, *limit, *_fallbacks.get(op, [])])
    return chosen


@torch.compiler.assume_constant_result
def instead(op: str, device_type: str, backend: str, reason: str) -> str:
    """The next backend of ``op``, where the chosen one does not cover a call; says so once."""
    others = (other for other in PREFERENCE[op] if other != backend and not _unavailable(op, other, device_type))
    other = next(others)
    fell_back(op, backend, other, reason)
    return other


def fell_back(op: str, backend: str, other: str, reason: str) -> None:
    """Records, and warns once, that ``other`` ran instead of the backend that was chosen."""
    note = f"{other} instead of {backend} for {reason}"
    notes = _fallbacks.setdefault(op, [])
    if note not in notes:
        notes.append(note)
        warnings.warn(f"{op}: {note}", RuntimeWarning, stacklevel=3)


@functools.cache
def _resolve(op: str, device_type: str, requested: str) -> tuple[str, str]:
    _check("NANOGPT_KERNELS", requested)  # use() has looked at what it took
    order = PREFERENCE[op]
    note = ""
    if requested != "auto":
        if requested not in order:
            note = f"{op} has no {requested} backend; "
        else:
            missing = _unavailable(op, requested, device_type)
            if missing:
                raise ValueError(f"kernels={requested}: {op} on {device_type}: {missing}")
            return requested, "asked for"
    reasons = []
    for backend in order:
        missing = _unavailable(op, backend, device_type)
        if not missing:
            return backend, note + ("; ".join(reasons) or "first choice on this device")
        reasons.append(f"no {backend}: {missing}")
    raise AssertionError("torch is always available")


def _unavailable(op: str, backend: str, device_type: str) -> str:
    """Why ``backend`` cannot run ``op`` here; empty if it can."""
    if backend == "torch":
        return ""
    if backend == "triton":
        if not triton_compat.INSTALLED:
            return "Triton is not installed"
        if interpreting():
            return "" if device_type == "cpu" else "Triton's interpreter takes CPU tensors"
        if device_type != ("meta" if _assumed else "cuda"):
            return f"Triton has no {device_type} target"
        if torch.version.hip is not None:
            return "ROCm is untested"
        major, minor = capability()
        return "" if major >= 8 else f"sm_{major}{minor} is older than sm_80"
    from kernels import extension

    expected = {"cuda": "cuda", "cpp": "cpu"}[backend]
    if device_type != expected:
        return f"for {expected} tensors only"
    return extension.unavailable(op, backend)
