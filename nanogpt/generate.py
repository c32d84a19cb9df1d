"""Autoregressive decoding with a KV cache: tokens (:func:`stream`), and the text that they make (:func:`write`).

B batch, T tokens so far, V vocabulary.
"""

import codecs
from collections.abc import Iterator, Sequence
from contextlib import closing

import torch
from torch import Tensor

from nanogpt.model import GPT
from nanogpt.tokenizer import Tokenizer


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
        temperature: divides the logits; 0 takes the largest, and so does all below 1e-5, where fp32 would overflow.
        top_k: only the k likeliest tokens (ties with the k-th included).
        top_p: then only the likeliest tokens that together reach this probability (Holtzman et al., arXiv 1904.09751).
        generator: of the random numbers; None: the device's default.

    Returns:
        (B,) int64.
    """
    if temperature < 1e-5:
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
def stream(
    model: GPT,
    idx: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    vocab_size: int | None = None,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
) -> Iterator[Tensor]:
    """Continues each row of idx, step by step; whoever leaves the loop ends the generation and frees its cache.

    While the text fits into the model's block_size, each step computes the new token only and reads the others' keys and
    values from the cache. Past it the context is the last block_size tokens, as in nanoGPT: every token's position then changes
    at every step, learned positions leave nothing of the cache valid, and each step computes the whole window.

    Args:
        model: in eval mode until the last step.
        idx: (B, T) int64 prompts of equal length, T >= 1.
        max_new_tokens: steps.
        temperature: see :func:`choose`, also for top_k and top_p.
        vocab_size: ids from here on (the padding of the vocabulary) are never drawn.
        generator: of the random numbers.
        use_cache: False computes the whole context at each step, for comparison.

    Yields:
        (B,) int64, the tokens of a step.

    Raises:
        ValueError: at the first step, for an empty prompt and for sampling options out of range.
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
        for _ in range(max_new_tokens):
            if cache is not None and idx.shape[1] <= block_size:
                logits, _ = model(idx[:, cache.length :], cache=cache)  # (B, 1, V)
            else:
                cache = None
                idx = idx[:, -block_size:]
                logits, _ = model(idx)
            token = choose(logits[:, -1, :vocab_size], temperature, top_k, top_p, generator)  # (B,)
            yield token
            idx = torch.cat((idx, token[:, None]), dim=1)
    finally:
        model.train(was_training)


def generate(model: GPT, idx: Tensor, max_new_tokens: int, **options) -> Tensor:
    """Continues each row of idx (B, T); arguments as for :func:`stream`. Returns (B, T + max_new_tokens) int64."""
    steps = list(stream(model, idx, max_new_tokens, **options))
    return torch.cat((idx, torch.stack(steps, dim=1)), dim=1) if steps else idx


class Text:
    """What a row of tokens says, as they come: whole characters, up to a stop.

    Args:
        encoder: the tokenizer; only its ``decode_bytes`` is used.
        stop: texts that end the row and are no part of it. They may lie across tokens, or inside one.
        end: a token that does the same.
    """

    def __init__(self, encoder: Tokenizer, stop: Sequence[str] = (), end: int | None = None):
        if "" in stop:
            raise ValueError("stop: an empty text would end the row before it begins")
        self.encoder, self.stop, self.end = encoder, stop, end
        self.tokens: list[int] = []  # up to the end, which is not among them
        self.ended = False
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.held = ""  # the end of the text, while it may be the beginning of a stop

    def put(self, token: int) -> str:
        """Takes the next token; returns the text that is certain by it, often of earlier tokens, often none."""
        if self.ended:
            return ""
        if token == self.end:
            self.ended = True
            return self.close()
        text = self.held + self.decoder.decode(self.encoder.decode_bytes([token]))
        self.tokens.append(token)
        found = [(at + len(stop), at) for stop in self.stop if (at := text.find(stop)) >= 0]
        if found:  # the one complete first counts
            self.ended, self.held = True, ""
            return text[: min(found)[1]]
        keep = max((n for stop in self.stop for n in range(len(stop)) if text.endswith(stop[:n])), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def close(self) -> str:
        """The text held back, when no token follows. Bytes that are not yet a character are dropped."""
        text, self.held = self.held, ""
        return text


def write(
    model: GPT,
    encoder: Tokenizer,
    prompt: list[int],
    rows: list[Text],
    max_new_tokens: int,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    generator: torch.Generator,
) -> Iterator[list[str]]:
    """Continues a prompt once per row, in one batch, until every row has ended or has max_new_tokens.

    Args:
        prompt: at least one token.
        rows: empty texts, which take the tokens.
        temperature: see :func:`choose`, also for top_p; top_k=0: all.
        generator: of the random numbers, on the model's device.

    Yields:
        The new text of each row, often empty.
    """
    idx = torch.tensor([prompt] * len(rows), device=generator.device)
    options = {"temperature": temperature, "top_k": top_k or None, "top_p": top_p, "vocab_size": encoder.vocab_size}
    with closing(stream(model, idx, max_new_tokens, generator=generator, **options)) as steps:
        for tokens in steps:
            yield [row.put(token) for row, token in zip(rows, tokens.tolist())]
            if all(row.ended for row in rows):
                return
    yield [row.close() for row in rows]
