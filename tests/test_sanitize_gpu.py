"""The cases for compute-sanitizer, without it; and what becomes of what it says, with a stand-in."""

import subprocess
import sys
from pathlib import Path

import pytest

from kernels import attention, cross_entropy, decode, embedding, gelu, layernorm, mlp
from tests.helpers import INTERPRET

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))  # scripts, not a package

import sanitize_gpu  # noqa: E402


def start(tmp_path, *options, tool=None):
    """The script in a process of its own, with no compute-sanitizer but the stand-in, whose text is ``tool``."""
    environment = {"PATH": str(tmp_path), "CUDA_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    if tool:
        (tmp_path / "compute-sanitizer").write_text(f"#!/bin/sh\n{tool}")
        (tmp_path / "compute-sanitizer").chmod(0o755)
    command = [sys.executable, str(ROOT / "scripts" / "sanitize_gpu.py"), "--device", "cpu", *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_a_failing_case_is_named_and_the_others_go_on(monkeypatch, capsys):
    cases = {"first": ("triton", lambda: 1 / 0), "second": ("triton", lambda: None)}
    monkeypatch.setattr(sanitize_gpu, "cases", lambda device: cases)
    assert sanitize_gpu.run("cpu", "plain") == 1
    assert capsys.readouterr().out == "plain: failed: first: ZeroDivisionError: division by zero\nplain: ran second\n"


@pytest.mark.parametrize(("tools", "code"), [("memcheck", 0), ("memcheck,racecheck", 1)])
def test_what_a_tool_finds_is_the_exit_code(tmp_path, tools, code):
    """The cases themselves run first; then every tool gets the same command."""
    found = start(tmp_path, "--tools", tools, tool='echo "$PYTORCH_NO_CUDA_MEMORY_CACHING $*"\n[ "$2" != racecheck ]\n')
    assert found.returncode == code, found.stderr
    lines = found.stdout.splitlines()
    assert sum(line.startswith("plain: ran ") for line in lines) == len(sanitize_gpu.cases("cpu"))
    for tool in tools.split(","):
        (started,) = (line for line in lines if line.startswith(f"1 --tool {tool} --prefix == {tool} "))
        assert "--error-exitcode 1" in started
        assert started.endswith(f"sanitize_gpu.py --device cpu --run {tool}")
    assert "memcheck: nothing found" in lines
    assert ("racecheck: exit code 1" in lines) == (code == 1)


def test_no_sanitizer(tmp_path):
    done = start(tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("sanitize_gpu.py: no compute-sanitizer on PATH, in CUDA_HOME, or from pip install nvidia-")


def test_where_it_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    for folder in ("site/nvidia/cu13/bin", "toolkit/bin"):
        path = tmp_path / folder / "compute-sanitizer"
        path.parent.mkdir(parents=True)
        path.touch(mode=0o755)
        assert sanitize_gpu.find_sanitizer() in (str(path), "/usr/local/cuda/bin/compute-sanitizer")


@pytest.mark.triton
@pytest.mark.skipif(not INTERPRET, reason="counts launches of the interpreter")
def test_every_kernel_is_among_the_cases(monkeypatch):
    launched, kernels = set(), {}
    for module in (attention, cross_entropy, decode, embedding, gelu, layernorm, mlp):
        for name, kernel in vars(module).items():
            if name.endswith("_kernel"):
                kernels[kernel] = f"{module.__name__}.{name}"
    (kind,) = {type(kernel) for kernel in kernels}
    launch = kind.__getitem__
    monkeypatch.setattr(kind, "__getitem__", lambda self, grid: (launched.add(kernels.get(self)), launch(self, grid))[1])
    assert sanitize_gpu.run("cpu", "interpreter") == 0
    assert len(kernels) > 10
    assert set(kernels.values()) <= launched
