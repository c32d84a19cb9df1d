"""Residual addition and LayerNorm, forward and backward, beside PyTorch eager and compiled.

    python benchmarks/layernorm.py [--quick] [--plot]

Least traffic, in elements of (M, C): forward reads x and the residual, writes y and the new residual; backward reads dy, the
gradient of the new residual and the new residual, and writes one gradient, which is that of both x and the residual.
"""

import common
import torch
import torch.nn.functional as F
from common import Work

from kernels.layernorm import layer_norm_residual


def reference(x, residual, weight, bias):
    total = residual + x
    return F.layer_norm(total, weight.shape, weight.to(x.dtype), bias.to(x.dtype), 1e-5), total


def main(argv: list[str] | None = None) -> common.Bench:
    args = common.parser(__doc__).parse_args(argv)
    bench = common.Bench("layernorm", args)
    shapes = [(65536, 768), (32768, 1024), (16384, 1280), (8192, 1600), (65536, 384)]
    if args.tiny:
        shapes = [(32, 64)]
    elif not bench.gpu:
        shapes = [(4096, 384), (4096, 768)]
    elif args.quick:
        shapes = shapes[:2]
    for M, C in shapes:
        x, residual = (torch.randn(M, C, device=bench.device, dtype=bench.dtype).requires_grad_() for _ in range(2))
        weight, bias = (torch.randn(C, device=bench.device).requires_grad_() for _ in range(2))
        work = Work(bytes=4 * M * C * x.element_size())
        bench.compare(
            f"M{M}-C{C}",
            {"ours": layer_norm_residual, "torch": reference, "compile": torch.compile(reference, dynamic=False)},
            reference,
            [x, residual, weight, bias],
            {"fwd": work, "bwd": work},
        )
    bench.finish()
    return bench


if __name__ == "__main__":
    main()
