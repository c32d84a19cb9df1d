"""Machines without Triton (macOS, Windows): everything imports, and a model trains on the PyTorch references."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

TRAIN = """
import sys

sys.modules["triton"] = None  # `import triton` fails

import importlib
import pkgutil

import torch

import kernels
from kernels import dispatch
from nanogpt.config import GPTConfig
from nanogpt.model import GPT
from nanogpt.optim import AdamW

for module in pkgutil.iter_modules(kernels.__path__, "kernels."):
    if not module.name.startswith("kernels.nanogpt_"):  # the compiled extension: loaded by torch, not imported
        importlib.import_module(module.name)

for op, (backend, reason) in dispatch.explain("cpu").items():
    print(op, backend, reason, sep=": ")
dispatch.use("torch")
model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=8, dropout=0.1), dtype=torch.float32)
optimizer = AdamW(model.decay_groups(), lr=1e-2)
idx = torch.randint(11, (4, 9), generator=torch.Generator().manual_seed(1))
losses = []
for _ in range(30):
    _, loss = model(idx[:, :-1], idx[:, 1:])
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < losses[0] - 0.3, losses
try:
    dispatch.use("triton")
    dispatch.choose("attention", "cpu")
except ValueError as error:
    print(error)
"""


def run(code: str, path: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=path, env={"PYTHONPATH": f"{path}:{ROOT}"}, capture_output=True, text=True
    )


def test_model_trains_without_triton():
    done = run(TRAIN)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    for op in ("attention", "layer_norm", "gelu_mlp", "cross_entropy", "embedding"):
        (line,) = (line for line in said if line.startswith(f"{op}: "))
        assert "no triton: Triton is not installed" in line
    assert said[-1] == "kernels=triton: attention on cpu: Triton is not installed"


def test_a_broken_triton_is_not_taken_for_an_absent_one(tmp_path):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("import no_such_part_of_triton")
    done = run("import kernels.triton_compat", tmp_path)
    assert done.returncode == 1
    assert "No module named 'no_such_part_of_triton'" in done.stderr
