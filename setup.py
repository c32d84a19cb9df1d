"""Builds csrc/ into kernels/nanogpt_{cpu,cuda}.so: ``pip install -e .`` or ``python setup.py build_ext --inplace``.

The sources use PyTorch's stable ABI, so all that is read of PyTorch is its headers and its version, without importing it: an
isolated build finds those of the environment it installs into. Without PyTorch, a C++ compiler or ninja the install is pure
Python. Environment: BUILD_CUDA=auto|0|1 (auto: where there are nvcc and a CUDA build of PyTorch; no GPU needed),
TORCH_CUDA_ARCH_LIST (default "8.0;9.0+PTX"), CXX, CUDA_HOME, BUILD_EXTENSION=0 to skip all of it.
"""

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

if sys.version_info < (3, 11):  # noqa: UP036  pip says so by itself
    sys.exit(f"nanogpt needs Python >= 3.11, this is {platform.python_version()} ({sys.executable})")

ROOT = Path(__file__).parent
CSRC = ROOT / "csrc"
ARCHS = "8.0;9.0+PTX"
TARGET = 0x020B << 48  # oldest PyTorch that the build runs on: 2.11
WARNINGS = "-Wall -Wextra"  # errors in tests only: other compilers have warnings of their own

# cpu_kernels.cpp is compiled once for each; ops.cpp picks one at run time. Only the baseline is for every machine.
INSTRUCTIONS = {"baseline": ""}
if platform.machine().lower() in ("x86_64", "amd64"):
    INSTRUCTIONS["avx2"] = "-mavx2 -mfma"
    INSTRUCTIONS["avx512"] = "-mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512"
AMX = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16 -mamx-tile -mamx-bf16"  # of cpu_amx.cpp; GCC 11, clang 12


class MissingError(Exception):
    """What a build needs is missing: the install goes on as pure Python."""


def find_torch() -> tuple[Path, str, str | None]:
    """PyTorch's folder, version and CUDA version in the environment that is installed into."""
    candidates = [Path(sysconfig.get_path(key)) for key in ("purelib", "platlib")]
    spec = importlib.util.find_spec("torch")
    if spec and spec.origin:
        candidates.insert(0, Path(spec.origin).parent.parent)
    for site in candidates:
        if (site / "torch" / "version.py").exists():
            text = (site / "torch" / "version.py").read_text()
            version = re.search(r"__version__ = '([^']+)'", text)[1]
            cuda = re.search(r"^cuda\b.*= '([^']+)'", text, re.MULTILINE)
            if tuple(map(int, version.split(".")[:2])) < (2, 11):
                sys.exit(f"PyTorch {version} is too old: 2.11 or later is needed")
            return site / "torch", version, cuda[1] if cuda else None
    raise MissingError(f"no PyTorch in {candidates[0]}")


def find_compiler() -> str:
    """The C++ compiler, if it compiles an empty program. A CC or CXX that does not run means that there is none."""
    compiler = os.environ.get("CXX", "c++")
    for command in (os.environ.get("CC", compiler), compiler):
        try:
            subprocess.run([*command.split(), "-fsyntax-only", "-xc++", os.devnull], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            raise MissingError(f"no C++ compiler: {command} does not run") from None
    return compiler


def compiles(compiler: str, flags: str, source: Path) -> bool:
    """Whether compiler and assembler know all that a source without PyTorch asks of them."""
    command = [*compiler.split(), "-std=c++17", *flags.split(), "-w", "-c", source, "-o", os.devnull]
    return subprocess.run(command, capture_output=True).returncode == 0


def find_ninja() -> str:
    spec = importlib.util.find_spec("ninja")
    path = shutil.which("ninja")
    if path is None and spec:
        path = str(Path(importlib.import_module("ninja").BIN_DIR) / "ninja")
    if path is None:
        raise MissingError("no ninja (pip install ninja)")
    return path


def find_cuda() -> tuple[Path, str] | None:
    """CUDA_HOME and the release of its nvcc, or None. An nvcc on the PATH that is a wrapper is asked for the real one."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if nvcc:
        dry = subprocess.run([nvcc, "--dryrun", "-c", "probe.cu"], capture_output=True, text=True)
        homes += [re.sub("/bin$", "", here) for here in re.findall(r"#\$ _HERE_=(.+)", dry.stderr)]
    for home in [*homes, "/usr/local/cuda"]:
        if home and (Path(home) / "bin" / "nvcc").exists():
            text = subprocess.run([f"{home}/bin/nvcc", "--version"], capture_output=True, text=True, check=True).stdout
            return Path(home), re.search(r"release (\d+\.\d+)", text)[1]
    return None


def cuda_to_build(torch_version: str, torch_cuda: str | None) -> Path | None:
    """CUDA_HOME if nanogpt_cuda is to be built."""
    wanted = os.environ.get("BUILD_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        sys.exit(f"BUILD_CUDA={wanted}: expected auto, 0 or 1")
    if wanted == "0":
        return None
    found = find_cuda() if torch_cuda else None
    missing = "" if torch_cuda else f"PyTorch {torch_version} is built without CUDA"
    missing = missing or ("" if found else "no nvcc (set CUDA_HOME)")
    if missing:
        if wanted == "1":
            sys.exit(f"BUILD_CUDA=1: {missing}")
        print(f"nanogpt: no CUDA kernels: {missing}")
        return None
    home, release = found
    if release.split(".")[0] != torch_cuda.split(".")[0]:
        sys.exit(f"{home}/bin/nvcc is CUDA {release}, but PyTorch {torch_version} is built with CUDA {torch_cuda}: "
                 "set CUDA_HOME to a matching toolkit, or BUILD_CUDA=0")  # fmt: skip
    return home


def arch_flags(archs: str) -> str:
    """ "8.0;9.0+PTX" -> nvcc's -gencode flags."""
    flags = []
    for arch in re.split(r"[;,\s]+", archs.strip("; ")):
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", arch)
        if not match:
            sys.exit(f"TORCH_CUDA_ARCH_LIST={archs}: expected entries such as 8.0 or 9.0+PTX, got {arch!r}")
        number = match[1] + match[2]
        flags.append(f"-gencode arch=compute_{number},code=sm_{number}")
        if match[3]:
            flags.append(f"-gencode arch=compute_{number},code=compute_{number}")
    return " ".join(flags)


def in_command(path: str) -> str:
    """A path, which may hold spaces, in a command of a ninja file."""
    return shlex.quote(path).replace("$", "$$")


def ninja_file(compiler: str, torch: Path, cuda: Path | None) -> str:
    """One object per source, one library per extension. The .cu files see no PyTorch header, which keeps them quick."""
    common = f"-std=c++17 -fPIC -DTORCH_TARGET_VERSION={TARGET:#x}ULL -isystem {in_command(f'{torch}/include')}"
    cxx = f"{common} -O3 -fvisibility=hidden {WARNINGS} {os.environ.get('CXXFLAGS', '')}"
    shared = "-dynamiclib -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"
    link = f"{shared} -L{in_command(f'{torch}/lib')} {os.environ.get('LDFLAGS', '')}"
    lines = [
        "rule cxx",
        f"  command = {compiler} -MD -MF $out.d {cxx} $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler} $in {link} $libs -o $out",
    ]
    if cuda:
        nvcc = f"{in_command(f'{cuda}/bin/nvcc')} -ccbin {compiler.split()[0]} -O3 -std=c++17"
        archs = arch_flags(os.environ.get("TORCH_CUDA_ARCH_LIST", ARCHS))
        lines += [
            "rule nvcc",
            f"  command = {nvcc} -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra {archs} -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]

    def source(name: str) -> str:
        return re.sub(r"([$ :])", r"$\1", str(CSRC / name))

    def build(target: str, rule: str, sources: str, **variables: str) -> str:
        lines.append(f"build {target}: {rule} {sources}")
        lines.extend(f"  {name} = {value}" for name, value in variables.items())
        return target

    x86 = len(INSTRUCTIONS) > 1
    amx = x86 and sys.platform == "linux" and compiles(compiler, AMX, CSRC / "cpu_amx.cpp")
    objects = [build("ops.o", "cxx", source("ops.cpp"), flags=f"{'-DNANOGPT_X86' * x86} {'-DNANOGPT_AMX' * amx}")]
    if amx:
        flags = f"{AMX} -Wno-uninitialized -Wno-maybe-uninitialized"  # GCC 12 warns of its own headers
        objects.append(build("amx.o", "cxx", source("cpu_amx.cpp"), flags=flags + " -Wno-unknown-warning-option"))
    for name, flags in INSTRUCTIONS.items():
        # Neither errno nor traps are looked at; without them sqrt and selections vectorise.
        flags += f" -fopenmp-simd -fno-math-errno -fno-trapping-math -Wno-psabi -DTABLE=kernels_{name}"
        objects.append(build(f"{name}.o", "cxx", source("cpu_kernels.cpp"), flags=flags))
    build("nanogpt_cpu.so", "link", " ".join(objects), libs="-ltorch_cpu -lc10")
    if cuda:
        objects = [build("ops_cuda.o", "cxx", source("ops_cuda.cpp"), flags="-DUSE_CUDA")]
        objects += [build("linear_gelu.o", "cxx", source("linear_gelu.cpp"), flags="")]
        objects += [build(f"{file.stem}.o", "nvcc", source(file.name)) for file in sorted(CSRC.glob("*.cu"))]
        libs = f"-ltorch_cuda -ltorch_cpu -lc10_cuda -lc10 -L{in_command(f'{cuda}/lib64')} -lcudart -ldl"
        build("nanogpt_cuda.so", "link", " ".join(objects), libs=libs)
    return "\n".join(lines) + "\n"


class Build(build_ext):
    """Replaces setuptools' compiler by one ninja call; the libraries are no Python modules, so their names carry no tag."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def run(self) -> None:
        names = {extension.name: Path(self.get_ext_filename(extension.name)) for extension in self.extensions}
        self.extensions = [e for e in self.extensions if self.compile(names[e.name].name)]
        if self.inplace:
            self.copy_extensions_to_source()

    @property
    def build_dir(self) -> Path:
        return ROOT / self.build_temp

    def compile(self, file: str) -> bool:
        """Whether the library is there now, in build_lib."""
        if not hasattr(self, "built"):
            self.built = self.compile_all()
        if file not in self.built:
            return False
        target = Path(self.build_lib) / "kernels" / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.build_dir / file, target)
        return True

    def compile_all(self) -> list[str]:
        if os.environ.get("BUILD_EXTENSION") == "0":
            return []
        try:
            if sys.platform == "win32":
                raise MissingError("no build for Windows yet")
            torch, version, torch_cuda = find_torch()
            compiler, ninja = find_compiler(), find_ninja()
        except MissingError as reason:
            print(f"nanogpt: pure-Python install, PyTorch's own kernels on the CPU: {reason}")
            return []
        cuda = cuda_to_build(version, torch_cuda)
        self.build_dir.mkdir(parents=True, exist_ok=True)
        text = ninja_file(compiler, torch, cuda)
        rules = self.build_dir / "build.ninja"
        if not rules.exists() or rules.read_text() != text:
            rules.write_text(text)
        if subprocess.run([ninja, "-C", self.build_dir]).returncode:
            sys.exit(
                "nanogpt: csrc/ did not compile; BUILD_EXTENSION=0 installs without it, BUILD_CUDA=0 without its CUDA part"
            )
        return ["nanogpt_cpu.so", *(["nanogpt_cuda.so"] if cuda else [])]


setup(
    ext_modules=[Extension(f"kernels.{name}", sources=[]) for name in ("nanogpt_cpu", "nanogpt_cuda")],
    cmdclass={"build_ext": Build},
)
