"""How the compiled extension is built, found and loaded, and what is said where it is not."""

import os
import runpy
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import setuptools
import torch

from kernels import extension

ROOT = Path(__file__).parent.parent
HAS_COMPILER = shutil.which("c++") and not extension.unavailable("adamw", "cpp")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty place for the libraries, beside empty sources."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "csrc").mkdir()
    monkeypatch.setattr(extension, "FOLDER", tmp_path / "kernels")
    monkeypatch.delenv("NANOGPT_BUILD", raising=False)

    def clear():
        extension.unavailable.cache_clear()
        extension._load.cache_clear()

    clear()
    yield tmp_path / "kernels"
    clear()


@pytest.fixture
def tree(tmp_path):
    """A copy of what a build needs, in a folder whose name a shell and ninja take apart."""
    tree = tmp_path / "my $5 projects"
    for name in ("csrc", "kernels"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tree / "nanogpt").mkdir()
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tree / name)
    return tree


def build(tree, **environment):
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    usual = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX")}
    return subprocess.run(command, cwd=tree, env=usual | environment, capture_output=True, text=True)


@pytest.fixture
def setup_functions(monkeypatch):
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    return runpy.run_path(str(ROOT / "setup.py"))


def test_missing_library_says_how_to_build_it(folder):
    assert extension.unavailable("adamw", "cpp") == "nanogpt_cpu is not built (python setup.py build_ext --inplace)"
    assert extension.status()["nanogpt_cuda"] == extension.status()["nanogpt_cpu"]  # the schemas are in nanogpt_cpu


def test_library_that_does_not_load(folder):
    (folder / "nanogpt_cpu.so").write_text("no ELF")
    assert extension.unavailable("adamw", "cpp").startswith("nanogpt_cpu.so does not load: ")


def test_op_without_implementation():
    assert extension.unavailable("embedding", "cuda") == "csrc has no embedding for cuda"


def test_newer_source_is_named(folder):
    (folder / "nanogpt_cpu.so").touch()
    assert extension._newer_source("nanogpt_cpu") == ""
    source = folder.parent / "csrc" / "cpu_math.h"
    source.touch()
    os.utime(source, (4e9, 4e9))
    assert extension._newer_source("nanogpt_cpu") == "csrc/cpu_math.h"
    assert extension._newer_source("nanogpt_cuda") == ""  # that one does not include it


def test_status_of_this_machine():
    states = extension.status()
    assert list(states) == ["nanogpt_cpu", "nanogpt_cuda"]
    for state in states.values():
        assert state.startswith("loaded") or "not built" in state or "does not load" in state


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CC": "false"}, "no C++ compiler: false does not run"),
        ({"CXX": "/no/such/c++"}, "no C++ compiler: /no/such/c++"),
        ({"CC": shutil.which("c++") or "c++", "PATH": ""}, "no C++ compiler: "),  # of CC alone
    ],
    ids=["CC=false", "CXX", "CC"],
)
def test_install_without_a_compiler_is_pure_python(tree, environment, reason):
    result = build(tree, **environment)
    assert result.returncode == 0
    assert result.stdout.count("pure-Python install") == 1
    assert reason in result.stdout
    assert not list(tree.rglob("*.so"))


def test_build_can_be_switched_off(tree):
    assert build(tree, BUILD_EXTENSION="0").returncode == 0
    assert not list(tree.rglob("*.so"))


@pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler and ninja")
def test_compile_error_stops_the_install(tree):
    (tree / "csrc" / "types.h").write_text("this is not C++")
    result = build(tree, BUILD_CUDA="0")
    assert result.returncode != 0
    assert "BUILD_EXTENSION=0 installs without it" in result.stderr


def test_wrong_build_cuda_value(setup_functions, monkeypatch):
    monkeypatch.setenv("BUILD_CUDA", "yes")
    with pytest.raises(SystemExit, match="BUILD_CUDA=yes: expected auto, 0 or 1"):
        setup_functions["cuda_to_build"]("2.13.0", None)


def test_cuda_is_built_only_where_all_fits(setup_functions, monkeypatch, tmp_path, capsys):
    to_build = setup_functions["cuda_to_build"]
    monkeypatch.setenv("BUILD_CUDA", "auto")
    monkeypatch.setitem(to_build.__globals__, "find_cuda", lambda: pytest.fail("an nvcc that may not even run"))
    assert to_build("2.13.0+cpu", None) is None
    assert "no CUDA kernels: PyTorch 2.13.0+cpu is built without CUDA" in capsys.readouterr().out
    monkeypatch.setitem(to_build.__globals__, "find_cuda", lambda: (tmp_path, "13.0"))
    assert to_build("2.13.0", "13.0") == tmp_path
    assert to_build("2.13.0", "13.2") == tmp_path  # minor releases of CUDA are compatible
    with pytest.raises(SystemExit, match=r"nvcc is CUDA 13\.0, but PyTorch 2\.13\.0 is built with CUDA 12\.8"):
        to_build("2.13.0", "12.8")
    monkeypatch.setenv("BUILD_CUDA", "1")
    with pytest.raises(SystemExit, match=r"BUILD_CUDA=1: PyTorch .* is built without CUDA"):
        to_build("2.13.0+cpu", None)
    monkeypatch.setitem(to_build.__globals__, "find_cuda", lambda: None)
    with pytest.raises(SystemExit, match="BUILD_CUDA=1: no nvcc"):
        to_build("2.13.0", "13.0")
    monkeypatch.setenv("BUILD_CUDA", "0")
    assert to_build("2.13.0", "12.8") is None


def test_cuda_home_behind_a_wrapper(setup_functions, monkeypatch, tmp_path):
    """An nvcc on the PATH that only calls another one elsewhere."""
    real = tmp_path / "cuda" / "bin" / "nvcc"
    wrapper = tmp_path / "path" / "nvcc"
    for file in (real, wrapper):
        file.parent.mkdir(parents=True)
    real.write_text(f'#!/bin/sh\necho "#\\$ _HERE_={real.parent}" >&2\necho "Cuda compilation tools, release 12.9, V12.9.1"\n')
    wrapper.write_text(f'#!/bin/sh\nexec "{real}" "$@"\n')
    for file in (real, wrapper):
        file.chmod(0o755)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
    assert setup_functions["find_cuda"]() == (tmp_path / "cuda", "12.9")


def test_arch_list(setup_functions):
    flags = setup_functions["arch_flags"]
    assert flags("8.0;9.0+PTX").split("-gencode ")[1:] == [
        "arch=compute_80,code=sm_80 ",
        "arch=compute_90,code=sm_90 ",
        "arch=compute_90,code=compute_90",
    ]
    assert flags("9.0a") == "-gencode arch=compute_90a,code=sm_90a"
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST=Hopper: expected entries such as"):
        flags("Hopper")


@pytest.mark.slow
@pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler and ninja")
def test_first_use_builds_once(tree):
    """Two processes that start on a fresh checkout: one builds, both load, and the next build has nothing to do."""
    code = "from kernels import extension; print(repr(extension.unavailable('adamw', 'cpp')))"
    flags = {"BUILD_CUDA": "0", "CXXFLAGS": "-Werror"}
    environment = {**os.environ, **flags, "NANOGPT_BUILD": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([sys.executable, "-c", code], cwd=tree, env=environment, **pipes) for _ in range(2)]
    results = [p.communicate(timeout=500) for p in processes]
    assert [out for out, _ in results] == ["''\n", "''\n"], results
    assert sum("running build_ext" in err for _, err in results) == 1
    assert "ninja: no work to do" in build(tree, **flags).stdout
    # A weak symbol of an object for newer machines could replace the baseline's, which would then not run on older machines.
    for object_file in tree.glob("build/temp*/a*.o"):  # amx, avx2, avx512
        symbols = subprocess.run(["nm", object_file], capture_output=True, text=True, check=True).stdout
        assert " W " not in symbols
        assert " u " not in symbols


@pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler")
@pytest.mark.parametrize("flags", [[], ["-DNANOGPT_X86"]], ids=["other CPUs", "compilers without AMX"])
def test_what_is_not_built_here_compiles(setup_functions, flags):
    """As on arm64, on macOS and with GCC 10: the branches of ops.cpp that this machine's own build leaves out."""
    torch_folder, _, _ = setup_functions["find_torch"]()
    command = ["c++", "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", *flags]
    command += [f"-DTORCH_TARGET_VERSION={setup_functions['TARGET']}ULL", "-isystem", torch_folder / "include"]
    result = subprocess.run([*command, ROOT / "csrc" / "ops.cpp"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_paths_with_spaces(setup_functions):
    """Those of PyTorch and CUDA, which ninja's commands hold; `tree` has the sources in such a folder."""
    rules = setup_functions["ninja_file"]("false", Path("/my env/torch"), Path("/my cuda"))
    assert "-isystem '/my env/torch/include'" in rules
    assert "-L'/my env/torch/lib'" in rules
    assert "command = '/my cuda/bin/nvcc'" in rules
    assert "-L'/my cuda/lib64'" in rules


def test_threads_that_load_at_once(monkeypatch):
    """Each asks first; the fakes are registered once, which PyTorch 2.11 insists on."""
    registered = []

    def register_fake(op, fake):
        time.sleep(0.01)
        registered.append(op)

    monkeypatch.setattr(torch.library, "register_fake", register_fake)
    monkeypatch.setattr(extension, "_faked", set())
    fakes = {"a": None, "b": None}
    threads = [threading.Thread(target=extension._register_fakes, args=(fakes,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert registered == ["nanogpt::a", "nanogpt::b"]


@pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler")
def test_library_of_an_earlier_version(tree):
    """One without the ops of today, as after an update without a build."""
    subprocess.run(["c++", "-shared", "-xc++", os.devnull, "-o", tree / "kernels" / "nanogpt_cpu.so"], check=True)
    code = "from kernels import extension; print(extension.unavailable('adamw', 'cpp'))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)}, capture_output=True, text=True
    )
    assert run.stdout.startswith("nanogpt_cpu.so is of an earlier version, without adamw_, grad_norm, ")
    assert run.stdout.endswith(f"({extension.BUILD})\n")


def test_failed_build_is_one_line(folder, monkeypatch):
    pytest.importorskip("fcntl")
    (folder.parent / "csrc" / "ops.cpp").touch()
    (folder.parent / "setup.py").write_text("raise SystemExit('csrc/ did not compile')")
    monkeypatch.setenv("NANOGPT_BUILD", "1")
    with pytest.raises(ChildProcessError, match=r"NANOGPT_BUILD=1: python setup\.py build_ext --inplace failed"):
        extension.unavailable("adamw", "cpp")


def test_lock_has_a_time_limit(folder, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    (folder.parent / "csrc" / "ops.cpp").touch()
    (folder.parent / "build").mkdir()
    monkeypatch.setattr(extension, "BUILD_LIMIT", 0.3)
    with (folder.parent / "build" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(TimeoutError, match="another process has been building"):
            extension._build("nanogpt_cpu")


@pytest.mark.skipif(not HAS_COMPILER, reason="the extension is not built")
def test_compiles_into_a_graph():
    """torch.compile takes the ops as they are, without a break."""

    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(grads):
        return torch.ops.nanogpt.grad_norm(grads) * 2

    grads = [torch.randn(5), torch.randn(3, 2)]
    torch.testing.assert_close(f(grads), 2 * torch.cat([g.flatten() for g in grads]).norm())
