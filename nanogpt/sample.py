"""Text from a trained model: ``python -m nanogpt.sample --out_dir=out --start="To be"``, or a conversation with ``--chat``.

The samples are drawn together, in one batch; the first appears as it is drawn, the others when all are done.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from kernels import dispatch
from nanogpt import pretrained
from nanogpt.chat import Chat, talk
from nanogpt.config import check_init_from, fail, key, parse
from nanogpt.distributed import pick_device, pick_dtype
from nanogpt.generate import Text, write
from nanogpt.model import GPT
from nanogpt.tokenizer import Tokenizer

RULE = "---------------"


@dataclass
class LoadConfig:
    """Which model, and where it computes."""

    init_from: str = key("resume", "resume: the checkpoint in out_dir; gpt2, gpt2-medium, ...; or a path of weights", "Model")
    out_dir: str = key("out", "a training run's directory (its best checkpoint is taken) or one checkpoint, OUT/step-N")
    device: str = key("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: str = key("auto", "of activations and GEMMs", "", ("auto", "float32", "bfloat16", "float16"))
    kernels: str = key("auto", "backend of every op that has it", "", ("auto", "triton", "cuda", "cpp", "torch"))

    def check(self) -> None:
        check_init_from(self.init_from, ("resume",))


@dataclass
class SampleConfig(LoadConfig):
    """Every key of nanoGPT's ``sample.py``, under its name, and ours."""

    start: str = key("\n", "prompt; FILE:prompt.txt reads it from that file", "Sampling")
    num_samples: int = key(10, "texts to draw")
    max_new_tokens: int = key(500, "tokens of each")
    temperature: float = key(0.8, "below 1: likelier tokens; above: wilder ones; 0: always the likeliest")
    top_k: int = key(200, "only the k likeliest tokens (0: all)")
    top_p: float = key(1.0, "only the likeliest tokens that together have this probability")
    stop: str = key("", "text, such as <|endoftext|>, that ends a sample and is not printed (empty: none)")
    seed: int = key(1337, "of the draws")
    chat: bool = key(False, "a conversation, with start as its beginning, in place of num_samples texts")
    compile: bool = key(False, "nanoGPT's; the KV cache took its place, so nothing is compiled")

    def check(self) -> None:
        super().check()
        for name, holds in (
            ("num_samples", self.num_samples >= 1),
            ("max_new_tokens", self.max_new_tokens >= 0),
            ("temperature", self.temperature >= 0),
            ("top_k", self.top_k >= 0),
            ("top_p", 0 < self.top_p <= 1),
            ("seed", 0 <= self.seed < 2**63),
        ):
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)}: out of range")

    def sampling(self) -> dict[str, float]:
        """The options of :func:`nanogpt.generate.write` that these keys set."""
        return {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}


def read_start(start: str) -> str:
    if not start.startswith("FILE:"):
        return start
    try:
        return Path(start[5:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"start={start}: {error}") from error


def load(config: LoadConfig) -> tuple[GPT, Tokenizer]:
    """The model, in evaluation mode on its device, and its tokenizer.

    Raises:
        ValueError: for what the user can set right.
    """
    dispatch.use(config.kernels)
    device = pick_device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # kernels are launched on the current one
    source = config.out_dir if config.init_from == "resume" else config.init_from
    return pretrained.load_model(source, device, pick_dtype(config.dtype, device))


def run(config: SampleConfig) -> None:
    """Loads, draws and prints.

    Raises:
        ValueError: for what the user can set right.
    """
    model, encoder = load(config)
    start, stop = read_start(config.start), [config.stop] if config.stop else []
    if config.chat:
        talk(Chat(model, encoder, start, config.max_new_tokens, stop, config.seed, config.sampling()))
        return
    prompt = encoder.encode(start)
    if not prompt:
        raise ValueError("start=: the prompt has no token; a line end (the default) is the neutral one")
    rows = [Text(encoder, stop) for _ in range(config.num_samples)]
    texts = [[encoder.decode(prompt)] for _ in rows]
    print(texts[0][0], end="", flush=True)
    generator = torch.Generator(model.lm_head.weight.device).manual_seed(config.seed)
    for pieces in write(model, encoder, prompt, rows, config.max_new_tokens, generator=generator, **config.sampling()):
        print(pieces[0], end="", flush=True)
        for text, piece in zip(texts, pieces):
            text.append(piece)
    print(f"\n{RULE}", flush=True)
    for text in texts[1:]:
        print("".join(text), RULE, sep="\n", flush=True)


def main(argv: list[str]) -> None:
    config = parse(SampleConfig, argv, presets=None, prog="sample")
    if config.compile:
        print("compile=True: decoding uses the KV cache instead, and compiles nothing", file=sys.stderr)
    try:
        run(config)
    except (ValueError, OSError) as error:
        fail(error, "sample")


if __name__ == "__main__":
    main(sys.argv[1:])
