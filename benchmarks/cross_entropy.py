"""The language-model head with its loss, in time and memory, and the row kernel alone.

    python benchmarks/cross_entropy.py [--quick] [--plot]       # peers: pip install liger-kernel quack-kernels

Cases `head-...` time linear + cross-entropy, loss and both gradients: 6 M C V FLOPs; a provider that keeps all M x V logits
shows in peak_mib. Cases `rows-...` time what comes between the GEMMs: M x V logits in, their losses and gradients out, with one
read and one write of the logits as the least traffic.
"""

import importlib.util

import common
import torch
import torch.nn as nn
import torch.nn.functional as F
from common import Own, Work
from torch import Tensor

from kernels.cross_entropy import linear_cross_entropy

CHUNK = 4096  # rows of the reference at a time


def plain(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(x, weight.to(x.dtype))
    return F.cross_entropy(logits.to(torch.promote_types(x.dtype, torch.float32)), targets, ignore_index=-1)


def reference(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return sum(plain(*part) * len(part[0]) for part in parts(x, weight, targets)) / len(x)


def parts(x, weight, targets):
    return [(x[i : i + CHUNK], weight, targets[i : i + CHUNK]) for i in range(0, len(x), CHUNK)]


def solve(inputs, dy) -> list[Tensor]:
    """[loss, dx, dW], chunk by chunk; dW summed in fp32."""
    x, weight, targets = inputs
    loss, dx, dw = 0.0, torch.empty_like(x), torch.zeros_like(weight)
    for i, (x_part, _, t_part) in enumerate(parts(x.detach(), weight, targets)):
        leaves = [x_part.clone().requires_grad_(), weight, t_part]
        share = len(x_part) / len(x)
        part_loss, part_dx, part_dw = common.evaluate(plain, leaves, [dy[0] * share], True)
        loss = loss + part_loss * share
        dx[i * CHUNK : i * CHUNK + len(x_part)] = part_dx
        dw += part_dw
    return [loss, dx, dw]


def liger(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    # By default it sums dW over chunks in bf16, which does not pass the check.
    return liger_fused_linear_cross_entropy(x, weight.to(x.dtype), targets, ignore_index=-1, accum_dtype=torch.float32)


def quack(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(x, weight.to(x.dtype), targets, ignore_index=-1)


def cut_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(x, weight.to(x.dtype), targets, ignore_index=-1)


# Where they are installed, or on PYTHONPATH. APIs as of liger-kernel 0.8.5 and quack-kernels 0.6.5; the latter's import fails
# unless it and nvidia-cutlass-dsl lie in a folder named site-packages.
PEERS = {"liger_kernel": liger, "quack": quack, "cut_cross_entropy": cut_cross_entropy}


def head_providers() -> dict:
    made = {"ours": linear_cross_entropy, "torch": plain, "compile": torch.compile(plain, dynamic=False)}
    if hasattr(nn, "LinearCrossEntropyOptions"):
        options = nn.LinearCrossEntropyOptions()
        made["torch-chunked"] = lambda x, w, t: F.linear_cross_entropy(x, w.to(x.dtype), t, ignore_index=-1, options=options)
    return made | {peer.__name__.replace("_", "-"): peer for module, peer in PEERS.items() if importlib.util.find_spec(module)}


def rows_reference(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of each row, and softmax - onehot in the logits' dtype."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    lse = torch.logsumexp(wide, dim=1, keepdim=True)
    gradient = torch.exp(wide - lse)
    columns = torch.arange(logits.shape[1], device=logits.device)
    gradient = gradient - (columns == targets[:, None]).to(wide.dtype)
    return (lse - wide.gather(1, targets[:, None]))[:, 0], gradient.to(logits.dtype)


def rows_ours(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """In place: the logits become their gradient."""
    return torch.ops.nanogpt.cross_entropy_fwd_(logits, targets, -1, logits.shape[1], True), logits


def main(argv: list[str] | None = None) -> common.Bench:
    args = common.parser(__doc__).parse_args(argv)
    bench = common.Bench("cross_entropy", args)
    shapes = [(65536, 768, 50304), (32768, 1024, 50304), (8192, 1600, 50304)]
    if args.tiny:
        shapes = [(64, 32, 256)]
    elif not bench.gpu:
        shapes = [(1024, 128, 4096)]
    elif args.quick:
        shapes = shapes[:1]
    for M, C, V in shapes:
        x = torch.randn(M, C, device=bench.device, dtype=bench.dtype).requires_grad_()
        weight = (torch.randn(V, C, device=bench.device) * C**-0.5).requires_grad_()
        targets = torch.randint(V, (M,), device=bench.device)
        work = {"both": Work(flops=6 * M * C * V)}
        bench.compare(f"head-M{M}-C{C}-V{V}", head_providers(), reference, [x, weight, targets], work, solve)
    rows, V = (64, 256) if args.tiny else (8192, 50304) if bench.gpu else (512, 4096)
    logits = 3 * torch.randn(rows, V, device=bench.device, dtype=bench.dtype)
    targets = torch.randint(V, (rows,), device=bench.device)
    providers = {"torch": rows_reference, "compile": torch.compile(rows_reference, dynamic=False)}
    if bench.gpu:
        providers["ours"] = Own(rows_ours, lambda inputs: [inputs[0].clone(), inputs[1]])
    least = Work(bytes=2 * logits.numel() * logits.element_size())
    bench.compare(f"rows-M{rows}-V{V}", providers, rows_reference, [logits, targets], {"fwd": least})
    bench.finish()
    return bench


if __name__ == "__main__":
    main()
