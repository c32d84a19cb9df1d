"""nanogpt.doctor: what it finds on this machine, and what it says of machines that lack something."""

import ast
import errno
import json
import os
import re
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kernels import dispatch, extension, report_cuda
from nanogpt import doctor

ROOT = Path(__file__).parent.parent


def run(*options, cwd=None, **environment):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-m", "nanogpt.doctor", *options]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True)


def test_page_and_trial(tmp_path):
    result = run(cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("\n\ntraining works here\n")
    for section in ("versions", "machine", "compilers", "extension", "kernels", "distributed", "disk", "trial"):
        assert f"\n{section}\n" in "\n" + result.stdout
    assert torch.__version__ in result.stdout
    assert re.search(r"two updates  loss \d\.\d+ -> \d\.\d+ on (cpu|cuda|mps) in (float32|bfloat16|float16), ", result.stdout)
    assert len(result.stdout.splitlines()) < 60  # one page
    assert list(tmp_path.iterdir()) == []


def test_json_and_no_trial(capsys):
    assert doctor.main(doctor.DoctorConfig(json=True, trial=False)) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["problems"] == []
    assert report["versions"]["torch"] == torch.__version__
    assert "trial" not in report
    ops = {op for names in report["kernels"] for op in names.split(", ")}
    assert ops == set(dispatch.PREFERENCE)
    assert report["extension"].keys() == {"nanogpt_cpu", "nanogpt_cuda"}


def test_without_torch(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')\n")
    result = run(PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert result.returncode == 1
    assert result.stderr == ""
    assert "torch    does not import: libcudart.so.13: cannot open" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("training would not work here: torch does not import: libcudart.so.13")
    assert "pip install 'torch>=2.11'" in result.stdout.splitlines()[-1]
    assert "\nmachine\n" in result.stdout


def test_unknown_option():
    result = run("--verbose")
    assert result.returncode == 2
    assert result.stderr.startswith("doctor: unknown key --verbose")


def problems():
    return doctor.examine(with_trial=False)["problems"]


def test_the_variable_that_a_run_overrides_changes_nothing(tmp_path):
    elsewhere = "cpp" if torch.cuda.is_available() else "cuda"  # an op refuses it here
    usual, asked = (json.loads(run("--json", NANOGPT_KERNELS=kernels, cwd=tmp_path).stdout) for kernels in ("auto", elsewhere))
    assert asked["problems"] == []
    assert asked["kernels"] == usual["kernels"]
    assert asked["trial"]["two updates"].startswith("loss ")


@pytest.mark.parametrize("error", [ChildProcessError("NANOGPT_BUILD=1: it failed"), TimeoutError("build/lock: 900 s")])
def test_a_build_that_fails_is_the_problem(monkeypatch, error):
    def fail():
        raise error

    monkeypatch.setattr(extension, "status", fail)
    assert problems() == [str(error)]


def test_versions_that_are_too_old(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    assert problems() == ["torch 2.9.1+cu128 is too old: pip install --upgrade 'torch>=2.11'"]


@pytest.mark.parametrize("version", [(3, 4, 10), (3, 8, 18), (3, 9, 1), (3, 10, 13)])
@pytest.mark.parametrize("module", ["nanogpt.doctor", "nanogpt.train", "nanogpt.data.prepare"])
def test_python_that_is_too_old(version, module):
    ast.parse((ROOT / "nanogpt" / "__init__.py").read_text(), feature_version=version[:2])  # the rest it need not understand
    code = f"import runpy, sys; sys.version_info = {version}; runpy.run_module({module!r}, run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    message = f"nanogpt needs Python >= 3.11, this is {'.'.join(map(str, version))} ({sys.executable})\n"
    assert (result.returncode, result.stdout, result.stderr) == (1, "", message)


def test_another_package_named_kernels(monkeypatch):
    monkeypatch.setitem(sys.modules, "kernels", SimpleNamespace(__file__="/elsewhere/kernels/__init__.py"))
    assert problems() == ["another package named kernels hides ours: pip uninstall kernels (/elsewhere/kernels/__init__.py)"]


def test_packages(monkeypatch, tmp_path):
    (tmp_path / "pyproject.toml").write_text("""
        [project]
        dependencies = ["torch>=2.11", "no-such-package>=1; sys_platform == 'linux'"]
        [project.optional-dependencies]
        test = ["pytest"]
        track = ["pytest", "no-such-tracker[extra]>=2", "nor-that"]
    """)
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "platform", "linux")
    report, needed = doctor.packages()
    assert report == {
        "no-such-package": "pip install no-such-package",
        "[track]": "no-such-tracker, nor-that: pip install -e '.[track]'",
    }
    assert needed == ["no-such-package"]
    monkeypatch.setattr(doctor, "DISPENSABLE", ("no-such-package",))
    assert doctor.packages()[1] == []
    monkeypatch.setattr(sys, "platform", "darwin")
    assert list(doctor.packages()[0]) == ["[track]"]


def test_packages_of_an_installed_wheel(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    lines = ["numpy", "no-such-package>=1", 'pytest; extra == "test"', 'no-such-tracker; extra == "track"']
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: lines)
    report, needed = doctor.packages()
    assert list(report) == ["no-such-package", "[track]"]
    assert needed == ["no-such-package"]


def test_missing_requirement_is_the_problem(monkeypatch):
    monkeypatch.setattr(doctor, "packages", lambda: ({"tiktoken": "pip install tiktoken"}, ["tiktoken"]))
    assert problems() == ["not installed: tiktoken; pip install tiktoken"]


def test_disk(monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage(0.3e9))
    assert problems() == [f"0.3 GB are free in {Path.cwd()}: free some space, or choose --out_dir on another disk"]

    assert doctor.disk()[0]["current directory"] == f"{Path.cwd()}, writable, 0 GB free"


@pytest.mark.parametrize(
    ("number", "state", "advice"),
    [
        (errno.EACCES, "not writable (Permission denied)", "train in another directory, or choose --out_dir"),
        (errno.ENOSPC, "full (No space left on device)", "free some space, or choose --out_dir on another disk"),
        (errno.EDQUOT, "full (Disk quota exceeded)", "free some space, or choose --out_dir on another disk"),
    ],
    ids=["rights", "space", "quota"],
)
def test_a_directory_that_takes_no_file(monkeypatch, number, state, advice):
    def refuse(dir):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    report, problem = doctor.disk()
    assert problem == f"{Path.cwd()} is {state}: {advice}"
    assert report["current directory"].startswith(f"{Path.cwd()}, {state}, ")


@pytest.mark.parametrize("variable", ["CXX", "CC"])
@pytest.mark.parametrize("command", ["", "/no/such/compiler"])
def test_a_compiler_that_does_not_run_is_named(monkeypatch, variable, command):
    for name in ("CXX", "CC"):
        monkeypatch.delenv(name, raising=False)
    usual = doctor.cpp_compiler()
    monkeypatch.setenv(variable, command)
    assert doctor.cpp_compiler() == f"{variable}={command} does not run: the install is pure Python" != usual
    monkeypatch.setenv(variable, f"env {variable}=1 c++")  # several words
    assert doctor.cpp_compiler() == usual


def test_compilers(monkeypatch):
    monkeypatch.setenv("CXX", "/no/such/c++")
    monkeypatch.setattr(report_cuda, "find_nvcc", lambda: ("/cuda/bin/nvcc", "12.8"))
    assert doctor.tools("12.4") == {
        "C++": "CXX=/no/such/c++ does not run: the install is pure Python",
        "nvcc": "/cuda/bin/nvcc, CUDA 12.8; PyTorch's is 12.4: fits",
    }
    assert "another major release; set CUDA_HOME" in doctor.tools("13.0")["nvcc"]
    assert doctor.tools(None)["nvcc"].endswith("PyTorch is built without CUDA")
    monkeypatch.setattr(report_cuda, "find_nvcc", lambda: ("", ""))
    assert doctor.tools(None)["nvcc"] == "none"


def fake_torch(available, cuda="13.0", mps=False):
    p = SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=80 * 2**30)
    return SimpleNamespace(
        __version__="2.13.0",
        version=SimpleNamespace(cuda=cuda),
        cuda=SimpleNamespace(is_available=lambda: available, device_count=lambda: 2, get_device_properties=lambda i: p),
        backends=SimpleNamespace(mps=SimpleNamespace(is_available=lambda: mps)),
    )


def test_gpus(monkeypatch):
    monkeypatch.setattr(doctor, "output", lambda *command: "NVIDIA H100 80GB HBM3, 580.1\nNVIDIA H100 80GB HBM3, 580.1")
    text = "NVIDIA H100 80GB HBM3, sm_90, 80 GiB, driver 580.1"
    assert doctor.gpus(fake_torch(True)) == {"GPU 0": text, "GPU 1": text}
    assert "unused: torch 2.13.0 is built for CUDA 13.0: update the driver" in doctor.gpus(fake_torch(False))["GPU"]
    assert "unused: torch 2.13.0 is a build without CUDA" in doctor.gpus(fake_torch(False, cuda=None))["GPU"]
    assert doctor.gpus(None)["GPU"].startswith("NVIDIA H100")
    monkeypatch.setattr(doctor, "output", lambda *command: "")
    assert doctor.gpus(fake_torch(False))["GPU"] == "none (nvidia-smi lists none)"
    assert "mps" in doctor.gpus(fake_torch(False, mps=True))["GPU"]


@pytest.mark.parametrize(
    ("code", "limit", "message"),
    [
        ("raise RuntimeError('no kernel image is available')", 60, "RuntimeError: no kernel image is available"),
        ("import os; os.abort()", 60, "ended with -6 and said nothing"),
        ("import time; time.sleep(60)", 1, "took more than 1 s"),
    ],
    ids=["raises", "crashes", "hangs"],
)
def test_a_trial_that_fails_is_the_problem(monkeypatch, capsys, code, limit, message):
    monkeypatch.setattr(doctor, "TRIAL", code)
    monkeypatch.setattr(doctor, "TRIAL_LIMIT", limit)
    assert doctor.main(doctor.DoctorConfig()) == 1
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == f"training would not work here: a tiny model does not train: {message}"
    assert f"two updates  failed: {message}" in out
