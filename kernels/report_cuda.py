"""What nvcc makes of every kernel of ``csrc/``, without a GPU: ``python -m kernels.report_cuda [--arch 80 90a] [--only NAME]``.

Each row is one kernel: registers per thread, static shared memory in bytes, stack and spilled bytes, and the widest access of
each kind in its machine code (SASS), in bits: LDG and STG global, LDS and STS shared memory. Exit code 1 where a kernel
spills; 2 without nvcc or cuobjdump, where a source does not compile, and where no kernel has the name. The cross-entropy row
kernel's shared memory is dynamic on top: a row of logits, where that fits an SM.
"""

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

CSRC = Path(__file__).parent.parent / "csrc"
ARCHS = ("80", "90a")
STRICT = ("-O3", "-std=c++17", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra", "-Xptxas", "-v")


class Kernel(NamedTuple):
    name: str  # mangled
    registers: int
    shared: int  # bytes, static
    stack: int
    spills: int  # bytes stored and loaded
    sass: str

    @property
    def accesses(self) -> dict[str, int]:
        """Widest access in bits of each kind of load and store that it holds."""
        widest: dict[str, int] = {}
        for kind, suffix in re.findall(r"\b(LDG|STG|LDS|STS)\b([.\w]*)", self.sass):
            bits = re.search(r"\.(?:[US](8|16)|(64)|(128))\b", suffix)
            width = int(next(filter(None, bits.groups()))) if bits else 32
            widest[kind] = max(width, widest.get(kind, 0))
        return widest


def find_nvcc() -> tuple[str, str]:
    """Path and release of the CUDA compiler that setup.py takes, by its rule; empty without one."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if on_path := shutil.which("nvcc"):  # which may be a wrapper: it is asked for the real one
        homes += re.findall(r"#\$ _HERE_=(.+)/bin$", _said([on_path, "--dryrun", "-c", "probe.cu"]), re.MULTILINE)
    for home in [*homes, "/usr/local/cuda"]:
        path = Path(home or "") / "bin" / "nvcc"
        if home and path.exists():
            release = re.search(r"release (\d+\.\d+)", _said([path, "--version"]))
            return (str(path), release[1]) if release else ("", "")
    return "", ""


def _said(command: list[str | Path]) -> str:
    """What a program prints; empty where it does not run."""
    try:
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
    except OSError:
        return ""


def find_cuobjdump(nvcc: str) -> str:
    """The toolkit's own, or the one that Triton brings; empty without either."""
    spec = importlib.util.find_spec("triton")
    candidates = [Path(nvcc).with_name("cuobjdump"), Path(shutil.which("cuobjdump") or "cuobjdump")]
    if spec:
        candidates.append(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return str(next((c for c in candidates if c.exists()), ""))


def compile_source(source: Path, arch: str, nvcc: str, cuobjdump: str) -> list[Kernel]:
    """The kernels of a ``.cu`` file for one architecture, such as ``"90a"``.

    Raises:
        RuntimeError: where it does not compile, which any warning counts as, or cuobjdump cannot read the result.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "out.cubin"
        command = [nvcc, *STRICT, f"-arch=sm_{arch}", "-cubin", source, "-o", cubin]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{source.name} for sm_{arch}: {result.stderr}")
        dump = subprocess.run([cuobjdump, "-sass", cubin], capture_output=True, text=True)
        if dump.returncode:
            raise RuntimeError(f"{source.name} for sm_{arch}: {cuobjdump}: {dump.stderr}")
    bodies = dict(re.findall(r"Function : (\w+)\n(.*?)(?=\n\t\tFunction|\Z)", dump.stdout, re.DOTALL))
    kernels = []
    for name, text in re.findall(r"Compiling entry function '(\w+)'(.*?)(?=Compiling entry|\Z)", result.stderr, re.DOTALL):
        usage = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        stack, stored, loaded = map(int, re.search(usage, text).groups())
        shared = re.search(r"(\d+) bytes smem", text)
        registers = int(re.search(r"Used (\d+) registers", text)[1])
        kernels.append(Kernel(name, registers, int(shared[1]) if shared else 0, stack, stored + loaded, bodies[name]))
    return kernels


def readable(names: list[str]) -> list[str]:
    """Demangled, without namespaces and arguments, where there is a c++filt."""
    if not names or shutil.which("c++filt") is None:
        return names
    lines = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout.splitlines()
    short = (re.sub(r"\(anonymous namespace\)::|nanogpt::|^void ", "", line) for line in lines)
    return [re.sub(r"\(int\)|\(bool\)", "", line).partition("(")[0] for line in short]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=list(ARCHS), help="such as 80 86 90a")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    args = parser.parse_args()
    nvcc, release = find_nvcc()
    cuobjdump = nvcc and find_cuobjdump(nvcc)
    if not cuobjdump:
        print(f"report_cuda: no {'cuobjdump' if nvcc else 'nvcc (set CUDA_HOME)'}", file=sys.stderr)
        return 2
    print(f"nvcc {release}, {' '.join(STRICT[:2])}")
    print(f"{'kernel':<40} {'arch':>6} {'regs':>5} {'shared':>7} {'stack':>6} {'spills':>7}  widest accesses")
    bad = shown = 0
    for source in sorted(CSRC.glob("*.cu")):
        for arch in args.arch:
            try:
                kernels = compile_source(source, arch, nvcc, cuobjdump)
            except RuntimeError as error:
                print(f"report_cuda: {error}", file=sys.stderr)
                return 2
            for name, k in zip(readable([k.name for k in kernels]), kernels, strict=True):
                if args.only not in name:
                    continue
                shown += 1
                bad += k.spills > 0
                accesses = " ".join(f"{kind}.{k.accesses[kind]}" for kind in ("LDG", "STG", "LDS", "STS") if kind in k.accesses)
                print(
                    f"{name:<40} {'sm_' + arch:>6} {k.registers:5d} {k.shared:7d} {k.stack:6d} {k.spills:7d}  {accesses}",
                    flush=True,
                )
    if not shown:
        print(f"report_cuda: --only {args.only}: no kernel's name contains it", file=sys.stderr)
        return 2
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
