"""Every kernel once, forward and backward on small and odd shapes, under compute-sanitizer: memcheck and racecheck.

    python scripts/sanitize_gpu.py [--tools memcheck,racecheck]

The cases run without a sanitizer first, which fills Triton's cache, then under all tools at once. PyTorch's memory cache is
off, so that each tensor is an allocation with bounds of its own; kernels of PyTorch and cuBLAS are not checked. Exit code 1:
a tool found something, or a case failed; 2: no compute-sanitizer. B, T, C, H, D, V, M as in the kernels.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("memcheck", "racecheck")
FOREIGN = "at6native|cublas|cutlass|gemm|nvjet|splitK|xmma|3cub"  # in mangled names
OPTIONS = ["--target-processes", "application-only", "--launch-timeout", "60", "--error-exitcode", "1", "--print-limit", "20"]
OPTIONS += ["--show-backtrace", "device", "--report-api-errors", "no", "--kernel-name-exclude", f"regex={FOREIGN}"]


def find_sanitizer() -> str:
    """The path of compute-sanitizer, or empty: on PATH, in a CUDA toolkit, in the wheel nvidia-cuda-sanitizer-api."""
    homes = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")), Path("/usr/local/cuda")]
    found = [home / folder / "compute-sanitizer" for home in homes for folder in ("bin", "compute-sanitizer")]
    found += [path for folder in sys.path for path in Path(folder or ".").glob("nvidia/*/bin/compute-sanitizer")]
    return shutil.which("compute-sanitizer") or next((str(path) for path in found if os.access(path, os.X_OK)), "")


def cases(device: str) -> dict[str, tuple[str, Callable]]:
    """Name -> (backend, function that returns the outputs to go backward from, or nothing)."""
    import torch
    from torch import Tensor

    from kernels.attention import causal_attention
    from kernels.cross_entropy import linear_cross_entropy
    from kernels.decode import decode_attention
    from kernels.embedding import embedding
    from kernels.layernorm import layer_norm, layer_norm_residual
    from kernels.linear import linear
    from kernels.mlp import gelu_mlp
    from kernels.optimizer import adamw_step, grad_norm

    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype).requires_grad_()

    def attention(T: int, H: int, D: int, dropout: float = 0.0):
        return lambda: causal_attention(leaf(2, T, 3 * H * D, dtype=dtype), H, dropout)

    def decode():
        lengths = torch.tensor([1, 77], dtype=torch.int32, device=device)
        with torch.no_grad():
            decode_attention(leaf(2, 128, dtype=dtype), *(leaf(2, 2, 80, 64, dtype=dtype) for _ in "kv"), lengths)

    def mlp(C: int, approximate: str, bias: bool):
        b_fc, b_proj = (leaf(4 * C), leaf(C)) if bias else (None, None)
        w_fc, w_proj = leaf(4 * C, C), leaf(C, 4 * C)
        return lambda: gelu_mlp(leaf(77, C, dtype=dtype), w_fc, b_fc, w_proj, b_proj, approximate)

    def head(V: int, vocab_size: int):
        targets = torch.randint(vocab_size, (77,), device=device)
        targets[3] = -1
        return lambda: linear_cross_entropy(
            leaf(77, 64, dtype=dtype), leaf(V, 64), targets, vocab_size=vocab_size, chunk_rows=32
        )

    def tokens():
        return torch.randint(0, 9, (3, 50), device=device)  # each of them often: sums cross the borders of programs

    @torch.no_grad()
    def optimizer():
        params, grads, m, v = ([torch.randn(n, device=device).abs() for n in (1, 1003, 4096)] for _ in range(4))
        lr, step = torch.full((), 1e-3, device=device), torch.zeros((), device=device)
        rest = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decays": [0.1] * 3, "max_norm": 1.0}
        adamw_step(params, grads, m, v, lr=lr, step=step, norm=grad_norm(grads), **rest)

    return {
        "attention, D=64, T=128": ("triton", attention(128, 2, 64)),  # Gluon on sm_90
        "attention, D=64, T=100": ("triton", attention(100, 2, 64)),
        "attention, D=128": ("triton", attention(130, 1, 128)),
        "attention, D=32, dropout": ("triton", attention(77, 2, 32, 0.2)),
        "decode": ("triton", decode),
        "embedding": ("triton", lambda: embedding(tokens(), leaf(300, 100), leaf(64, 100), dtype, 0.2)),
        "LayerNorm": ("triton", lambda: layer_norm(leaf(77, 100, dtype=dtype), leaf(100), leaf(100))),
        "LayerNorm + residual": (
            "triton",
            lambda: layer_norm_residual(leaf(77, 768, dtype=dtype), leaf(77, 768, dtype=dtype), leaf(768), None, dropout_p=0.2),
        ),
        "GELU-MLP, erf": ("triton", mlp(96, "none", False)),
        "GELU-MLP, tanh, bias": ("triton", mlp(96, "tanh", True)),
        "GELU-MLP, not fused": ("triton", mlp(104, "tanh", True)),  # the fused kernels take multiples of 16
        "GELU-MLP, cuBLASLt": ("cuda", mlp(96, "tanh", True)),
        "linear": ("triton", lambda: linear(leaf(77, 104, dtype=dtype), leaf(72, 104), leaf(72))),
        "cross-entropy, Triton": ("triton", head(1000, 997)),
        "cross-entropy, CUDA": ("cuda", head(1000, 997)),
        "cross-entropy, CUDA, V=50304": ("cuda", head(50304, 50257)),
        "AdamW, gradient norm": ("cuda", optimizer),
    }


def run(device: str, under: str) -> int:
    """Runs the cases, in the process that a sanitizer watches; each line begins with the name of what it runs under."""
    import torch

    from kernels import dispatch

    failed = 0
    for name, (backend, forward) in cases(device).items():
        dispatch.use(backend if device == "cuda" else "auto")
        try:
            y = forward()
            if y is not None:
                ys = [y] if isinstance(y, torch.Tensor) else list(y)
                torch.autograd.backward(ys, [torch.randn_like(z) for z in ys])
            if device == "cuda":
                torch.cuda.synchronize()
            print(f"{under}: ran {name}", flush=True)
        except Exception as error:  # the other cases go on
            print(f"{under}: failed: {name}: {type(error).__name__}: {error}", flush=True)
            failed += 1
    return int(failed > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", default=",".join(TOOLS), help="of compute-sanitizer, separated by commas")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: to try the cases themselves")
    parser.add_argument("--run", metavar="NAME", help="internal: the cases alone, in this process, which goes by NAME")
    args = parser.parse_args()
    if args.run:
        return run(args.device, args.run)
    tools, sanitizer = args.tools.split(","), find_sanitizer()
    if not sanitizer:
        where = "PATH, in CUDA_HOME, or from pip install nvidia-cuda-sanitizer-api"
        print(f"sanitize_gpu.py: no compute-sanitizer on {where}", file=sys.stderr)
        return 2
    environment = os.environ | {
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
    }
    command = [sys.executable, __file__, "--device", args.device, "--run"]
    if subprocess.run([*command, "plain"], env=environment).returncode:
        return 1
    running = []
    for i, tool in enumerate(tools):
        own = ["--tool", tool, "--prefix", f"== {tool}", "--port", str(49152 + 10 * i)]
        running.append(subprocess.Popen([sanitizer, *own, *OPTIONS, *command, tool], env=environment))
    codes = {tool: process.wait() for tool, process in zip(tools, running)}
    for tool, code in codes.items():
        print(f"{tool}: {f'exit code {code}' if code else 'nothing found'}", flush=True)
    return int(any(codes.values()))


if __name__ == "__main__":
    raise SystemExit(main())
