"""scripts/gpu_suite.sh without a GPU: stand-ins for Python and nvidia-smi, and every part for real in its smallest form."""

import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tests.runs import walk

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "scripts")]  # scripts, not a package

import report  # noqa: E402

PARTS = "build,step124,tests,ops,sanitize,startup,truth,step350,step1558,batch1558"

# Each command as the suite gives it, on the CPU and as small as it gets; what differs from another in a name only is left out.
SMALLEST = f"""
case "$*" in *layernorm* | *optimizer* | *embedding* | *ceilings* | *350M* | *"--batch 24"*) echo "ran $*" && exit ;; esac
case "$1" in
    setup.py) echo "for $TORCH_CUDA_ARCH_LIST, BUILD_CUDA=$BUILD_CUDA" ;;
    -m) echo "ran $*" ;;
    scripts/sanitize_gpu.py) exec {sys.executable} "$@" --device cpu ;;
    benchmarks/train_step.py) exec {sys.executable} "$@" --device cpu --tiny --size tiny --steps 2 --providers ours ;;
    benchmarks/loss_curves.py) exec {sys.executable} "$@" --device cpu --size tiny --steps 3 --batch 2 --kernels torch ;;
    benchmarks/*) exec {sys.executable} "$@" --device cpu --tiny --providers ours,ours-torch,torch ;;
    *) exec {sys.executable} "$@" ;;
esac
"""


def suite(
    tmp_path: Path, *arguments: str, python: str = "", smi: str = "echo 9.0", **environment: str
) -> subprocess.CompletedProcess:
    tools = {"python": python, "nvidia-smi": smi, "compute-sanitizer": "exit 0"}
    for name, text in tools.items():
        (tmp_path / name).write_text("#!/bin/bash\n" + text)
        (tmp_path / name).chmod(0o755)
    command = ["bash", str(ROOT / "scripts" / "gpu_suite.sh"), *arguments]
    path = f"{tmp_path}:{os.environ['PATH']}"
    environment = os.environ | {"PYTHON": str(tmp_path / "python"), "PATH": path, "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=580)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out"], "--out needs a value"),
        (["--minutes", "3"], "--out DIR is missing"),
        (["--out", "x", "--minutes", "0"], "--minutes 0 is no positive number"),
        (["--out", "x", "--only", "build,step123"], "--only step123: no such part"),
        (
            ["--out", "x", "--only", "truth", "--data", "gone"],
            "truth: no tokens in gone; make them with python -m nanogpt.data.",
        ),
        (["--fast"], "unknown option --fast"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options(arguments, message, tmp_path):
    done = suite(tmp_path, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"gpu_suite.sh: {message}")


def test_no_gpu(tmp_path):
    """One line where neither nvidia-smi nor PyTorch sees a GPU; PyTorch's word is enough."""
    done = suite(tmp_path, "--out", "out", "--only", "build", python="echo no module >&2; exit 1", smi="exit 9")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("gpu_suite.sh: needs a GPU: nvidia-smi lists none")
    assert suite(tmp_path, "--out", "out", "--only", "build", python="exit 0", smi="exit 9").returncode == 0


def test_goes_on_past_failures(tmp_path):
    """One part fails, one hangs past its limit: the others run, the page says so, and the exit code is 1."""
    python = 'case "$*" in *setup.py*) exit 3 ;; *layernorm*) exec sleep 60 ;; esac\necho "ran $1"\n'
    done = suite(tmp_path, "--out", "out", "--minutes", "0.25", "--only", "build,ops", python=python)
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert done.returncode == 1
    assert "| build | failed (3)" in summary
    assert "| attention | ok" in summary
    assert "| layernorm | out of time" in summary
    assert "| ceilings | no time left" in summary
    assert "ran benchmarks/attention.py" in (tmp_path / "out" / "suite.log").read_text()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["suite.log", "summary.md"]


SLOW = """
import time
from pathlib import Path
import pytest
@pytest.mark.parametrize("i", range(400))
def test_slow(i):
    if i == 2:
        Path(__file__).with_name("third").touch()
    time.sleep(1)
"""


@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["alone", "xdist"])
def test_tests_out_of_time_leave_their_report(tmp_path, workers):
    """The part is stopped as by Ctrl-C: what pytest has run by then is in junit.xml."""
    if workers:
        pytest.importorskip("xdist")
    (tmp_path / "test_slow.py").write_text(SLOW)
    junit, test, third = tmp_path / "out" / "junit.xml", tmp_path / "test_slow.py", tmp_path / "third"
    real = f"exec {sys.executable} -m pytest -q -p no:cacheprovider {' '.join(workers)} --junitxml '{junit}' '{test}'"
    # Its time is up when the third test has begun, however fast the machine is: SIGALRM is what `timeout` itself waits for
    up = f"(while kill -0 $$ && [ ! -e '{third}' ]; do sleep 0.1; done; kill -ALRM $$) 2>/dev/null &\n"
    (tmp_path / "timeout").write_text(f'#!/bin/bash\n{up}exec {shutil.which("timeout")} "$@"\n')
    (tmp_path / "timeout").chmod(0o755)
    done = suite(tmp_path, "--out", "out", "--only", "tests", python=f'[ "$2" != pytest ] || {real}\n')
    assert "| tests | out of time" in done.stdout
    (found,) = ElementTree.parse(junit).iter("testsuite")
    assert 1 <= int(found.get("tests")) < 400
    assert found.get("failures") == "0"


@pytest.mark.slow
def test_every_part_in_its_smallest_form(tmp_path):
    """The options that each part gives are ones its command has; rows, page, curves and plot are there at the end."""
    pytest.importorskip("matplotlib")
    (tmp_path / "walk").mkdir()
    data = walk(tmp_path / "walk")
    out = tmp_path / "out"
    done = suite(tmp_path, "--out", "out", "--minutes", "9", "--only", PARTS, python=SMALLEST, NANOGPT_DATA=str(data))
    assert done.returncode == 0, done.stdout + done.stderr
    summary, log = (out / "summary.md").read_text(), (out / "suite.log").read_text()
    took = [line.split("|")[1:3] for line in summary.splitlines() if line.endswith(" s |")]
    assert [name.strip() for name, outcome in took if outcome == " ok "] == [
        "build", "step 124M", "tests", "attention", "cross_entropy", "mlp", "layernorm", "optimizer", "embedding", "ceilings",
        "sanitize", "start-up", "training truth", "step 350M", "step 1558M", "step 1558M, B=24",
    ]  # fmt: skip
    assert "for 9.0, BUILD_CUDA=1" in log
    assert "-m gpu or triton --junitxml" in log
    assert {r["op"] for r in report.read(out)} == {"train_step", "loss_curves", "attention", "cross_entropy", "mlp"}
    assert "From process start to the end of the first step" in summary
    assert (out / "curves" / "tiny-B2-T32-N3.png").exists()
