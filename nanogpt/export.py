"""A model as a Hugging Face directory: ``python -m nanogpt.export --out_dir=out --to=DIR``.

What `transformers` loads with AutoModelForCausalLM and AutoTokenizer, and this project with ``--init_from=DIR``: config.json,
generation_config.json, model.safetensors (fp32) and the tokenizer's files. The function is the same: tanh GELU is their
gelu_new and erf theirs too; a network without biases gets biases of zero, which their GPT-2 always has; the padding of the
vocabulary is cut off. The directory appears whole, under its name, or not at all.
"""

import json
import os
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from nanogpt import checkpoint, pretrained
from nanogpt.config import fail, key, parse
from nanogpt.data import assets
from nanogpt.data.writer import sync
from nanogpt.model import GPT
from nanogpt.pretrained import CONFIG, CONV1D, WEIGHTS, Weights
from nanogpt.tokenizer import EOT_TEXT, CharTokenizer, GPT2Tokenizer, Tokenizer

GENERATION, TOKENIZER, SETTINGS, VOCAB, MERGES = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"
)  # fmt: skip
FILES = {CONFIG, WEIGHTS, GENERATION, TOKENIZER, SETTINGS, VOCAB, MERGES}
ACTIVATION = {"tanh": "gelu_new", "erf": "gelu"}


@dataclass
class ExportConfig:
    out_dir: str = key(
        "out", "a run's directory (its best checkpoint is taken), one OUT/step-N, or nanoGPT's ckpt.pt", "Export"
    )
    to: str = key("", "the Hugging Face directory to make")
    overwrite: bool = key(False, "replace what an earlier export wrote there")

    def check(self) -> None:
        if not self.to:
            raise ValueError("to=: names the directory to make; --to=DIR")


def export(source: str | Path, to: str | Path, overwrite: bool = False) -> tuple[Path, Tokenizer | None, str]:
    """Writes a Hugging Face directory.

    Args:
        source: whatever ``--init_from`` takes, see :func:`nanogpt.pretrained.load`.
        to: the directory to make; it must be empty or not exist.
        overwrite: one that holds nothing but an earlier export is replaced.

    Returns:
        Its path, the tokenizer, and why there is none where it is None.

    Raises:
        ValueError: for a source that cannot be read, or a directory that holds something else.
        OSError: where it cannot be written; nothing is left behind.
    """
    to = Path(os.path.realpath(to))
    _check_free(to, overwrite)
    weights = pretrained.load(source)
    encoder, reason = None, ""
    try:
        encoder = pretrained.find_tokenizer(weights)
    except ValueError as error:
        reason = str(error)
    if encoder and encoder.vocab_size > weights.vocab_size:
        raise ValueError(f"{weights.source}: a tokenizer of {encoder.vocab_size} tokens for a model of {weights.vocab_size}")
    partial = to.with_name(f".{to.name}.partial-{os.getpid()}")
    replaced = to.with_name(f".{to.name}.replaced-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        save_file(stored(weights), partial / WEIGHTS, metadata={"format": "pt"})
        for name, content in _texts(weights, encoder).items():
            (partial / name).write_bytes(content)
        for path in (*partial.iterdir(), partial):
            sync(path)
        _check_free(to, overwrite)  # again: what came meanwhile is not replaced either
        if to.exists():
            to.rename(replaced)
        partial.rename(to)
        sync(to.parent)
    except SafetensorError as error:
        raise OSError(f"{to}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if replaced.exists() and not to.exists():
            replaced.rename(to)
        shutil.rmtree(replaced, ignore_errors=True)
    return to, encoder, reason


def _check_free(to: Path, overwrite: bool) -> None:
    if not os.path.lexists(to):
        return
    if not to.is_dir():
        raise ValueError(f"to={to}: is a file")
    names = sorted(path.name for path in to.iterdir())
    if names and not overwrite:
        raise ValueError(f"to={to}: holds {names[0]} already; --overwrite=True replaces an earlier export")
    for name in names:
        if name not in FILES:
            raise ValueError(f"to={to}: holds {name}, which no export wrote; it is left as it is")


def stored(weights: Weights) -> dict[str, Tensor]:
    """fp32 tensors as Hugging Face's GPT-2 stores them: linear weights transposed, all biases, no padding, lm_head left out."""
    config, tensors = weights.config, {}
    for name, t in weights.tensors.items():
        t = t.to(torch.float32)
        if name == "transformer.wte.weight":
            t = t[: weights.vocab_size]
        tensors[name] = (t.t() if name.endswith(CONV1D) else t).contiguous()
    if not config.bias:
        with torch.device("meta"):
            wanted = checkpoint.model_tensors(GPT(replace(config, bias=True)))
        tensors |= {name: torch.zeros(p.shape) for name, p in wanted.items() if name not in tensors}
    return tensors


def _texts(weights: Weights, encoder: Tokenizer | None) -> dict[str, bytes]:
    """The content of the other files by name."""
    config = weights.config
    eot = None if encoder is None else encoder.eot
    model = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": ACTIVATION[config.gelu],
        "vocab_size": weights.vocab_size,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "attn_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "bos_token_id": eot,
        "eos_token_id": eot,
        "torch_dtype": "float32",
    }
    texts = {CONFIG: _json(model), GENERATION: _json({"bos_token_id": eot, "eos_token_id": eot})}
    if encoder is None:
        return texts
    special = {} if eot is None else {"bos_token": EOT_TEXT, "eos_token": EOT_TEXT, "unk_token": EOT_TEXT}
    settings = {"model_max_length": config.block_size, "clean_up_tokenization_spaces": False} | special
    if not isinstance(encoder, GPT2Tokenizer):
        content = _of_characters(encoder) if isinstance(encoder, CharTokenizer) else encoder.to_json()
        return texts | {TOKENIZER: _json(content), SETTINGS: _json(settings | {"tokenizer_class": "PreTrainedTokenizerFast"})}
    vocabulary, merges = (assets.fetch(asset).read_bytes() for asset in (assets.GPT2_ENCODER, assets.GPT2_MERGES))
    texts |= {TOKENIZER: _json(_of_gpt2(vocabulary, merges)), VOCAB: vocabulary, MERGES: merges}
    return texts | {SETTINGS: _json(settings | {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False})}


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode()


def _of_characters(encoder: CharTokenizer) -> dict[str, Any]:
    """tokenizer.json of single characters: byte pairs without a merge. Theirs leaves out characters that the table lacks."""
    vocabulary = {character: token for token, character in enumerate(encoder.characters)}
    model = {"type": "BPE", "vocab": vocabulary, "merges": []}
    return {"version": "1.0", "added_tokens": [], "decoder": {"type": "Fuse"}, "model": model}


def _of_gpt2(vocabulary: bytes, merges: bytes) -> dict[str, Any]:
    """tokenizer.json of GPT-2's byte pairs; merges.txt has a line of its version, then a pair a line."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "added_tokens": [{"id": GPT2Tokenizer.eot, "content": EOT_TEXT, "special": True} | flags],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": level,
        "decoder": level,
        "model": {"type": "BPE", "vocab": json.loads(vocabulary), "merges": merges.decode().splitlines()[1:]},
    }


def main(argv: list[str]) -> None:
    config = parse(ExportConfig, argv, presets=None, prog="export")
    try:
        to, encoder, reason = export(config.out_dir, config.to, config.overwrite)
    except (ValueError, OSError) as error:
        fail(error, "export")
    print(f"{to}: written" + ("" if encoder else f", without a tokenizer: {reason}"))


if __name__ == "__main__":
    main(sys.argv[1:])
