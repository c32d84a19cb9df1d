"""Small models, runs and tokenizers that the tests of sampling, chat and server share."""

from pathlib import Path

import torch

from nanogpt import checkpoint, tokenizer
from nanogpt.config import GPTConfig
from nanogpt.model import GPT
from nanogpt.tokenizer import CharTokenizer


def character_model(characters: str) -> GPT:
    torch.manual_seed(7)
    made = GPT(GPTConfig(block_size=16, vocab_size=len(characters), n_layer=2, n_head=2, n_embd=32), torch.float32)
    for p in made.parameters():  # far from uniform, so that the choice of a token is no tie
        p.data.mul_(4)
    return made.eval()


def save_run(model: GPT, characters: str, out: Path) -> Path:
    state = {"step": 3, "model": vars(model.config), "config": {"dataset": "nowhere"}, "val_loss": 1.0}
    checkpoint.save(out, 3, checkpoint.model_tensors(model), {}, state)
    tokenizer.save(CharTokenizer(characters), out)
    return out


class Bytes:
    """A token is a byte; 0 ends the text."""

    vocab_size, eot = 256, 0

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids):
        return bytes(ids)
