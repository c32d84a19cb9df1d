"""Where a step's device time goes: the kernels of a torch.profiler trace, summed by component of the model.

Each kernel is placed by its own name, by the operators it was launched in, and by the innermost one's shapes, which tell the
head's matmuls (one side is the vocabulary) from those of the blocks. What is left of the measured step is gaps.
"""

import gzip
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

# First match wins, on "kernel | operator | the one around it | ...", lower case. Attention comes first: its kernels are built
# on cutlass as well; fused kernels of torch.compile carry the names of all they do, and go to the costliest.
RULES = (
    ("attention", r"flash|fmha|attention|attn|sdpa"),
    ("optimizer", r"adam|multi_tensor|lpnorm|grad_norm|_foreach"),
    (
        "GEMM",
        r"gemm|cutlass|nvjet|xmma|cublas|splitk|gemv|aten::(add)?mm\b|_(fwd|bwd)_kernel \| nanogpt::gelu_mlp",
    ),  # ours: GELU in a GEMM
    ("cross-entropy", r"cross_entropy|log_softmax|nll_loss|logits|_ce_|logsumexp"),
    ("GELU", r"gelu"),
    ("LayerNorm", r"layer_?norm|_ln_"),
    ("embedding", r"embedding|index_put|gather"),
)
COMPONENTS = ("block GEMMs", "head GEMMs", "attention", "LayerNorm", "GELU", "cross-entropy", "embedding", "optimizer", "other")


def component(kernel: str, operators: str, dims: Iterable, vocabulary: int) -> str:
    """The component of one kernel; operators from the innermost outwards, dims the shapes of that one's inputs."""
    text = f"{kernel} | {operators}".lower()
    name = next((name for name, pattern in RULES if re.search(pattern, text)), "other")
    if name != "GEMM":
        return name
    return "head GEMMs" if any(n == vocabulary for shape in dims for n in shape if isinstance(n, int)) else "block GEMMs"


def nesting(operators: list[dict]) -> dict[int, str]:
    """External id -> names of an operator and those around it, by thread and time."""
    names: dict[int, str] = {}
    around: dict[int, list[dict]] = defaultdict(list)
    for op in sorted(operators, key=lambda e: (e["ts"], -e["dur"])):
        stack = around[op.get("tid", 0)]
        while stack and stack[-1]["ts"] + stack[-1]["dur"] <= op["ts"]:
            stack.pop()
        stack.append(op)
        names[op["args"].get("External id")] = " | ".join(e["name"] for e in reversed(stack))
    return names


def read_trace(path: Path, steps: int, vocabulary: int) -> tuple[dict[str, float], list[tuple[float, str, str]]]:
    """Device ms a step by component, and of each kernel: (ms a step, component, name), costliest first."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        events = [e for e in json.load(file)["traceEvents"] if e.get("ph") == "X"]
    operators = [e for e in events if e.get("cat") == "cpu_op"]
    names = nesting(operators)
    shapes = {e["args"].get("External id"): e["args"].get("Input Dims", []) for e in operators}
    total: Counter[str] = Counter()
    kernels: Counter[tuple[str, str]] = Counter()
    for event in events:
        if event.get("cat") not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        launch = event["args"].get("External id")
        dims = [d for d in shapes.get(launch, []) if isinstance(d, list)]
        where = component(event["name"], names.get(launch, ""), dims, vocabulary)
        total[where] += event["dur"] / 1e3 / steps
        kernels[where, event["name"]] += event["dur"] / 1e3 / steps
    return {c: total[c] for c in COMPONENTS}, [(ms, where, name) for (where, name), ms in kernels.most_common()]


def profile(step: Callable[[], object], steps: int, path: Path) -> Path:
    """Runs the step a few times under the profiler and writes a Chrome trace."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, record_shapes=True) as trace:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    trace.export_chrome_trace(str(path))
    return path
