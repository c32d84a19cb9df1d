"""Decoding: tokens/s with the KV cache and without, greedy, by batch and length.

    python benchmarks/generate.py [--quick] [--plot]

Before timing, the cached model's logits after a prompt and some steps must be as close to an fp32 model's as the uncached
model's are, within three times.
"""

import time

import common
import torch
from torch import Tensor
from train_step import SIZES, Size

from nanogpt.config import GPTConfig
from nanogpt.generate import generate
from nanogpt.model import GPT


def build(size: Size, dtype: torch.dtype, device: str) -> GPT:
    names = ("n_layer", "n_head", "n_embd", "block_size")
    torch.manual_seed(1337)
    with torch.device(device):
        return GPT(GPTConfig(**dict(zip(names, size)), vocab_size=size.vocab_size), dtype=dtype).eval()


@torch.no_grad()
def last_logits(model: GPT, idx: Tensor, prompt: int, cached: bool) -> Tensor:
    """Logits (B, V) after all of idx, fed as a prompt and then token by token if cached."""
    if not cached:
        return model(idx)[0][:, -1]
    cache = model.new_cache(idx.shape[0], idx.shape[1])
    logits, _ = model(idx[:, :prompt], cache=cache)
    for i in range(prompt, idx.shape[1]):
        logits, _ = model(idx[:, i : i + 1], cache=cache)
    return logits[:, -1]


def main(argv: list[str] | None = None) -> common.Bench:
    args = common.parser(__doc__).parse_args(argv)
    bench = common.Bench("generate", args)
    size_name = "tiny" if args.tiny else "124M" if bench.gpu else "shakespeare_cpu"
    size = SIZES[size_name]
    model = build(size, bench.dtype, bench.device)
    exact_model = build(size, torch.float32, bench.device)
    if bench.dtype == torch.float32:
        exact_model = exact_model.double()
        exact_model.dtype = torch.float64
    prompt = min(64, size.block_size // 2)
    new = min(64 if args.quick else 256, size.block_size - prompt)
    for batch in (2,) if args.tiny else (1, 8) if args.quick or not bench.gpu else (1, 8, 64):
        idx = torch.randint(size.vocab_size, (batch, prompt + new), device=bench.device)
        exact = common.backend("torch", last_logits)(exact_model, idx, prompt, False)  # the only one that takes fp64
        allowed = [common.error_of(last_logits(model, idx, prompt, False), exact)]
        case = f"{size_name}-B{batch}-P{prompt}-N{new}"
        calls, errors = {}, {}
        for name, cached in bench.wanted({"ours-cache": True, "ours-no-cache": False}).items():
            try:
                status, errors[name] = common.verdict([last_logits(model, idx, prompt, cached)], [exact], allowed)
            except Exception as error:  # a provider may fail in any way: the row says how, the others go on
                status = common.failure(error)
            if status == "ok":
                calls[name] = lambda idx=idx, cached=cached: generate(
                    model, idx[:, :prompt], new, temperature=0, use_cache=cached
                )
            else:
                bench.row(case, name, "decode", status, error=errors.get(name, ""))
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(2 if args.tiny else 4):  # the clock on the wall: launches are part of decoding
            for name, call in calls.items():
                start = time.perf_counter()
                call()[0, -1].item()
                times[name].append(1e3 * (time.perf_counter() - start))
        for name, t in times.items():
            stats = common.quantiles(t[1:])
            bench.row(case, name, "decode", stats=stats, tokens_per_s=batch * new / stats.median * 1e3, error=errors[name])
    bench.finish()
    return bench


if __name__ == "__main__":
    main()
