"""What the compiler makes of every kernel, without a GPU: ``python -m kernels.report [--arch 80 90] [--only NAME]``.

The ops run, forward and backward, on tensors without storage, as GPT-2's models and their variants call them, and each launch
goes through Triton up to the point where it would compile for the GPU at hand: what is checked is what runs. A row is one
variant of a kernel: registers per thread, stack bytes (spills), shared memory, and which of the instructions that make it fast
there its PTX holds. Exit code 1 if a row is over its limits, 2 if no variant has the name.

B batch, T sequence, C channels, H heads, D head size, V vocabulary.
"""

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import dispatch
from kernels.attention import causal_attention, decode_attention
from kernels.configs import ARCHS, SHARED_LIMIT
from kernels.cross_entropy import linear_cross_entropy
from kernels.embedding import embedding
from kernels.layernorm import layer_norm, layer_norm_residual
from kernels.library import bodies
from kernels.mlp import gelu_mlp

STACK_LIMIT = 32  # bytes a thread


class Variant(NamedTuple):
    """A kernel and what Triton specialises it by."""

    name: str  # layernorm.layer_norm_bwd/124M
    arch: int
    kernel: Any  # the @triton.jit function
    data: str  # types, constants and options, in Triton's own form


class Row(NamedTuple):
    name: str
    arch: int
    registers: int
    stack: int
    shared: int
    instructions: tuple[str, ...]  # of cp.async, wgmma, tma, mma: those found

    @property
    def problems(self) -> list[str]:
        found = []
        if self.shared > SHARED_LIMIT[self.arch]:
            found.append(f"shared memory {self.shared} > {SHARED_LIMIT[self.arch]}")
        if self.stack > STACK_LIMIT:
            found.append(f"stack {self.stack} > {STACK_LIMIT}")
        return found


_devices = itertools.count(1000)  # Triton keeps what it compiled by device; each driver begins anew


class _Driver:
    """In place of the GPU's."""

    def __init__(self, arch: int):
        self.arch, self.device = arch, next(_devices)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


@contextmanager
def _driver(arch: int) -> Iterator[None]:
    import triton

    config = triton.runtime.driver
    before = config._active
    config.set_active(_Driver(arch))
    try:
        yield
    finally:
        config._active = before


class _Bodies(TorchDispatchMode):
    """Runs the ops of this folder on the meta device, where PyTorch would ask for their fakes."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return bodies.get(func, func)(*args, **(kwargs or {}))


def launches(arch: int, run: Callable[[], object], label: str) -> list[Variant]:
    """The variants of kernels that ``run`` launches for tensors on the meta device, on a GPU of this architecture."""
    import triton

    found: dict[tuple[str, str], Variant] = {}
    count: Counter[str] = Counter()

    def note(fn, compile, **_) -> bool:
        name = fn.module.removeprefix("kernels.") + "." + fn.name.strip("_").removesuffix("_kernel")
        if (name, compile["specialization_data"]) not in found:
            count[name] += 1
            again = f"-{count[name]}" if count[name] > 1 else ""
            variant = Variant(f"{name}/{label}{again}", arch, fn.jit_function, compile["specialization_data"])
            found[name, compile["specialization_data"]] = variant
        return True  # not to be compiled now, nor run

    knobs = triton.knobs.runtime
    before, knobs.jit_cache_hook = knobs.jit_cache_hook, note
    try:
        with _driver(arch), dispatch.assuming(divmod(arch, 10)), torch.device("meta"), _Bodies():
            run()
    finally:
        knobs.jit_cache_hook = before
    return list(found.values())


def _network(
    C: int,
    D: int = 64,
    T: int = 1024,
    V: int = 50304,
    dtype: torch.dtype = torch.bfloat16,
    bias: bool = False,
    dropout: float = 0.0,
    tanh: bool = False,
) -> None:
    """Each op of a GPT-2 once, in its order, and backward; then evaluation and a step of decoding."""

    def parameter(*shape):
        return torch.empty(shape, requires_grad=True)

    def maybe(*shape):
        return parameter(*shape) if bias else None

    B, H = 2, C // D
    idx = torch.empty(B, T, dtype=torch.int64)
    wte, wpe, ln = parameter(V, C), parameter(T, C), (parameter(C), maybe(C))
    w_qkv, mlp = parameter(3 * C, C), (parameter(4 * C, C), maybe(4 * C), parameter(C, 4 * C), maybe(C))

    def loss(p: float) -> torch.Tensor:
        x = embedding(idx, wte, wpe, dtype, p)
        qkv = layer_norm(x, *ln) @ w_qkv.to(dtype).t()  # (B, T, 3C)
        y, residual = layer_norm_residual(causal_attention(qkv, H, p), x, *ln, dropout_p=p)
        y, _ = layer_norm_residual(gelu_mlp(y, *mlp, "tanh" if tanh else "none"), residual, *ln, dropout_p=p)
        return linear_cross_entropy(y, wte, idx, vocab_size=min(V, 50257), chunk_rows=8192)

    loss(dropout).backward()
    with torch.no_grad():
        loss(0.0)
    _heads(D, T, dtype, dropout)


def _heads(D: int, T: int = 1024, dtype: torch.dtype = torch.bfloat16, dropout: float = 0.0) -> None:
    """Attention forward and backward, and a step of decoding, with two heads."""
    qkv = torch.empty(2, T, 6 * D, dtype=dtype, requires_grad=True)
    causal_attention(qkv, 2, dropout).sum().backward()
    cache = torch.empty(2, 2, 2, T, D, dtype=dtype)
    decode_attention(torch.empty(2, 2 * D, dtype=dtype), *cache, torch.empty(2, dtype=torch.int32))


def _unfused() -> None:
    """GELU by itself, as of rows that are not whole 16-byte units."""
    for has_bias, kind in itertools.product((False, True), ("none", "tanh")):
        x, w_fc, w_proj = (torch.empty(shape, requires_grad=True) for shape in ((512, 200), (800, 200), (200, 800)))
        bias = torch.empty(800, requires_grad=True) if has_bias else None
        gelu_mlp(x.bfloat16(), w_fc, bias, w_proj, None, kind).sum().backward()
        with torch.no_grad():
            gelu_mlp(x.bfloat16(), w_fc, bias, w_proj, None, kind)


CALLS = {
    "124M": partial(_network, 768),
    "350M": partial(_network, 1024),
    "774M": partial(_network, 1280),
    "1558M": partial(_network, 1600),
    "gpt2": partial(_network, 768, V=50257, bias=True, tanh=True),
    "gpt2-dropout": partial(_network, 768, bias=True, tanh=True, dropout=0.1),
    "ragged": partial(_network, 768, T=1000, bias=True),
    "fp16": partial(_network, 768, dtype=torch.float16),
    "fp32": partial(_network, 768, dtype=torch.float32, bias=True),
    "char": partial(_network, 384, T=256, V=65, dropout=0.2),
    "unfused": _unfused,
    "C128": partial(_network, 128, D=32, T=64, V=65),
    "C2048": partial(_network, 2048, D=128, bias=True),
    "C3072": partial(_network, 3072, D=128),
    "C8192": partial(_network, 8192, D=128),
} | {
    f"D{D}-{kind}": partial(_heads, D, **more)
    for D in (16, 32, 64, 128)
    for kind, more in {
        "even": {},
        "dropout": {"dropout": 0.1},
        "fp32": {"dtype": torch.float32},
        "ragged": {"T": 1000},
    }.items()
    if D >= 64 or kind != "ragged"
}


def variants(arch: int) -> list[Variant]:
    """All of them, each by the first of CALLS that launches it."""
    distinct: dict[tuple[Any, str], Variant] = {}
    for label, run in CALLS.items():
        for variant in launches(arch, run, label):
            distinct.setdefault((variant.kernel, variant.data), variant)
    return list(distinct.values())


def compiled(variant: Variant) -> Row:
    """Compiles a variant and reads the resource usage off its cubin."""
    import triton

    with _driver(variant.arch):
        binary = variant.kernel.preload(variant.data)
    ptx = binary.asm["ptx"]
    found = {"cp.async": "cp.async.c", "wgmma": "wgmma.mma_async", "tma": "cp.async.bulk.tensor", "mma": "mma.sync"}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary.asm["cubin"])
        cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return Row(
        name=variant.name,
        arch=variant.arch,
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        stack=int(re.search(r"STACK:(\d+)", usage)[1]),
        shared=binary.metadata.shared,
        instructions=tuple(name for name, text in found.items() if text in ptx),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHS), choices=ARCHS, help="default: all")
    parser.add_argument("--only", default="", help="variants whose name contains this")
    args = parser.parse_args()
    print(f"{'variant':<52} {'arch':>5} {'regs':>5} {'stack':>6} {'shared':>8}  instructions")
    bad = shown = 0
    for arch in args.arch:
        for variant in variants(arch):
            if args.only not in variant.name:
                continue
            shown += 1
            row = compiled(variant)
            problems = "; ".join(row.problems)
            bad += bool(problems)
            print(
                f"{row.name:<52} sm_{row.arch} {row.registers:5d} {row.stack:6d} {row.shared:8d}  "
                f"{' '.join(row.instructions)}{'  <-- ' + problems if problems else ''}",
                flush=True,
            )
    if not shown:
        print(f"report: --only {args.only}: no variant's name contains it", file=sys.stderr)
        return 2
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
