"""Loads the compiled extension of ``csrc/``: ``nanogpt_cpu`` (schemas and CPU kernels) and ``nanogpt_cuda``.

``pip install -e .`` or ``python setup.py build_ext --inplace`` puts both beside this file. They use PyTorch's stable ABI, so
one build serves several torch releases. Nothing is loaded before an op asks for it. With ``NANOGPT_BUILD=1`` a library that
is missing or older than its sources is first built; of several processes one builds and the others wait.
"""

import functools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
LIBRARIES = {"cpp": "nanogpt_cpu", "cuda": "nanogpt_cuda"}
# Ops that each library implements: what `unavailable` answers for.
OPS = {
    "cpp": ("adamw", "grad_norm", "cross_entropy", "layer_norm", "gelu_mlp", "attention", "linear"),
    "cuda": ("adamw", "grad_norm", "cross_entropy", "gelu_mlp"),
}
# Of csrc/, beside what both include.
SOURCES = {
    "nanogpt_cpu": ("cpu_*", "ops.cpp"),
    "nanogpt_cuda": ("*.cu*", "ops_cuda.cpp", "cuda_kernels.h", "linear_gelu.cpp", "cublaslt.h"),
}
BUILD = "python setup.py build_ext --inplace"
_faked: set[str] = set()
_faking = threading.Lock()
BUILD_LIMIT = 900  # seconds that a process waits for another one's build


@functools.cache
def unavailable(op: str, backend: str) -> str:
    """Why ``op`` cannot run on the extension's ``backend`` (``"cuda"`` or ``"cpp"``); empty if it can. Loads on first use."""
    if op not in OPS[backend]:
        return f"csrc has no {op} for {backend}"
    missing = _load(backend)
    if not missing and (op, backend) == ("gelu_mlp", "cuda"):  # which is another library's
        missing = torch.ops.nanogpt.linear_gelu_load(int(torch.version.cuda.split(".")[0]))
    return missing


def status() -> dict[str, str]:
    """What became of each library, for the start-up banner: ``{"nanogpt_cpu": "loaded (avx512)", "nanogpt_cuda": "..."}``."""
    states = {}
    for backend, name in LIBRARIES.items():
        state = _load(backend)
        if not state:
            state = f"loaded ({torch.ops.nanogpt.cpu_instructions()})" if backend == "cpp" else "loaded"
            newer = _newer_source(name)
            state += f", but {newer} is newer: {BUILD}" if newer else ""
        states[name] = state
    return states


@functools.cache
def _load(backend: str) -> str:
    """Loads a library into torch.ops.nanogpt; returns why that failed, or an empty string."""
    if backend == "cuda":
        missing = _load("cpp")  # it holds the schemas of both
        if missing:
            return missing
    name = LIBRARIES[backend]
    file = FOLDER / f"{name}.so"
    if os.environ.get("NANOGPT_BUILD") == "1" and _newer_source(name):
        _build(name)
    if not file.exists():
        return f"{name} is not built ({BUILD})"
    try:
        torch.ops.load_library(file)
    except OSError as error:
        return f"{file.name} does not load: {error.__cause__ or error}"
    if backend == "cpp":
        fakes = _cpu_fakes()
        if missing := [op for op in fakes if not hasattr(torch.ops.nanogpt, op)]:
            return f"{file.name} is of an earlier version, without {', '.join(missing)} ({BUILD})"
        _register_fakes(fakes)
        return ""
    _register_fakes({op: lambda *args: "" for op in ("linear_gelu_", "linear_dgelu_")})
    return ""


def _newer_source(name: str) -> str:
    """A source that is newer than the library, or any if there is no library; empty without sources, as in a wheel."""
    file = FOLDER / f"{name}.so"
    built = file.stat().st_mtime if file.exists() else 0.0
    sources = [s for pattern in (*SOURCES[name], "ops.h", "types.h") for s in sorted((FOLDER.parent / "csrc").glob(pattern))]
    return next((f"csrc/{s.name}" for s in sources if s.stat().st_mtime > built), "")


def _build(name: str) -> None:
    """Builds in this process, unless another one does: then waits for it.

    Raises:
        TimeoutError: if the other one takes longer than BUILD_LIMIT.
        ChildProcessError: if the build fails; the compiler's messages went to stderr.
    """
    import fcntl

    root = FOLDER.parent
    (root / "build").mkdir(exist_ok=True)
    path = root / "build" / "lock"
    deadline = time.monotonic() + BUILD_LIMIT
    with path.open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    message = f"{path}: another process has been building for {BUILD_LIMIT} s; end it, or run {BUILD}"
                    raise TimeoutError(message) from None
                time.sleep(0.2)
        if _newer_source(name):  # else the other one has just built it
            command = [sys.executable, "setup.py", "build_ext", "--inplace"]
            if subprocess.run(command, cwd=root, stdout=sys.stderr).returncode:
                raise ChildProcessError(f"NANOGPT_BUILD=1: {BUILD} failed; its messages are above")


def _register_fakes(fakes: dict[str, Callable]) -> None:
    """What ops do to fake tensors, so that torch.compile and opcheck see through them: once, as PyTorch 2.11 wants."""
    with _faking:
        for op, fake in fakes.items():
            if op not in _faked:
                torch.library.register_fake(f"nanogpt::{op}", fake)
                _faked.add(op)


def _cpu_fakes() -> dict[str, Callable]:

    def statistics(x):
        return x.new_empty((x.numel() // x.shape[-1] if x.shape[-1] else 0, 2), dtype=torch.float32)

    def empty(x, has):
        return x.new_empty(x.shape if has else 0)

    def channels(x, has):
        return x.new_empty(x.shape[-1] if has else 0, dtype=torch.float32)

    return {
        "adamw_": lambda *args: None,
        "grad_norm": lambda grads: grads[0].new_empty((), dtype=torch.float32),
        "cross_entropy_rows_": lambda *args: None,
        "row_layer_norm": lambda x, residual, w, b, eps: (torch.empty_like(x), empty(x, residual is not None), statistics(x)),
        "row_layer_norm_backward": lambda dy, dr, r, w, s, has_bias: (
            torch.empty_like(r), torch.empty_like(w), channels(r, has_bias),
        ),
        "gelu_": lambda x, bias, tanh, want_derivative: empty(x, want_derivative),
        "gelu_backward_": lambda dy, derivative, has_bias: channels(dy, has_bias),
        "head_attention": lambda qkv, n_head, scale: (
            qkv.new_empty((*qkv.shape[:2], qkv.shape[2] // 3)),
            qkv.new_empty((qkv.shape[0], n_head, qkv.shape[1]), dtype=torch.float32),
        ),
        "split_mm_": lambda *args: None,
        "head_attention_backward": lambda dout, qkv, lse, n_head, scale: torch.empty_like(qkv),
    }  # fmt: skip
