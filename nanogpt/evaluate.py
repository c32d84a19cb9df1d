"""Figures of a model that can be compared: ``python -m nanogpt.evaluate out --data=shakespeare_char``.

Loss, perplexity and bits per byte of a split, and HellaSwag. The same at any number of processes, bitwise where each computes
with equally many threads: who computes a batch does not change it, and sums are fp64, in one order. What each figure means, and
what it compares to: docs/evaluation.md.

B batch_size, T block_size.
"""

import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kernels import dispatch
from nanogpt import data, distributed, hellaswag, pretrained, tokenizer
from nanogpt.config import TrainConfig, check_init_from, key, parse
from nanogpt.data.check import beyond
from nanogpt.data.shards import Shard, open_dataset
from nanogpt.distributed import World
from nanogpt.model import GPT
from nanogpt.tokenizer import Tokenizer

OnRound = Callable[[int, int], object]  # called with rounds done and rounds in all


@dataclass
class EvaluateConfig:
    init_from: str = key("resume", "resume: the checkpoint in out_dir; gpt2, gpt2-medium, ...; or a path of weights", "Model")
    out_dir: str = key("out", "a run's directory (its best checkpoint is taken) or one checkpoint; also as the first argument")

    data: str = key("", "a name under data/, or a directory (empty: what the model was trained on)", "Loss")
    split: str = key("val", "which part of it", "", ("train", "val"))
    tokens: int = key(0, "so many tokens are predicted, from the first on (0: all)")
    block_size: int = key(0, "tokens of context at most, T (0: the model's)")
    stride: int = key(0, "tokens predicted a window, behind up to block_size - stride of context alone (0: block_size)")

    hellaswag: str = key("", "FILE.jsonl, or download: score it, and the loss only where --data is given too", "HellaSwag")
    limit: int = key(0, "the first items only (0: all)")

    batch_size: int = key(8, "windows at a time per process; of HellaSwag as many endings as have their tokens", "System")
    json: bool = key(False, "print one JSON object instead of lines")
    backend: str = key("auto", "of torch.distributed: auto is nccl on GPUs, gloo on CPUs", "", ("auto", "nccl", "gloo"))
    device: str = key("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: str = key("auto", "of activations and GEMMs", "", ("auto", "float32", "bfloat16", "float16"))
    kernels: str = key("auto", "backend of every op that has it", "", ("auto", "triton", "cuda", "cpp", "torch"))

    def check(self) -> None:
        check_init_from(self.init_from, ("resume",))
        for name, least in (("tokens", 0), ("block_size", 0), ("stride", 0), ("limit", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least {least}")
        if self.block_size and self.stride > self.block_size:
            raise ValueError(f"stride={self.stride}: must be at most block_size={self.block_size}")


def command_line(argv: list[str]) -> EvaluateConfig:
    """A first argument without ``--`` is --out_dir."""
    if argv and not argv[0].startswith("-"):
        argv = [f"--out_dir={argv[0]}", *argv[1:]]
    return parse(EvaluateConfig, argv, presets=None, prog="evaluate")


class Windows:
    """Consecutive windows over shards: each predicts the next `stride` tokens, once each, from up to block_size tokens.

    Every token but the first of each shard is predicted, up to `limit` of them (0: all). Where stride is block_size, windows
    share no context; where it is less, a token has at least block_size - stride tokens before it, the beginning excepted.
    """

    def __init__(self, shards: list[Shard], block_size: int, stride: int, limit: int = 0):
        self.shards, self.block_size, self.stride = shards, block_size, stride
        counts = np.array([shard.count - 1 for shard in shards])
        before = np.cumsum(counts) - counts
        limit = limit or int(counts.sum())
        self.counts = np.clip(limit - before, 0, counts)  # tokens to be predicted of each shard
        self.tokens = int(self.counts.sum())
        self.ends = np.cumsum(-(-self.counts // stride))  # windows up to each shard's end

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, windows: range) -> tuple[np.ndarray, np.ndarray]:
        """(B, T) int64 tokens and targets, these -1 where nothing is predicted: context alone, and padding on the right."""
        idx = np.zeros((len(windows), self.block_size), dtype=np.int64)
        targets = np.full_like(idx, -1)
        for row, window in enumerate(windows):
            s = int(np.searchsorted(self.ends, window, side="right"))
            first = (window - int(self.ends[s - 1] if s else 0)) * self.stride
            end = min(first + self.stride, int(self.counts[s]))
            begin = max(0, first + self.stride - self.block_size)  # where fewer than stride are left as well
            tokens = self.shards[s].tokens[begin : end + 1]
            idx[row, : end - begin] = tokens[:-1]
            targets[row, first - begin : end - begin] = tokens[first - begin + 1 :]
        return idx, targets


def loss(
    model: GPT, windows: Windows, batch_size: int, world: World, lengths: np.ndarray | None, on_round: OnRound | None = None
) -> tuple[float, int]:
    """Sum of the loss over all windows' targets, in nats, and of their bytes.

    Args:
        model: in evaluation mode.
        batch_size: windows a batch; ranks take the batches in turns.
        world: this rank.
        lengths: (V,) bytes of each token; None: not known, the sum is 0.
        on_round: called after each batch.

    Raises:
        ValueError: naming file and offset of a token that the model does not have.
    """
    sums = torch.zeros(len(windows), 2, dtype=torch.float64)  # nats, bytes
    batches = [range(i, min(i + batch_size, len(windows))) for i in range(0, len(windows), batch_size)]
    total = -(-len(batches) // world.size)
    for done, batch in enumerate(distributed.rounds(batches, world), start=1):
        if batch:
            idx, targets = windows.read(batch)
            if max(idx.max(), targets.max()) >= model.vocab_size:
                raise ValueError(next(fault for shard in windows.shards for fault in beyond(shard, model.vocab_size)))
            x, y = (torch.from_numpy(a).to(world.device) for a in (idx, targets))
            sums[batch.start : batch.stop, 0] = model.token_losses(x, y).cpu().double().sum(1)
            if lengths is not None:
                sums[batch.start : batch.stop, 1] = torch.from_numpy(np.where(targets < 0, 0, lengths[targets]).sum(1)).double()
        if on_round is not None:
            on_round(done, total)
    sums = distributed.assemble(sums, world)
    return math.fsum(sums[:, 0].tolist()), int(sums[:, 1].sum())


def byte_lengths(encoder: Tokenizer) -> np.ndarray:
    """(V,) int64 bytes of the text that each token stands for: 0 for the end of a document, which is none of it."""
    lengths = np.array([len(encoder.decode_bytes([i])) for i in range(encoder.vocab_size)])
    if encoder.eot is not None:
        lengths[encoder.eot] = 0
    return lengths


def text_figures(
    config: EvaluateConfig, weights: pretrained.Weights, model: GPT, data_dir: Path, world: World
) -> dict[str, Any]:
    """Loss, perplexity, bits per byte (None where the data has no tokenizer) and what they were taken over.

    Raises:
        ValueError: for data that is missing, damaged, too short or of other tokens than the model's.
    """
    dataset = open_dataset(data_dir)
    pretrained.check_vocabulary(weights, str(data_dir), dataset.vocab_size)
    block_size = config.block_size or model.config.block_size
    windows = Windows(dataset.shards(config.split), block_size, config.stride or block_size, config.tokens)
    if not windows.tokens:
        raise ValueError(f"data={data_dir}: the split {config.split} has no token to predict")
    encoder, theirs = tokenizer.load(data_dir), _tokenizer_or_none(weights)
    if encoder and theirs and encoder.to_json() != theirs.to_json():
        raise ValueError(f"data={data_dir}: its tokens are not those of {weights.source}: {tokenizer.FILE} differs")
    lengths = byte_lengths(encoder) if encoder else None
    with Progress(f"{config.split} loss", world) as progress:
        nats, size = loss(model, windows, config.batch_size, world, lengths, progress)
    mean = nats / windows.tokens
    return {
        "data": str(data_dir),
        "split": config.split,
        "tokens": windows.tokens,
        "bytes": size or None,
        "block_size": block_size,
        "stride": windows.stride,
        "loss": mean,
        "perplexity": math.exp(mean) if mean < 700 else math.inf,
        "bits_per_byte": nats / math.log(2) / size if size else None,
    }


def _tokenizer_or_none(weights: pretrained.Weights) -> Tokenizer | None:
    try:
        return pretrained.find_tokenizer(weights)
    except pretrained.NoTokenizerError:  # a model of bare numbers, which the vocabulary's size alone tells from others
        return None


class Progress:
    """A bar on the main process's terminal, on stderr; nothing where there is none."""

    def __init__(self, title: str, world: World):
        self.title, self.bar = title, None
        if world.main and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress as Bar

            self.bar = Bar(console=Console(stderr=True), transient=True)

    def __enter__(self) -> OnRound:
        if self.bar is None:
            return lambda done, total: None
        self.bar.start()
        task = self.bar.add_task(self.title, total=None)
        return lambda done, total: self.bar.update(task, completed=done, total=total)

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.stop()


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Loads, evaluates; the figures by name.

    Raises:
        ValueError: for what the user can set right.
    """
    dispatch.use(config.kernels)
    world = distributed.init(TrainConfig(backend=config.backend, device=config.device))
    torch.set_float32_matmul_precision("highest")  # float32 is what it says: a figure to compare is worth the time
    dtype = distributed.pick_dtype(config.dtype, world.device)
    weights = pretrained.load(config.out_dir if config.init_from == "resume" else config.init_from)
    limit = weights.config.block_size
    if max(config.block_size, config.stride) > limit:
        name = "block_size" if config.block_size > limit else "stride"
        raise ValueError(f"{name}={getattr(config, name)}: {weights.source} has {limit} positions")
    data_dir = None
    if config.data or not config.hellaswag:
        dataset = config.data or pretrained.trained_on(weights)
        if not dataset:
            raise ValueError(f"data=: {weights.source} names no dataset of its own; --data=DIR, or --hellaswag=FILE")
        data_dir = data.find(dataset)
    task = None
    if config.hellaswag:
        encoder = pretrained.find_tokenizer(weights)
        task = hellaswag.load(config.hellaswag, encoder, config.block_size or limit, config.limit)
    model = weights.model(world.device, dtype).eval()
    figures: dict[str, Any] = {
        "model": weights.source,
        "iter": weights.state.get("iter"),
        "parameters": model.parameter_count(),
        "dtype": str(dtype).removeprefix("torch."),
        "processes": world.size,
    }
    if data_dir:
        figures |= text_figures(config, weights, model, data_dir, world)
    if task:
        with Progress("HellaSwag", world) as progress:
            scores = hellaswag.score(model, task, config.batch_size * (config.block_size or limit), world, progress)
        figures |= {"hellaswag_items": len(task.labels)} | {f"hellaswag_{name}": value for name, value in scores.items()}
    return figures


def report(figures: dict[str, Any]) -> str:
    """The figures as lines for people."""
    it = "" if figures["iter"] is None else f" after {figures['iter']:,} updates"
    lines = [f"model: {figures['model']}{it}, {figures['parameters'] / 1e6:.2f}M parameters, {figures['dtype']}"]
    if "loss" in figures:
        bits = figures["bits_per_byte"]
        per_byte = f"bits per byte {bits:.4f} ({figures['bytes']:,} bytes)" if bits else "bits per byte n/a: no tokenizer there"
        lines += [
            f"data: {figures['data']}, {figures['split']}, {figures['tokens']:,} tokens, block size {figures['block_size']}, "
            f"stride {figures['stride']}",
            f"loss {figures['loss']:.4f}, perplexity {figures['perplexity']:.4f}, {per_byte}",
        ]
    if "hellaswag_acc" in figures:
        acc = [f"{n} {figures[f'hellaswag_{n}']:.4f} +- {figures[f'hellaswag_{n}_stderr']:.4f}" for n in ("acc", "acc_norm")]
        lines.append(f"HellaSwag: {', '.join(acc)}, {figures['hellaswag_items']:,} items")
    return "\n".join(lines)


def main(config: EvaluateConfig) -> int:
    try:
        figures = run(config)
    except (ValueError, OSError) as error:
        distributed.fail(error, "evaluate")
    if os.environ.get("RANK", "0") == "0":
        plain = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in figures.items()}
        print(json.dumps(plain, allow_nan=False) if config.json else report(figures), flush=True)
    distributed.shutdown()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(command_line(sys.argv[1:])))
