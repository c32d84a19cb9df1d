"""Causal self-attention, forward and backward, beside PyTorch's four SDPA backends, FlexAttention and flash-attn.

    python benchmarks/attention.py [--quick] [--providers ours,cudnn,flash] [--dtype fp16] [--plot]

TFLOP/s count the causal half: 2 B H T^2 D forward, 2.5 times that backward. Ours reads packed qkv (B, T, 3C) and writes one
packed gradient; the peers get q, k and v as separate leaves, so that they do not pay for a concatenation.
"""

import functools
import importlib.util

import common
import torch
import torch.nn.functional as F
from common import Own, Work
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.attention import causal_attention

SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def reference(qkv: Tensor, H: int) -> Tensor:
    """Textbook attention, as many heads at a time as keep the (T, T) scores under 1 GiB in fp32."""
    B, T, C3 = qkv.shape
    q, k, v = qkv.view(B, T, 3, H, -1).permute(2, 0, 3, 1, 4).reshape(3, B * H, T, -1).unbind(0)
    mask = torch.ones(T, T, dtype=torch.bool, device=qkv.device).triu(1)
    heads = max(1, 2**28 // T**2)
    parts = []
    for i in range(0, B * H, heads):
        scores = q[i : i + heads] @ k[i : i + heads].transpose(1, 2) * q.shape[-1] ** -0.5
        parts.append(scores.masked_fill(mask, float("-inf")).softmax(-1) @ v[i : i + heads])
    return torch.cat(parts).view(B, H, T, -1).transpose(1, 2).reshape(B, T, C3 // 3)


def solve(qkv: Tensor, dy: Tensor, H: int) -> list[Tensor]:
    """[output, gradient] of the reference, one batch element at a time."""
    results = []
    for b in range(qkv.shape[0]):
        leaf = qkv[b : b + 1].detach().requires_grad_()
        results.append(common.evaluate(lambda x: reference(x, H), [leaf], [dy[b : b + 1]], True))
    return [torch.cat(parts) for parts in zip(*results)]


def separate(function, H: int) -> Own:
    """A peer on q, k, v (B, H, T, D), strided in the packed tensor as a model has them."""

    def prepare(inputs):
        B, T, _ = inputs[0].shape
        parts = inputs[0].detach().view(B, T, 3, H, -1).unbind(2)
        return [x.transpose(1, 2).requires_grad_() for x in parts]

    def call(q, k, v):
        return function(q, k, v).transpose(1, 2).flatten(2)  # (B, T, C)

    def collect(got):
        y, *grads = got
        return [y, torch.cat([g.transpose(1, 2).flatten(2) for g in grads], dim=2)]

    return Own(call, prepare, collect)


def sdpa(choice: SDPBackend):
    def call(q, k, v):
        with sdpa_kernel(choice):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return call


@functools.cache
def flex(T: int, device: str):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device=device)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask)


def providers(H: int, T: int, device: str) -> dict:
    made = {"ours": lambda qkv: causal_attention(qkv, H)}
    names = SDPA if device.startswith("cuda") else ("flash", "math")
    made |= {name: separate(sdpa(SDPA[name]), H) for name in names}
    if device.startswith("cuda"):
        made["flex"] = separate(lambda q, k, v: flex(T, device)(q, k, v), H)
        if importlib.util.find_spec("flash_attn"):
            from flash_attn import flash_attn_qkvpacked_func

            made["flash-attn"] = lambda qkv: flash_attn_qkvpacked_func(qkv.view(*qkv.shape[:2], 3, H, -1), causal=True).flatten(
                2
            )
    return made


def main(argv: list[str] | None = None) -> common.Bench:
    args = common.parser(__doc__).parse_args(argv)
    bench = common.Bench("attention", args)
    shapes = [(H, D, T) for H, D in ((12, 64), (8, 128)) for T in (128, 256, 512, 1024, 2048, 4096, 8192, 16384)]
    tokens = 16384 if bench.gpu else 1024
    if args.tiny:
        shapes, tokens = [(2, 16, 32)], 64
    elif args.quick:
        shapes = [(12, 64, 1024), (12, 64, 4096), (8, 128, 1024)] if bench.gpu else [(12, 64, 256)]
    elif not bench.gpu:
        shapes = [s for s in shapes if s[2] <= 1024]
    for H, D, T in shapes:
        B, C = max(1, tokens // T), H * D
        qkv = torch.randn(B, T, 3 * C, device=bench.device, dtype=bench.dtype).requires_grad_()
        flops, size = 2 * B * H * T * T * D, B * T * C * qkv.element_size()
        bench.compare(
            f"B{B}-H{H}-T{T}-D{D}",
            providers(H, T, bench.device),
            lambda x, H=H: reference(x, H),
            [qkv],
            {"fwd": Work(flops, 4 * size), "bwd": Work(2.5 * flops, 8 * size)},
            solve=lambda inputs, dy, H=H: solve(inputs[0], dy[0], H),
        )
    bench.finish()
    return bench


if __name__ == "__main__":
    main()
