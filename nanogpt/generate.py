"""Autoregressive decoding with a KV cache.

B batch, T tokens so far, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from nanogpt.model import GPT


def choose(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draws a token per row.

    Args:
        logits: (B, V) of any float dtype.
        temperature: divides the logits; 0 takes the largest.
        top_k: only the k likeliest tokens (ties with the k-th included).
        top_p: then only the likeliest tokens that together reach this probability (Holtzman et al., arXiv 1904.09751).
        generator: of the random numbers; None: the device's default.

    Returns:
        (B,) int64.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kth = torch.topk(logits, top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    probabilities = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        ordered, ids = probabilities.sort(descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p  # the likelier ones reach top_p without this one
        probabilities = probabilities.masked_fill(beyond.scatter(-1, ids, beyond), 0.0)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


@torch.no_grad()
def generate(
    model: GPT,
    idx: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: int | None = None,
    vocab_size: int | None = None,
    generator: torch.Generator | None = None,
    on_tokens: Callable[[list[int]], None] | None = None,
    use_cache: bool = True,
) -> Tensor:
    """Continues each row of idx.

    While the text fits into the model's block_size, each step computes the new token only and reads the others' keys and
    values from the cache. Past it the context is the last block_size tokens, as in nanoGPT: every token's position then changes
    at every step, learned positions leave nothing of the cache valid, and each step computes the whole window.

    Args:
        model: put into eval mode for the call.
        idx: (B, T) int64 prompts of equal length, T >= 1.
        max_new_tokens: tokens to add at most.
        temperature: see :func:`choose`, also for top_k and top_p.
        stop: a token that ends a row; the row is filled up with it, and the call ends when all rows have ended.
        vocab_size: ids from here on (the padding of the vocabulary) are never drawn.
        generator: of the random numbers.
        on_tokens: called with the B tokens of each step.
        use_cache: False computes the whole context at each step, for comparison.

    Returns:
        (B, T + n) int64, n <= max_new_tokens.

    Raises:
        ValueError: for an empty prompt and for sampling options out of range.
    """
    if idx.dim() != 2 or idx.shape[1] < 1:
        raise ValueError(f"start: the prompt has shape {tuple(idx.shape)}, expected (B, T) with T >= 1")
    for name, value, holds in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 0),
        ("temperature", temperature, temperature >= 0),
        ("top_k", top_k, top_k is None or top_k >= 1),
        ("top_p", top_p, top_p is None or 0 < top_p <= 1),
    ):
        if not holds:
            raise ValueError(f"{name}={value}: out of range")
    was_training = model.training
    model.eval()
    try:
        B, T = idx.shape
        block_size = model.config.block_size
        cache = model.new_cache(B, min(block_size, T + max_new_tokens)) if use_cache and block_size >= T else None
        ended = torch.zeros(B, dtype=torch.bool, device=idx.device)
        for _ in range(max_new_tokens):
            if cache is not None and idx.shape[1] <= block_size:
                logits, _ = model(idx[:, cache.length :], cache=cache)  # (B, 1, V)
            else:
                cache = None
                logits, _ = model(idx[:, -block_size:])
            token = choose(logits[:, -1, :vocab_size], temperature, top_k, top_p, generator)  # (B,)
            if stop is not None:
                token = token.masked_fill(ended, stop)
                ended |= token == stop
            idx = torch.cat((idx, token[:, None]), dim=1)
            if on_tokens is not None:
                on_tokens(token.tolist())
            if stop is not None and bool(ended.all()):
                break
        return idx
    finally:
        model.train(was_training)
