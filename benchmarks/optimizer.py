"""Gradient clipping and AdamW over all parameters of a GPT-2, beside PyTorch's fused and foreach AdamW.

    python benchmarks/optimizer.py [--quick] [--plot]

A provider does the whole of it: norm, clipping, update; ours also writes the 16-bit shadows and zeroes the gradients, which it
is given no credit for. Least traffic per parameter: the norm reads 4 bytes, the update reads 16 and writes 12. Before timing,
parameters after three updates must be as close to fp64 as those of PyTorch's single-tensor AdamW in fp32, within three times.
"""

import common
import torch
from common import Work, backend
from torch import Tensor

from kernels.linear import shadow
from kernels.optimizer import adamw_step, grad_norm

LR, BETAS, EPS, DECAY, MAX_NORM = 6e-4, (0.9, 0.95), 1e-8, 0.1, 1.0
MODELS = {
    "124M": (12, 768, 50304),
    "350M": (24, 1024, 50304),
    "1558M": (48, 1600, 50304),
    "char": (6, 384, 128),
    "tiny": (1, 32, 64),
}


def shapes(n_layer: int, C: int, V: int) -> list[tuple[int, ...]]:
    """Parameter shapes of a GPT-2 without biases, 1024 positions."""
    block = [(C,), (3 * C, C), (C, C), (C,), (4 * C, C), (C, 4 * C)]
    return [(V, C), (1024, C), *block * n_layer, (C,)]


class Ours:
    def __init__(self, params: list[Tensor], low: torch.dtype, kernels: str):
        self.params, self.kernels = params, kernels
        self.m, self.v = ([torch.zeros_like(p) for p in params] for _ in range(2))
        self.lr, self.done = torch.tensor(LR, device=params[0].device), torch.zeros((), device=params[0].device)
        self.decays = [DECAY if p.dim() > 1 else 0.0 for p in params]
        for p in params:
            if p.dim() > 1:
                shadow(p, low)

    def step(self, grads: list[Tensor]) -> None:
        backend(self.kernels, self._step)(grads)

    def _step(self, grads: list[Tensor]) -> None:
        adamw_step(
            self.params,
            grads,
            self.m,
            self.v,
            lr=self.lr,
            step=self.done,
            beta1=BETAS[0],
            beta2=BETAS[1],
            eps=EPS,
            weight_decays=self.decays,
            norm=grad_norm(grads),
            max_norm=MAX_NORM,
            zero_grad=True,
        )


class Torch:
    def __init__(self, params: list[Tensor], **how):
        self.params = params
        groups = [{"params": [p for p in params if p.dim() > 1], "weight_decay": DECAY}]
        groups += [{"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS, **how)

    def step(self, grads: list[Tensor]) -> None:
        for p, g in zip(self.params, grads):
            p.grad = g
        torch.nn.utils.clip_grad_norm_(self.params, MAX_NORM)
        self.optimizer.step()


def after_three(make, params: list[Tensor]) -> list[Tensor]:
    """Parameters after three updates with gradients that do not depend on the provider."""
    params = [p.detach().clone().requires_grad_() for p in params]
    provider = make(params)
    generator = torch.Generator(params[0].device).manual_seed(7)
    for _ in range(3):
        grads = [torch.randn(p.shape, device=p.device, generator=generator).to(p.dtype) for p in params]
        provider.step(grads)
    return [p.detach() for p in params]


def main(argv: list[str] | None = None) -> common.Bench:
    args = common.parser(__doc__).parse_args(argv)
    bench = common.Bench("optimizer", args)
    low = bench.dtype if bench.dtype != torch.float32 else torch.bfloat16
    makers = {
        "ours": lambda p: Ours(p, low, "auto"),
        "ours-torch": lambda p: Ours(p, low, "torch"),
        "torch-fused": lambda p: Torch(p, fused=True),
        "torch-foreach": lambda p: Torch(p, foreach=True),
    }
    names = ("124M",) if args.quick else ("124M", "350M", "1558M")
    for name in ("tiny",) if args.tiny else names if bench.gpu else ("char",):
        small = [torch.randn(s, device=bench.device) for s in shapes(1, *MODELS[name][1:])]
        exact = after_three(lambda p: Torch(p, foreach=False), [p.double() for p in small])
        single = after_three(lambda p: Torch(p, foreach=False), small)
        allowed = [common.error_of(a, b) for a, b in zip(single, exact)]
        params = [torch.randn(s, device=bench.device).requires_grad_() for s in shapes(*MODELS[name])]
        count = sum(p.numel() for p in params)
        calls, errors = {}, {}
        for provider, make in bench.wanted(makers).items():
            try:
                status, errors[provider] = common.verdict(after_three(make, small), exact, allowed)
                if status == "ok":
                    own = make([p.detach().clone().requires_grad_() for p in params])
                    grads = [torch.randn_like(p) for p in params]
                    calls[provider] = lambda own=own, grads=grads: own.step(grads)
            except Exception as error:  # any provider may fail in any way: the row says how, the others go on
                status = common.failure(error)
            if status != "ok":
                bench.row(name, provider, "step", status, error=errors.get(provider, ""))
        for provider, stats in bench.time(calls).items():
            bench.timed_row(name, provider, "step", stats, Work(bytes=32 * count), error=errors[provider])
        del calls
    bench.finish()
    return bench


if __name__ == "__main__":
    main()
