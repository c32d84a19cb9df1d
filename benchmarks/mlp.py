"""The MLP, y = gelu(x W_fc^T) W_proj^T, forward and backward: GELU in the GEMMs' epilogues or in a kernel of its own.

Cases named `tanh-bias` are OpenAI's GPT-2: GELU's tanh form, and biases. cuBLASLt's epilogues (`ours-cuda`) do these only.

    python benchmarks/mlp.py [--quick] [--plot]

Providers: ours through each backend (Triton or the CPU extension, the PyTorch reference), plain PyTorch, and
torch.compile. 16 M C^2 FLOPs forward, twice that backward.
"""

import warnings

import common
import torch
import torch.nn.functional as F
from common import Work, backend

from kernels.mlp import gelu_mlp


def reference(x, w_fc, w_proj):
    return F.linear(F.gelu(F.linear(x, w_fc.to(x.dtype))), w_proj.to(x.dtype))


def reference_gpt2(x, w_fc, b_fc, w_proj, b_proj):
    w_fc, b_fc, w_proj, b_proj = (p.to(x.dtype) for p in (w_fc, b_fc, w_proj, b_proj))
    return F.linear(F.gelu(F.linear(x, w_fc, b_fc), approximate="tanh"), w_proj, b_proj)


def ours(x, w_fc, w_proj):
    return gelu_mlp(x, w_fc, None, w_proj, None)


def ours_gpt2(x, w_fc, b_fc, w_proj, b_proj):
    return gelu_mlp(x, w_fc, b_fc, w_proj, b_proj, "tanh")


def main(argv: list[str] | None = None) -> common.Bench:
    args = common.parser(__doc__).parse_args(argv)
    bench = common.Bench("mlp", args)
    warnings.filterwarnings("error", "gelu_mlp: ", RuntimeWarning)  # another backend ran: a failure, not a time
    shapes = [(65536, 768), (32768, 1024), (16384, 1280), (8192, 1600), (1024, 768)]
    if args.tiny:
        shapes = [(32, 64)]
    elif not bench.gpu:
        shapes = [(1024, 384)]
    elif args.quick:
        shapes = shapes[:2]
    backends = ("triton", "torch") if bench.gpu else ("cpp", "torch")
    for gpt2, (M, C) in [*((False, shape) for shape in shapes), *((True, shape) for shape in shapes[:1])]:
        plain, function = (reference_gpt2, ours_gpt2) if gpt2 else (reference, ours)
        chosen = ("cuda", *backends) if gpt2 and bench.gpu else backends
        providers = {f"ours-{name}": backend(name, function) for name in chosen}
        providers |= {"torch": plain, "compile": torch.compile(plain, dynamic=False)}
        x = torch.randn(M, C, device=bench.device, dtype=bench.dtype)
        parameters = [
            torch.randn(4 * C, C, device=bench.device) * C**-0.5,
            torch.randn(C, 4 * C, device=bench.device) * (4 * C) ** -0.5,
        ]
        if gpt2:
            parameters[1:1] = [torch.randn(4 * C, device=bench.device)]
            parameters += [torch.randn(C, device=bench.device)]
        inputs = [t.requires_grad_() for t in (x, *parameters)]
        flops = 16 * M * C * C
        case = f"M{M}-C{C}{'-tanh-bias' if gpt2 else ''}"
        bench.compare(case, providers, plain, inputs, {"fwd": Work(flops), "bwd": Work(2 * flops)})
    bench.finish()
    return bench


if __name__ == "__main__":
    main()
