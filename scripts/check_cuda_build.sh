#!/usr/bin/env bash
# Shows on a machine without a GPU that the CUDA extension builds, links, loads and answers fake tensors: bash scripts/check_cuda_build.sh
# Needs nvcc. Makes .venv-cuda with a CUDA build of PyTorch (some GB), or takes the one that CUDA_VENV names. Builds in a copy
# of the sources, so that the checkout keeps its own libraries. Not part of CI, which has no use for the download.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${CUDA_VENV:-.venv-cuda}
if [ ! -x "$venv/bin/python" ]; then
    "${PYTHON:-python3}" -m venv "$venv"
fi
if ! "$venv/bin/python" -c 'import ninja, numpy, setuptools, torch' 2>/dev/null; then
    "$venv/bin/python" -m pip install --quiet 'torch>=2.11' numpy ninja 'setuptools>=77'
fi
python=$(realpath --no-symlinks "$venv/bin/python")

copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r csrc setup.py pyproject.toml "$copy"
mkdir "$copy/kernels" "$copy/nanogpt"
cp kernels/*.py kernels/*.json "$copy/kernels"
cd "$copy"

PATH="$(dirname "$python"):$PATH" BUILD_CUDA=1 CXXFLAGS=-Werror "$python" setup.py build_ext --inplace
"$python" - <<'END'
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import dispatch, extension, mlp

print(f"PyTorch {torch.__version__}, CUDA {torch.version.cuda}: {extension.status()}")
missing = extension.unavailable("adamw", "cuda") or extension.unavailable("gelu_mlp", "cuda")
if missing:
    raise SystemExit(missing)
for op in ("adamw_", "grad_norm", "cross_entropy_rows_", "linear_gelu_", "linear_dgelu_"):
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"nanogpt::{op}", "CUDA"):
        raise SystemExit(f"nanogpt::{op} has no CUDA kernel")
with FakeTensorMode():
    p, g, m, v, lr, step, losses = (torch.empty(s, device="cuda") for s in [(3, 5)] * 4 + [()] * 2 + [(4,)])
    norm = torch.ops.nanogpt.grad_norm([g])
    torch.ops.nanogpt.adamw_([p], [g], [m], [v], [], lr, step, [0.1], 0.9, 0.95, 1e-8, norm, 1.0, None, True)
    logits = torch.empty(4, 96, device="cuda", dtype=torch.bfloat16)
    targets = torch.empty(4, device="cuda", dtype=torch.int64)
    torch.ops.nanogpt.cross_entropy_rows_(logits, targets, losses, -1, 90, True)
    if norm.device.type != "cuda" or norm.shape != ():
        raise SystemExit(f"grad_norm of fake CUDA tensors: {norm}")
    x, post, pre = (torch.empty(s, device="cuda", dtype=torch.bfloat16) for s in [(6, 16), (6, 32), (6, 32)])
    w_fc, b_fc, w_proj = (torch.empty(s, device="cuda", dtype=torch.bfloat16) for s in [(32, 16), (32,), (16, 32)])
    torch.ops.nanogpt.linear_gelu_(x, w_fc, b_fc, post, pre)
    torch.ops.nanogpt.linear_dgelu_(x, w_proj, pre, post, b_fc)
    parameters = w_fc, b_fc, w_proj, None
    y, post, pre = mlp._mlp_fwd(x, *parameters, True, True, True)
    grads = mlp._mlp_bwd(torch.empty_like(y), x, post, pre, w_fc, w_proj, True, False, True)
    if [g.shape for g in grads] != [(6, 16), (32, 16), (32,), (16, 32), (0,)]:
        raise SystemExit(f"the MLP on cuBLASLt, of fake CUDA tensors: {grads}")
dispatch.use("cuda")
if dispatch.choose("gelu_mlp", "cuda") != "cuda":
    raise SystemExit("gelu_mlp does not take the cuda backend")
print("the CUDA extension builds, links, loads and answers fake tensors")
END
