"""The scripts, on a fresh copy each, with stand-ins for Python, pip and nvidia-smi: nothing is installed or downloaded."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = [
    "awk",
    "bash",
    "cat",
    "chmod",
    "cksum",
    "cp",
    "cut",
    "df",
    "dirname",
    "env",
    "find",
    "grep",
    "head",
    "mkdir",
    "mktemp",
    "rm",
    "sort",
    "tail",
    "xargs",
]

# Plays an interpreter: logs its arguments, does what the set-up needs of it, and hands JSON and XML to the real one.
PYTHON = r"""#!/usr/bin/env bash
all="$*"
printf '%s\n' "TRITON_INTERPRET=${TRITON_INTERPRET:-} ${all//$'\n'/ }" >>"$STUB/log"
case "$all" in
    --version) echo "Python $(cat "$STUB/version")" ;;
    *version_info*) [ "$(cat "$STUB/version")" != 3.9.1 ] ;;
    "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python && [ ! -e "$STUB/no_venv" ] ;;
    *cuda.is_available*) [ -e "$STUB/cuda" ] ;;
    "-c import torch") [ -e "$STUB/torch" ] ;;
    *torch.__version__*) echo "torch 2.99" ;;
    *--dry-run*) cat "$STUB/report.json" ;;
    *"pip install"*)
        case "$all" in *"-e .[test]"*) if [ -e "$STUB/setup_says" ]; then cat "$STUB/setup_says"; fi ;; esac
        if [ -e "$STUB/pip_fails" ]; then cat "$STUB/pip_fails" >&2; exit 1; fi
        case "$all" in *torch*) touch "$STUB/torch" ;; esac ;;
    *"-m pytest"*)
        kind=$([ -n "${TRITON_INTERPRET:-}" ] && echo interpreter || echo normal)
        for word; do case "$word" in --junit-xml=*) cp "$STUB/$kind.xml" "${word#*=}" 2>/dev/null ;; esac; done
        exit "$(cat "$STUB/$kind.code")" ;;
    *"-m ruff"*) [ ! -e "$STUB/ruff_fails" ] ;;
    *"-m nanogpt."*) [ ! -e "$STUB/fails" ] || ! grep -qe "$(cat "$STUB/fails")" <<<"$all" ;;
    *) exec "$REAL" "$@" ;;
esac
"""
CPU_BUILD = {"install": [{"metadata": {"requires_dist": ["sympy", "jinja2"]}}]}
CUDA_BUILD = {"install": [{"metadata": {"requires_dist": ["sympy", "nvidia-cublas==13; platform_system == 'Linux'"]}}]}


class Machine:
    """A folder with a copy of the project, and a PATH that holds the stand-ins and the tools the scripts may use."""

    def __init__(self, folder: Path):
        self.repo, self.stub, self.bin = folder / "repo", folder / "stub", folder / "bin"
        for path in (self.repo, self.stub, self.bin):
            path.mkdir()
        for name in ("pyproject.toml", "setup.py"):
            (self.repo / name).write_text("# of the project")
        (self.repo / "csrc").mkdir()
        (self.repo / "csrc" / "ops.cpp").write_text("// of the project")
        shutil.copytree(ROOT / "scripts", self.repo / "scripts")
        for tool in (*TOOLS, "touch"):
            os.symlink(shutil.which(tool), self.bin / tool)
        self.program("python3", PYTHON)
        self.note("version", "3.12.1")
        self.note("report.json", json.dumps(CPU_BUILD))
        self.tests("normal", 7, 0, 1)
        self.tests("interpreter", 5, 0, 2)

    def program(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def note(self, name: str, text: str = "") -> None:
        (self.stub / name).write_text(text)

    def tests(self, kind: str, count: int, failures: int, skipped: int, code: int | None = None) -> None:
        suite = f'<testsuite tests="{count}" failures="{failures}" errors="0" skipped="{skipped}"/>'
        self.note(f"{kind}.xml", f"<testsuites>{suite}</testsuites>")
        self.note(f"{kind}.code", str(int(failures > 0) if code is None else code))

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        self.note("log")
        variables = {"PATH": str(self.bin), "STUB": str(self.stub), "REAL": sys.executable, "HOME": str(self.stub)}
        command = ["bash", str(self.repo / "scripts" / script), *arguments]
        return subprocess.run(command, env=variables | environment, cwd="/", capture_output=True, text=True, timeout=60)

    def calls(self, word: str) -> list[str]:
        """What the interpreter was asked to do, of the calls that contain a word."""
        return [line for line in (self.stub / "log").read_text().splitlines() if word in line]


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "scripts").glob("*.sh")))
def test_syntax(script):
    subprocess.run(["bash", "-n", ROOT / "scripts" / script], check=True)


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh"])
def test_sets_up_once(machine, script):
    done = machine.run(script)
    assert done.returncode == 0, done.stderr
    assert "making .venv with Python 3.12.1" in done.stdout
    installs = machine.calls("pip install")
    assert len([call for call in installs if "--dry-run" not in call]) == 3
    assert installs[-1].endswith("--no-build-isolation -e .[test]")
    assert machine.run(script).returncode == 0
    assert not machine.calls("pip install")
    assert not machine.calls("-m venv")


def test_says_once_what_was_not_built(machine):
    reason = "nanogpt: pure-Python install, PyTorch's own kernels on the CPU: no C++ compiler: false does not run"
    machine.note("setup_says", f"  {reason}\n  nanogpt: no CUDA kernels: no nvcc\n  {reason}\n")
    done = machine.run("test.sh", CC="false")
    assert done.returncode == 0
    assert done.stdout.count("pure-Python install") == 1
    assert reason in done.stdout.splitlines()
    assert "no CUDA kernels" not in done.stdout  # of no interest without a GPU
    machine.program("nvidia-smi", "#!/usr/bin/env bash\necho 'NVIDIA A100, 570.1'\n")
    machine.note("cuda")
    assert "nanogpt: no CUDA kernels: no nvcc" in machine.run("test.sh").stdout.splitlines()


@pytest.mark.parametrize("changed", ["pyproject.toml", "setup.py", "csrc/ops.cpp"])
def test_sets_up_again_after_a_change(machine, changed):
    machine.run("test.sh")
    (machine.repo / changed).write_text("changed")
    machine.run("test.sh")
    installs = machine.calls("pip install")
    assert installs[-1].endswith("-e .[test]")
    assert not [call for call in installs if "torch" in call]


def test_interrupted_set_up_is_finished(machine):
    machine.note("pip_fails", "something")
    assert machine.run("test.sh").returncode == 1
    (machine.stub / "pip_fails").unlink()
    assert machine.run("test.sh").returncode == 0
    assert machine.calls("torch==2.13.0")
    assert not machine.calls("-m venv")


def test_failed_change_is_not_taken_for_the_old_state(machine):
    machine.run("test.sh")
    before = (machine.repo / "setup.py").read_text()
    (machine.repo / "setup.py").write_text("changed")
    machine.note("pip_fails", "something")
    assert machine.run("test.sh").returncode == 1
    (machine.repo / "setup.py").write_text(before)
    (machine.stub / "pip_fails").unlink()
    assert machine.run("test.sh").returncode == 0
    assert machine.calls("-e .[test]")


def test_cpu_takes_what_the_index_offers_if_that_is_a_cpu_build(machine):
    machine.run("test.sh")
    (install,) = (call for call in machine.calls("torch==2.13.0") if "--dry-run" not in call)
    assert "index-url" not in install


def test_cpu_adds_pytorch_s_index_if_the_default_is_a_cuda_build(machine):
    machine.note("report.json", json.dumps(CUDA_BUILD))
    machine.run("test.sh")
    (install,) = (call for call in machine.calls("torch==2.13.0") if "--dry-run" not in call)
    assert install.endswith("torch==2.13.0 --extra-index-url https://download.pytorch.org/whl/cpu")


def test_gpu_takes_the_newest(machine):
    machine.program("nvidia-smi", "#!/usr/bin/env bash\necho 'NVIDIA A100, 570.1'\n")
    machine.note("cuda")
    done = machine.run("quickstart.sh")
    assert done.returncode == 0, done.stderr
    (install,) = machine.calls("pip install --disable-pip-version-check torch")
    assert install.endswith("torch>=2.11")
    assert machine.calls("-m nanogpt.train plays_char")
    assert done.stderr == ""


def test_gpu_that_torch_cannot_use_is_named(machine):
    machine.program("nvidia-smi", "#!/usr/bin/env bash\necho 'NVIDIA A100, 470.1'\n")
    done = machine.run("quickstart.sh")
    assert done.returncode == 0
    assert "torch 2.99 cannot use the GPU here (NVIDIA A100, 470.1)" in done.stderr
    assert machine.calls("-m nanogpt.train plays_cpu")


def test_torch_can_be_chosen(machine):
    machine.run("test.sh", TORCH="torch==2.12.0", TORCH_INDEX_URL="https://example.invalid/cu126")
    (install,) = machine.calls("torch==2.12.0")
    assert install.endswith("torch==2.12.0 --index-url https://example.invalid/cu126")


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh"])
@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("old python", "needs Python >= 3.11, this is Python 3.9.1; install one"),
        ("chosen old python", "python3: needs Python >= 3.11, this is Python 3.9.1"),
        ("chosen python", "PYTHON=/no/python: no such program"),
        ("no venv", "apt-get install python3-venv"),
        ("disk", "1 GB are free"),
        ("network", "check the network"),
        ("full", "the disk is full"),
        ("other", "pip failed; the whole story is in .venv/install.log"),
    ],
)
def test_says_what_is_missing(machine, script, trouble, message):
    environment = {}
    if trouble == "old python":
        machine.note("version", "3.9.1")
    elif trouble == "chosen old python":
        machine.note("version", "3.9.1")
        environment["PYTHON"] = str(machine.bin / "python3")
    elif trouble == "chosen python":
        environment["PYTHON"] = "/no/python"
    elif trouble == "no venv":
        machine.note("no_venv")
    elif trouble == "disk":
        (machine.bin / "df").unlink()
        machine.program("df", "#!/usr/bin/env bash\nprintf 'head\\n/dev/x 9 9 2000000 9%% /\\n'\n")
    else:
        text = {"network": "NewConnectionError: no", "full": "OSError: No space left on device", "other": "bad wheel"}[trouble]
        machine.note("pip_fails", f"{text}\n")
    done = machine.run(script, **environment)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("set-up: ")
    assert message in done.stderr.splitlines()[-1]
    assert not machine.calls("-m nanogpt")
    assert not machine.calls("-m pytest")
    if trouble == "no venv":  # half of one would be taken for a whole one
        assert not (machine.repo / ".venv").exists()


def test_tests_run_in_two_processes(machine):
    done = machine.run("test.sh", "-k", "some name")
    assert done.returncode == 0
    normal, interpreter = machine.calls("-m pytest")
    assert normal.startswith("TRITON_INTERPRET= ")
    assert normal.endswith("-m not triton and not gpu -k some name")
    assert interpreter.startswith("TRITON_INTERPRET=1 ")
    assert interpreter.endswith("-m triton and not gpu -k some name")
    assert len(machine.calls("-m ruff")) == 2
    assert done.stdout.splitlines()[-1] == "9 passed, 0 failed, 3 skipped"


def test_tests_run_on_the_gpu_in_one(machine):
    machine.note("cuda")
    done = machine.run("test.sh")
    (normal,) = machine.calls("-m pytest")
    assert normal.startswith("TRITON_INTERPRET= ")
    assert " -m not" not in normal
    assert done.stdout.splitlines()[-1] == "6 passed, 0 failed, 1 skipped"


@pytest.mark.parametrize("kind", ["normal", "interpreter"])
def test_a_failure_in_either_process_counts(machine, kind):
    machine.tests(kind, 6, 2, 0)
    done = machine.run("test.sh")
    assert done.returncode == 1
    assert len(machine.calls("-m pytest")) == 2
    assert ", 2 failed, " in done.stdout.splitlines()[-1]
    assert f"failed: tests{' of kernels in the interpreter' if kind == 'interpreter' else ''}\n" in done.stdout


def test_a_crash_without_a_report_counts(machine):
    machine.note("interpreter.code", "139")
    (machine.stub / "interpreter.xml").unlink()
    done = machine.run("test.sh")
    assert done.returncode == 1
    assert "failed: tests of kernels" in done.stdout


def test_lint_counts(machine):
    machine.note("ruff_fails")
    done = machine.run("test.sh")
    assert done.returncode == 1
    assert "failed: lint\nfailed: format\n" in done.stdout
    assert done.stdout.splitlines()[-1] == "9 passed, 0 failed, 3 skipped"


def test_selecting_tests_of_one_process_only_is_fine(machine):
    machine.tests("interpreter", 0, 0, 0, code=5)
    assert machine.run("test.sh", "tests/test_data.py").returncode == 0
    machine.tests("normal", 0, 0, 0, code=5)
    done = machine.run("test.sh", "-k", "nothing")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "0 passed, 0 failed, 0 skipped"


def test_quickstart_prepares_trains_and_samples(machine):
    done = machine.run("quickstart.sh", "--max_iters=5")
    assert done.returncode == 0, done.stderr
    prepare, train, sample = (call.partition("-m ")[2] for call in machine.calls("-m nanogpt."))
    assert prepare == "nanogpt.data.prepare plays_char"
    assert train == "nanogpt.train plays_cpu --max_iters=5"
    assert sample.startswith("nanogpt.sample --out_dir=out-plays-cpu ")
    for path in ("data/plays_char", "out-plays-cpu"):
        assert path in done.stdout


def test_quickstart_goes_on_with_a_run(machine):
    (machine.repo / "out-plays-cpu" / "step-250").mkdir(parents=True)
    machine.run("quickstart.sh")
    assert machine.calls("-m nanogpt.train plays_cpu --init_from=resume")


def test_quickstart_samples_where_it_was_told_to_train(machine):
    (machine.repo / "elsewhere" / "step-250").mkdir(parents=True)
    done = machine.run("quickstart.sh", "--out_dir=elsewhere")
    assert machine.calls("-m nanogpt.train plays_cpu --init_from=resume --out_dir=elsewhere")
    assert machine.calls("-m nanogpt.sample --out_dir=elsewhere ")
    assert "out-plays-cpu" not in done.stdout


@pytest.mark.parametrize("step", ["data.prepare", "train", "sample"])
def test_quickstart_stops_at_the_first_failure(machine, step):
    machine.note("fails", f"-m nanogpt.{step}")
    done = machine.run("quickstart.sh")
    assert done.returncode == 1
    assert machine.calls("-m nanogpt.")[-1].partition("-m nanogpt.")[2].startswith(step)
    assert "Made here" not in done.stdout
