"""HellaSwag (Zellers et al., arXiv 1905.07830): does a model find the ending that people wrote the likeliest of four?

Text, tokens and scores are those of the task `hellaswag` of EleutherAI's lm-evaluation-harness (0.4.13, its model `hf`):
`acc` takes the ending of the highest log-probability, `acc_norm` that of the highest log-probability per character.

N items of four endings each.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nanogpt.data import assets
from nanogpt.distributed import World, assemble, rounds
from nanogpt.model import GPT
from nanogpt.sharding import is_sharded
from nanogpt.tokenizer import Tokenizer

# The validation set, 10,042 items; the repository's last commit, by which the file is named, and the file's published digest
VALIDATION = assets.Asset(
    "hellaswag_val.jsonl",
    "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588",
    url="https://raw.githubusercontent.com/rowanz/hellaswag/a29ff8e9a04bba4bd6588223785ce105328adc57/data/hellaswag_val.jsonl",
)


@dataclass(frozen=True)
class Item:
    """A text, four endings, and which of them is right.

    Args:
        source: file and line, for messages.
    """

    source: str
    context: str
    endings: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class Task:
    """Items as a model reads them.

    Args:
        tokens: of each ending behind its context, item by item: 4N arrays, at most block_size + 1 long.
        scored: (4N,) how many of these tokens, the last ones, are the ending's.
        characters: (N, 4) of each ending.
        labels: (N,) the right ones.
    """

    tokens: list[np.ndarray]
    scored: np.ndarray
    characters: np.ndarray
    labels: np.ndarray


def load(source: str, encoder: Tokenizer | None, block_size: int, limit: int = 0) -> Task:
    """:func:`read`, then :func:`prepare`; ValueError where there is no tokenizer."""
    if encoder is None:
        raise ValueError(f"hellaswag={source}: needs a tokenizer, and the data has none")
    return prepare(read(source, limit), encoder, block_size)


def read(source: str, limit: int = 0) -> list[Item]:
    """The items of a file.

    Args:
        source: path of a JSON-lines file as HellaSwag publishes it; or ``download``, the validation set.
        limit: only so many, the first; 0: all.

    Raises:
        ValueError: naming the file, and the line.
    """
    path = assets.fetch(VALIDATION) if source == "download" else Path(source)
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"hellaswag={source}: {error}") from error
    return [_item(f"{path}:{number}", line) for number, line in enumerate(lines[: limit or None], start=1)]


def _item(source: str, line: str) -> Item:
    try:
        content = json.loads(line)
        texts = [content[key] for key in ("activity_label", "ctx_a", "ctx_b")] + content["endings"]
        label = int(content["label"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{source}: no item of HellaSwag ({type(error).__name__}: {error})") from error
    if not all(isinstance(text, str) for text in texts) or len(texts) != 7 or not 0 <= label < 4:
        raise ValueError(f"{source}: no item of HellaSwag: expected four endings and a label of 0 to 3")
    activity, a, b, *endings = texts
    return Item(source, clean(f"{activity}: {a} {b.capitalize()}"), tuple(map(clean, endings)), label)


def clean(text: str) -> str:
    """Without the marks that the dataset's WikiHow part has in brackets."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def prepare(items: list[Item], encoder: Tokenizer, block_size: int) -> Task:
    """Items to tokens.

    Raises:
        ValueError: naming the line of a text that the tokenizer cannot express, or of an ending longer than block_size.
    """
    tokens, scored = [], []
    for item in items:
        try:
            context = encoder.encode(item.context.rstrip())
            # Encoded as one text, so that a token may begin with the space before the ending
            wholes = [encoder.encode(f"{item.context} {ending}") for ending in item.endings]
        except ValueError as error:
            raise ValueError(f"{item.source}: {error}") from error
        for whole in wholes:
            ending = whole[len(context) :]
            if not (context and 0 < len(ending) <= block_size):
                raise ValueError(
                    f"{item.source}: {len(ending)} tokens behind a context of {len(context)}: block_size={block_size} takes "
                    f"endings of 1 to {block_size} tokens, and a context there must be"
                )
            # Too much context is cut on its left; the last token is only predicted
            tokens.append(np.array((context + ending)[-(block_size + 1) :], dtype=np.int64))
            scored.append(len(ending))
    characters = np.array([[len(ending) for ending in item.endings] for item in items])
    return Task(tokens, np.array(scored), characters, np.array([item.label for item in items]))


def score(
    model: GPT, task: Task, batch_tokens: int, world: World, on_round: Callable[[int, int], object] | None = None
) -> dict[str, float] | None:
    """The accuracies, the same at any number of ranks, which share the work.

    Args:
        model: in evaluation mode.
        task: the items.
        batch_tokens: at most so many tokens, padding included, are in a batch.
        world: this rank.
        on_round: called with rounds done and rounds in all, on every rank equally often; ends the work where it returns true.

    Returns:
        acc, acc_norm and their standard errors (NaN for one item); None where `on_round` ended it.
    """
    batches = group([len(t) - 1 for t in task.tokens], batch_tokens)
    total = -(-len(batches) // world.size)
    sharded = any(map(is_sharded, model.parameters()))
    log_p = torch.zeros(len(task.tokens), dtype=torch.float64)
    for done, batch in enumerate(rounds(batches, world), start=1):
        if batch or sharded:
            some = batch or batches[-1]  # in vain where none is left: the ranks go through the weights together
            values = _log_p(model, [task.tokens[i] for i in some], task.scored[some], world.device)
            if batch:
                log_p[batch] = values
        if on_round is not None and on_round(done, total):
            return None
    figures = {}
    log_p = assemble(log_p, world).view(-1, 4).numpy()
    # An ending without a character is never taken
    per_character = np.divide(log_p, task.characters, out=np.full_like(log_p, -np.inf), where=task.characters > 0)
    for name, scores in (("acc", log_p), ("acc_norm", per_character)):
        right = scores.argmax(1) == task.labels
        figures[name] = float(right.mean())
        figures[f"{name}_stderr"] = float(right.std(ddof=1) / math.sqrt(len(right))) if len(right) > 1 else math.nan
    return figures


def group(lengths: list[int], batch_tokens: int) -> list[list[int]]:
    """Sequence numbers in batches of like length, longest first; a sequence longer than batch_tokens is alone."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or lengths[batches[-1][0]] * (len(batches[-1]) + 1) > batch_tokens:
            batches.append([])
        batches[-1].append(i)
    return batches


def _log_p(model: GPT, sequences: list[np.ndarray], scored: np.ndarray, device: torch.device) -> torch.Tensor:
    """(B,) fp64 sum of the log-probabilities of the last `scored` tokens of each; padding is on the right, which none of them
    sees."""
    T = max(map(len, sequences)) - 1
    idx, targets = np.zeros((len(sequences), T), dtype=np.int64), np.full((len(sequences), T), -1)
    for row, (tokens, n) in enumerate(zip(sequences, scored)):
        end = len(tokens) - 1
        idx[row, :end] = tokens[:-1]
        targets[row, end - n : end] = tokens[-n:]
    idx, targets = (torch.from_numpy(a).to(device) for a in (idx, targets))
    return -model.token_losses(idx, targets).cpu().double().sum(1)
