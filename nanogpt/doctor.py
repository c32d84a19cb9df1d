"""One page on what this machine has, which kernels run on it and why, and what is missing.

    python -m nanogpt.doctor             # exit code 0: training works here; 1: it does not, and the last line says what to do
    python -m nanogpt.doctor --json      # the same for a bug report

Works where PyTorch does not import, too.
"""

import errno
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanogpt.config import key, parse

ROOT = Path(__file__).parent.parent
OLDEST_TORCH = (2, 11)
DISPENSABLE = ("triton", "nvidia-ml-py")  # of the requirements: without them PyTorch's kernels run, and sensors stay unread
FREE_DISK = 1.0  # GB that a run of the smallest preset, with its checkpoints, fits into
TRIAL_LIMIT = 600  # seconds; Triton compiles some twenty kernels on a GPU's first use

# One update of a tiny model on the device and in the dtype that training would take. It imports what the trainer imports.
TRIAL = """
import sys, time
import torch
import nanogpt.train
from kernels import dispatch
from nanogpt.config import GPTConfig
from nanogpt.distributed import pick_device, pick_dtype
from nanogpt.model import GPT
from nanogpt.optim import AdamW, LossScale

dispatch.use("auto")  # as a run does
begin = time.perf_counter()
torch.manual_seed(1337)
device = pick_device("auto")
dtype = pick_dtype("auto", device)
model = GPT(GPTConfig(block_size=64, vocab_size=96, n_layer=2, n_head=2, n_embd=128), dtype).to(device)
scale = LossScale(device) if dtype == torch.float16 else None
optimizer = AdamW(model.decay_groups(), lr=1e-3)
tokens = torch.randint(96, (4, 65), device=device)
losses = []
for _ in range(2):
    loss = model(tokens[:, :-1], tokens[:, 1:])[1]
    (loss if scale is None else loss * scale.value).backward()
    optimizer.step(1.0, scale)
    losses.append(loss.item())
if not losses[1] < losses[0]:
    sys.exit(f"an update of a tiny model took the loss from {losses[0]:.4f} to {losses[1]:.4f}")
name = str(dtype).removeprefix("torch.")
print(f"loss {losses[0]:.3f} -> {losses[1]:.3f} on {device.type} in {name}, {time.perf_counter() - begin:.1f} s")
"""


@dataclass
class DoctorConfig:
    json: bool = key(False, "print one JSON object, for a bug report")
    trial: bool = key(True, "train a tiny model for two updates, in a process of its own")


def output(*command: str | Path) -> str:
    """What a program prints; empty where it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def cpu() -> dict[str, str]:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"model name\s*:\s*(.+)", info)
    found = re.search(r"^flags\s*:(.+)", info, re.MULTILINE)
    flags = set(found[1].split()) if found else set()
    wanted = {"AVX2": "avx2", "AVX-512": "avx512f", "AMX": "amx_bf16"}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    report = {"name": name[1] if name else platform.processor() or platform.machine(), "cores": str(cores)}
    if found:
        report["instructions"] = ", ".join(n if f in flags else f"no {n}" for n, f in wanted.items())
    memory = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text()) if info else None
    return report | ({"memory": f"{int(memory[1]) / 2**20:.1f} GiB available"} if memory else {})


def packages() -> tuple[dict[str, str], list[str]]:
    """What is not installed, each with the command that brings it; and the names that training cannot do without."""
    import tomllib  # Python 3.11

    project = ROOT / "pyproject.toml"
    if project.exists():
        table = tomllib.loads(project.read_text())["project"]
        required, extras = table["dependencies"], table["optional-dependencies"]
    else:
        required, extras = [], {}
        for line in importlib.metadata.requires("nanogpt") or []:
            extra = re.search(r"extra == ['\"]([\w-]+)['\"]", line)
            (extras.setdefault(extra[1], []) if extra else required).append(line)
    needed = missing(required)
    report = {name: "pip install " + name for name in needed}
    for extra, requirements in extras.items():
        absent = missing(requirements)
        if absent:
            report[f"[{extra}]"] = f"{', '.join(absent)}: pip install -e '.[{extra}]'"
    return report, [name for name in needed if name not in DISPENSABLE]


def missing(requirements: list[str]) -> list[str]:
    names = []
    for requirement in requirements:
        if "sys_platform == 'linux'" in requirement.replace('"', "'") and sys.platform != "linux":
            continue
        name = re.match(r"[\w.-]+", requirement)[0]
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            names.append(name)
    return names


def cpp_compiler() -> str:
    """The C++ compiler's version, or why there is none: for setup.py, a CC or CXX that does not run means that."""
    chosen = [v for v in ("CXX", "CC") if v in os.environ]
    for variable in chosen:
        if not preprocesses(os.environ[variable].split()):
            return f"{variable}={os.environ[variable]} does not run: the install is pure Python"
    if not chosen and not preprocesses(["c++"]):
        return "c++ does not run: the install is pure Python"
    return output(*os.environ.get("CXX", "c++").split(), "--version").partition("\n")[0]


def preprocesses(compiler: list[str]) -> bool:
    return output(*compiler, "-E", "-dM", "-xc++", os.devnull) != ""


def tools(torch_cuda: str | None) -> dict[str, str]:
    """Compilers, and whether they fit."""
    from kernels.report_cuda import find_nvcc

    path, release = find_nvcc()
    report = {"C++": cpp_compiler(), "nvcc": "none"}
    if path:
        fit = "PyTorch is built without CUDA" if torch_cuda is None else f"PyTorch's is {torch_cuda}: "
        if torch_cuda:
            same = release.split(".")[0] == torch_cuda.split(".")[0]
            fit += "fits" if same else "another major release; set CUDA_HOME to a matching toolkit, or BUILD_CUDA=0"
        report["nvcc"] = f"{path}, CUDA {release}; {fit}"
    return report


def gpus(torch: Any) -> dict[str, str]:
    """Each GPU that PyTorch sees; else what stands in its way."""
    query = output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader").splitlines()
    if torch is not None and torch.cuda.is_available():
        driver = query[0].rpartition(", ")[2] if query else "unknown"
        found = {}
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            found[f"GPU {i}"] = f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB, driver {driver}"
        return found
    if torch is not None and torch.backends.mps.is_available():
        return {"GPU": "Apple's, through Metal (mps)"}
    if not query:
        return {"GPU": "none (nvidia-smi lists none)"}
    if torch is None:
        return {"GPU": "; ".join(query)}
    build = f"is built for CUDA {torch.version.cuda}: update the driver" if torch.version.cuda else "is a build without CUDA"
    return {"GPU": f"{'; '.join(query)}, unused: torch {torch.__version__} {build}, or install another build of PyTorch"}


def load_torch() -> tuple[Any, str]:
    """PyTorch, or None and why not."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library that it needs
        return None, f"does not import: {error}"
    return torch, torch.__version__


def backends(torch: Any) -> tuple[dict[str, str], dict[str, str]]:
    """State of the compiled libraries, and the backend of each op with its reason.

    Raises:
        OSError: where a build that NANOGPT_BUILD=1 asks for fails, or another process holds it.
    """
    from kernels import dispatch, extension

    dispatch.use("auto")  # as a run does, whatever NANOGPT_KERNELS says
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    groups: dict[str, list[str]] = {}
    for op, (backend, reason) in dispatch.explain(device).items():
        groups.setdefault(f"{backend} ({reason})", []).append(op)
    return extension.status(), {", ".join(ops): choice for choice, ops in groups.items()}


def distributed(torch: Any) -> dict[str, str]:
    dist = torch.distributed
    available = dist.is_available()
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if available and dist.is_nccl_available() else "not in this build"
    return {"NCCL": nccl, "gloo": "yes" if available and dist.is_gloo_available() else "not in this build"}


def disk() -> tuple[dict[str, str], str]:
    """Space and rights where one would train; the second is what is wrong with it."""
    here = Path.cwd()
    free = shutil.disk_usage(here).free / 1e9
    problem, state = "", "writable"
    if free < FREE_DISK:
        problem = f"{free:.1f} GB are free in {here}: free some space, or choose --out_dir on another disk"
    try:
        with tempfile.TemporaryFile(dir=here):
            pass
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            state = f"full ({error.strerror})"
            problem = f"{here} is {state}: free some space, or choose --out_dir on another disk"
        else:
            state = f"not writable ({error.strerror})"
            problem = f"{here} is {state}: train in another directory, or choose --out_dir"
    report = {"current directory": f"{here}, {state}, {free:.0f} GB free"}
    if Path("/dev/shm").exists():
        report["/dev/shm"] = f"{shutil.disk_usage('/dev/shm').free / 1e9:.1f} GB free"
    return report, problem


def trial() -> tuple[str, str]:
    """(what it said, what went wrong)."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    try:
        command = [sys.executable, "-c", TRIAL]
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=TRIAL_LIMIT, env={**os.environ, "PYTHONPATH": path}
        )
    except subprocess.TimeoutExpired:
        return "", f"took more than {TRIAL_LIMIT} s"
    if result.returncode == 0:
        return result.stdout.strip().splitlines()[-1], ""
    return "", (result.stderr.strip().splitlines() or [f"ended with {result.returncode} and said nothing"])[-1]


def examine(with_trial: bool = True) -> dict[str, Any]:
    """Everything: {section: {name: text}}, and ``problems``, each with what to do, the most basic one first."""
    import kernels

    torch, state = load_torch()
    python = f"{platform.python_version()} ({sys.executable})"
    ours = getattr(kernels, "__version__", "?")
    report: dict[str, Any] = {
        "versions": {"nanogpt": f"{ours} ({ROOT})", "python": python, "system": platform.platform(), "torch": state}
    }
    if Path(kernels.__file__ or "").parent != ROOT / "kernels":
        hidden = f"another package named kernels hides ours: pip uninstall kernels ({kernels.__file__})"
        return report | {"problems": [hidden]}
    problems = []
    absent, needed = packages()
    if torch is None:
        problems.append(f"torch {state}; pip install 'torch>=2.11', or bash scripts/quickstart.sh, which makes an environment")
    elif tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2]) < OLDEST_TORCH:
        problems.append(f"torch {torch.__version__} is too old: pip install --upgrade 'torch>=2.11'")
    usable = not problems  # as far as the kernels need it
    if usable and needed:
        problems.append(f"not installed: {', '.join(needed)}; pip install {' '.join(needed)}")
    try:
        report["versions"]["triton"] = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        report["versions"]["triton"] = "not installed"
    report["machine"] = cpu() | gpus(torch)
    report["compilers"] = tools(torch.version.cuda if torch is not None else None)
    if usable:
        try:
            report["extension"], report["kernels"] = backends(torch)
        except OSError as error:
            problems.append(str(error))
    if torch is not None:
        report["distributed"] = distributed(torch)
    report["disk"], full = disk()
    problems += [full] if full else []
    report["not installed"] = absent
    if with_trial and not problems:
        said, wrong = trial()
        report["trial"] = {"two updates": said or f"failed: {wrong}"}
        if wrong:
            problems.append(f"a tiny model does not train: {wrong}")
    return report | {"problems": problems}


def page(report: dict[str, Any]) -> str:
    lines = []
    for section, entries in report.items():
        if section == "problems" or not entries:
            continue
        lines.append(section)
        width = max((len(name) for name in entries if len(name) <= 20), default=0)
        lines += [f"  {name:<{width}}  {text}" for name, text in entries.items()]
    problems = report["problems"]
    verdict = f"training would not work here: {problems[0]}" if problems else "training works here"
    return "\n".join([*lines, "", verdict])


def main(config: DoctorConfig) -> int:
    report = examine(config.trial)
    print(json.dumps(report, indent=1) if config.json else page(report))
    return 1 if report["problems"] else 0


if __name__ == "__main__":
    raise SystemExit(main(parse(DoctorConfig, presets=None, prog="doctor")))
