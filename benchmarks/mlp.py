"""The MLP, y = gelu(x W_fc^T) W_proj^T, forward and backward: GELU in the GEMMs' epilogues or in a kernel of its own.

    python benchmarks/mlp.py [--quick] [--plot]

Providers: ours through each backend (Triton or the CPU extension, the PyTorch reference), plain PyTorch, and
torch.compile. 16 M C^2 FLOPs forward, twice that backward.
"""

import common
import torch
import torch.nn.functional as F
from common import Work, backend

from kernels.mlp import gelu_mlp


def reference(x, w_fc, w_proj):
    return F.linear(F.gelu(F.linear(x, w_fc.to(x.dtype))), w_proj.to(x.dtype))


def ours(x, w_fc, w_proj):
    return gelu_mlp(x, w_fc, None, w_proj, None)


def main(argv: list[str] | None = None) -> common.Bench:
    args = common.parser(__doc__).parse_args(argv)
    bench = common.Bench("mlp", args)
    shapes = [(65536, 768), (32768, 1024), (16384, 1280), (8192, 1600), (1024, 768)]
    if args.tiny:
        shapes = [(32, 64)]
    elif not bench.gpu:
        shapes = [(1024, 384)]
    elif args.quick:
        shapes = shapes[:2]
    backends = ("triton", "torch") if bench.gpu else ("cpp", "torch")
    providers = {f"ours-{name}": backend(name, ours) for name in backends}
    providers |= {"torch": reference, "compile": torch.compile(reference, dynamic=False)}
    for M, C in shapes:
        x = torch.randn(M, C, device=bench.device, dtype=bench.dtype).requires_grad_()
        w_fc = (torch.randn(4 * C, C, device=bench.device) * C**-0.5).requires_grad_()
        w_proj = (torch.randn(C, 4 * C, device=bench.device) * (4 * C) ** -0.5).requires_grad_()
        flops = 16 * M * C * C
        bench.compare(f"M{M}-C{C}", providers, reference, [x, w_fc, w_proj], {"fwd": Work(flops), "bwd": Work(2 * flops)})
    bench.finish()
    return bench


if __name__ == "__main__":
    main()
