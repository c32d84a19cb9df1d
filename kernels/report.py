"""What the compiler makes of every shipped kernel, without a GPU: ``python -m kernels.report [--arch 80 90] [--only NAME]``.

Each row is one kernel variant of the config table, compiled ahead of time: registers per thread, stack bytes (spills),
shared memory, and which of the instructions that make it fast on that architecture its PTX holds. Exit code 1 if a row is
over its limits.
"""

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from kernels.configs import ARCHS, SHARED_LIMIT, AotCase

MODULES = ("attention", "attention_hopper", "layernorm", "mlp", "cross_entropy", "embedding")
STACK_LIMIT = 32  # bytes a thread


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


def cases(arch: int) -> Iterator[AotCase]:
    for module in MODULES:
        yield from import_module(f"kernels.{module}").aot_cases(arch)


def compile_case(case: AotCase, arch: int) -> Row:
    """Compiles one variant for an architecture and reads the resource usage off its cubin."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

    # The driver's JIT passes arguments in declaration order; attributes are keyed by that position.
    names = case.kernel.arg_names
    signature = {n: "constexpr" if n in case.constants else case.signature[n] for n in names}
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in case.aligned}
    source_type = GluonASTSource if isinstance(case.kernel, GluonJITFunction) else ASTSource
    constants = {(names.index(n),): value for n, value in case.constants.items()}
    source = source_type(case.kernel, signature, constexprs=constants, attrs=attrs)
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=case.options)
    ptx = binary.asm["ptx"]
    found = {"cp.async": "cp.async.c", "wgmma": "wgmma.mma_async", "tma": "cp.async.bulk.tensor", "mma": "mma.sync"}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary.asm["cubin"])
        cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return Row(
        name=case.name,
        arch=arch,
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        stack=int(re.search(r"STACK:(\d+)", usage)[1]),
        shared=binary.metadata.shared,
        instructions=tuple(name for name, text in found.items() if text in ptx),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="*", default=list(ARCHS), choices=ARCHS)
    parser.add_argument("--only", default="", help="variants whose name contains this")
    args = parser.parse_args()
    print(f"{'variant':<44} {'arch':>5} {'regs':>5} {'stack':>6} {'shared':>8}  instructions")
    bad = 0
    for arch in args.arch:
        for case in cases(arch):
            if args.only not in case.name:
                continue
            row = compile_case(case, arch)
            problems = "; ".join(row.problems)
            bad += bool(problems)
            print(
                f"{row.name:<44} sm_{row.arch} {row.registers:5d} {row.stack:6d} {row.shared:8d}  "
                f"{' '.join(row.instructions)}{'  <-- ' + problems if problems else ''}",
                flush=True,
            )
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
