"""Token and position embedding, forward and backward, beside PyTorch eager and compiled.

    python benchmarks/embedding.py [--quick] [--plot]

Least traffic: forward reads M rows of wte in fp32 and writes the result; backward reads dy and writes both gradients, the whole
(V, C) of wte's in fp32. Tokens follow Zipf's law, as text does: frequent ones are what makes a scatter slow.
"""

import common
import torch
import torch.nn.functional as F
from common import Work

from kernels.embedding import embedding


def plain(idx, wte, wpe, dtype):
    return (F.embedding(idx, wte) + wpe[: idx.shape[1]]).to(dtype)


def solver(dtype: torch.dtype):
    """Output and gradients of :func:`plain`; where dy is wider than dtype, summed in fp64: a frequent token has many rows."""

    def solve(inputs, dy):
        if dy[0].dtype == dtype:
            return common.evaluate(lambda *a: plain(*a, dtype), inputs, dy, True)
        idx, wte, wpe = inputs
        wide = dy[0].double()
        dwte = torch.zeros_like(wte, dtype=torch.float64).index_add_(0, idx.flatten(), wide.flatten(0, 1))
        dwpe = torch.zeros_like(wpe, dtype=torch.float64)
        dwpe[: idx.shape[1]] = wide.sum(0)
        return [wte[idx] + wpe[: idx.shape[1]], dwte, dwpe]

    return solve


def main(argv: list[str] | None = None) -> common.Bench:
    args = common.parser(__doc__).parse_args(argv)
    bench = common.Bench("embedding", args)
    shapes = [(64, 1024, 768, 50304), (32, 1024, 1024, 50304), (8, 1024, 1600, 50304)]
    if args.tiny:
        shapes = [(2, 16, 32, 64)]
    elif not bench.gpu:
        shapes = [(16, 256, 384, 4096)]
    elif args.quick:
        shapes = shapes[:1]
    for B, T, C, V in shapes:
        rank = torch.arange(1, V + 1, dtype=torch.float)
        idx = torch.multinomial(1 / rank, B * T, replacement=True).view(B, T).to(bench.device)
        wte = torch.randn(V, C, device=bench.device).requires_grad_()
        wpe = torch.randn(T, C, device=bench.device).requires_grad_()

        def reference(idx, wte, wpe):
            return plain(idx, wte, wpe, bench.dtype)

        size = B * T * C * torch.tensor([], dtype=bench.dtype).element_size()
        bench.compare(
            f"B{B}-T{T}-C{C}-V{V}",
            {
                "ours": lambda idx, wte, wpe: embedding(idx, wte, wpe, bench.dtype),
                "torch": reference,
                "compile": torch.compile(reference, dynamic=False),
            },
            reference,
            [idx, wte, wpe],
            {"fwd": Work(bytes=4 * B * T * C + size), "bwd": Work(bytes=size + 4 * (V + T) * C)},
            solver(bench.dtype),
        )
    bench.finish()
    return bench


if __name__ == "__main__":
    main()
