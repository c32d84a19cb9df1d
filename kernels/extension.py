"""Loads the compiled extension of ``csrc/``: ``nanogpt_cpu`` (schemas and CPU kernels) and ``nanogpt_cuda``.

``pip install -e .`` or ``python setup.py build_ext --inplace`` puts both beside this file. They use PyTorch's stable ABI, so
one build serves several torch releases. Nothing is loaded before an op asks for it.
"""

import functools
from pathlib import Path

import torch

# Ops that each library implements: what `unavailable` answers for.
OPS = {
    "cpp": ("adamw", "grad_norm", "cross_entropy"),
    "cuda": ("adamw", "grad_norm", "cross_entropy"),
}
LIBRARIES = {"cpp": "nanogpt_cpu", "cuda": "nanogpt_cuda"}
BUILD = "python setup.py build_ext --inplace"


@functools.cache
def unavailable(op: str, backend: str) -> str:
    """Why ``op`` cannot run on the extension's ``backend`` (``"cuda"`` or ``"cpp"``); empty if it can. Loads on first use."""
    if op not in OPS[backend]:
        return f"csrc has no {op} for {backend}"
    return _load(backend)


@functools.cache
def _load(backend: str) -> str:
    """Loads a library into torch.ops.nanogpt; returns why that failed, or an empty string."""
    if backend == "cuda":
        missing = _load("cpp")  # it holds the schemas of both
        if missing:
            return missing
    name = LIBRARIES[backend]
    found = sorted(Path(__file__).parent.glob(f"{name}*.so"))
    if not found:
        return f"{name} is not built ({BUILD})"
    try:
        torch.ops.load_library(found[0])
    except OSError as error:
        return f"{found[0].name} does not load: {error.__cause__ or error}"
    if backend == "cpp":
        _register_fakes()
    return ""


def _register_fakes() -> None:
    """What the ops do to fake tensors, so that torch.compile and opcheck see through them."""

    def statistics(x):
        return x.new_empty((x.numel() // x.shape[-1] if x.shape[-1] else 0, 2), dtype=torch.float32)

    def empty(x, has):
        return x.new_empty(x.shape if has else 0)

    def channels(x, has):
        return x.new_empty(x.shape[-1] if has else 0, dtype=torch.float32)

    fakes = {
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
        "head_attention_backward": lambda dout, qkv, lse, n_head, scale: torch.empty_like(qkv),
    }  # fmt: skip
    for op, fake in fakes.items():
        torch.library.register_fake(f"nanogpt::{op}", fake)


def status() -> dict[str, str]:
    """``{"nanogpt_cpu": "loaded", "nanogpt_cuda": "nanogpt_cuda is not built (...)"}`` for the start-up banner."""
    return {name: _load(backend) or "loaded" for backend, name in LIBRARIES.items()}
