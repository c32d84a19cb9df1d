"""Weights that were trained elsewhere: GPT-2 from the Hugging Face hub, Hugging Face directories, nanoGPT's ckpt.pt.

All come under nanoGPT's names and orientation, each tensor checked against the network that its configuration describes.
Hugging Face's GPT-2 stores the weights of its four kinds of linear layers transposed ("Conv1D") and leaves lm_head.weight,
which is tied to wte, out. Only safetensors are read, but for ckpt.pt, whose unpickler takes tensors and plain values alone.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanogpt import checkpoint, data, tokenizer
from nanogpt.config import GPTConfig, TrainConfig
from nanogpt.data import assets
from nanogpt.model import GPT
from nanogpt.tokenizer import BPETokenizer, CharTokenizer, GPT2Tokenizer, Tokenizer

WEIGHTS, INDEX, CONFIG, CKPT = "model.safetensors", "model.safetensors.index.json", "config.json", "ckpt.pt"
VOCAB, PADDED_VOCAB = 50257, 50304  # GPT-2's, and the next multiple of 64, a width that GEMMs like
SHAPE = ("block_size", "n_layer", "n_head", "n_embd", "bias", "gelu")
UnpicklingError = torch.serialization.pickle.UnpicklingError  # torch.load's refusal; nothing here unpickles
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
GELU = {"gelu": "erf", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}  # the last two are one formula


@dataclass(frozen=True)
class HubModel:
    """A model.safetensors of the hub, known by its revision and, wherever it comes from, by its sha256."""

    repository: str
    revision: str
    sha256: str
    n_layer: int
    n_head: int
    n_embd: int


HUB = {
    "gpt2": HubModel(
        "openai-community/gpt2",
        "607a30d783dfa663caf39e06633721c8d4cfcd7e",
        "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
        12, 12, 768,
    ),
    "gpt2-medium": HubModel(
        "openai-community/gpt2-medium",
        "6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
        "fc5a354a19255ad494f3d71549390baca1ccf61d1d822b9408971705c687c9cd",
        24, 16, 1024,
    ),
    "gpt2-large": HubModel(
        "openai-community/gpt2-large",
        "32b71b12589c2f8d625668d2335a01cac3249519",
        "5f47f3e12f91cd33b662ce7e433b6150ad5512b5884a2cee961b50e9c3bbebce",
        36, 20, 1280,
    ),
    "gpt2-xl": HubModel(
        "openai-community/gpt2-xl",
        "15ea56dee5df4983c59b2538573817e1667135e2",
        "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a",
        48, 25, 1600,
    ),
}  # fmt: skip


@dataclass
class Weights:
    """A network's shape and parameters as stored, and what else came with them.

    Args:
        source: where they come from, for messages.
        config: the shape, its vocabulary as stored, with real_vocab_size where some of it is padding.
        tensors: parameters by nanoGPT's names, on the CPU, of any float dtype; lm_head.weight is wte.
        directory: where the tokenizer may lie; None for GPT-2 itself.
        state: the run's state where there is one: state.json of ours, `dataset` of nanoGPT's.
        optim: ``exp_avg.NAME``, ``exp_avg_sq.NAME`` and ``step``, from ckpt.pt.
        iter_num, best_val_loss: from ckpt.pt.
    """

    source: str
    config: GPTConfig
    tensors: Mapping[str, Tensor]
    directory: Path | None = None
    state: dict[str, Any] = field(default_factory=dict)
    optim: dict[str, Tensor] = field(default_factory=dict)
    iter_num: int = 0
    best_val_loss: float = float("inf")

    @property
    def vocab_size(self) -> int:
        """Number of tokens, padding left out."""
        return self.config.real_vocab_size or self.config.vocab_size

    def model(self, device: torch.device | str, dtype: torch.dtype, block_size: int = 0, dropout: float = 0.0) -> GPT:
        """The network with these parameters, its vocabulary padded.

        Args:
            device, dtype: where it computes, and in what; parameters are fp32.
            block_size: positions from here on are dropped; 0: none.
            dropout: the weights' own probability is of no concern here.
        """
        config = pad_vocabulary(replace(self.config, dropout=dropout))
        with torch.device("meta"):  # no time spent on initial values
            model = GPT(config, dtype)
        model.to_empty(device=device)
        model.lm_head.weight = model.transformer.wte.weight
        tensors = {name: resized(name, t, config) for name, t in self.tensors.items()}
        checkpoint.restore_model(model, tensors, Path(self.source))
        if block_size:
            model.crop_block_size(block_size)
        return model


def pad_vocabulary(config: GPTConfig) -> GPTConfig:
    """A vocabulary of GPT-2's size gets 50304 rows of which 50257 are real; others stay as they are."""
    if config.vocab_size == VOCAB:
        return replace(config, vocab_size=PADDED_VOCAB, real_vocab_size=VOCAB)
    return config


def padded(config: GPTConfig) -> GPTConfig:
    """Weights of 50304 rows that have no vocabulary of that size: nanoGPT's padding of GPT-2's, by its default."""
    return replace(config, real_vocab_size=VOCAB) if config.vocab_size == PADDED_VOCAB else config


def resized(name: str, t: Tensor, config: GPTConfig) -> Tensor:
    """A parameter, or its exp_avg, with rows of zeros added for padding tokens, and no position beyond block_size."""
    if name.endswith("transformer.wte.weight") and len(t) < config.vocab_size:
        return F.pad(t, (0, 0, 0, config.vocab_size - len(t)))
    return t[: config.block_size] if name.endswith("transformer.wpe.weight") else t


def load(init_from: str | Path) -> Weights:
    """The weights behind ``--init_from``.

    Args:
        init_from: gpt2, gpt2-medium, gpt2-large or gpt2-xl; or the path of a Hugging Face directory, of its model.safetensors,
            of a run of ours (its best checkpoint is taken) or one of its step-N, or of nanoGPT's ckpt.pt or its directory.

    Raises:
        ValueError: one line, for what is not there, cannot be verified, or is no GPT-2.
    """
    if str(init_from) in HUB:
        return _from_hub(str(init_from))
    path = Path(init_from)
    if path.is_dir():
        if (path / checkpoint.MANIFEST).exists() or checkpoint.steps(path):
            model, state = checkpoint.load_model(path, "cpu", torch.float32)
            return Weights(str(path), model.config, checkpoint.model_tensors(model), path, state)
        if (path / CONFIG).exists():
            return _from_directory(path)
        if (path / CKPT).exists():
            return _from_ckpt(path / CKPT)
        raise ValueError(f"{path}: no checkpoint (step-N), no {CONFIG} and no {CKPT} in it")
    if path.suffix == ".pt" and path.exists():
        return _from_ckpt(path)
    if path.suffix == ".safetensors" and path.exists():
        return _from_directory(path.parent, path.name)
    raise ValueError(f"{path}: {'expected a .safetensors or .pt file' if path.exists() else 'not found'}")


def load_model(init_from: str | Path, device: torch.device | str, dtype: torch.dtype) -> tuple[GPT, Tokenizer]:
    """A model for sampling or evaluation, in evaluation mode, and its tokenizer. Arguments and errors as for :func:`load`."""
    weights = load(init_from)
    encoder = find_tokenizer(weights)
    if encoder.vocab_size > weights.vocab_size:
        raise ValueError(f"{weights.source}: a tokenizer of {encoder.vocab_size} tokens for a model of {weights.vocab_size}")
    return weights.model(device, dtype).eval(), encoder


def adopt(config: TrainConfig, weights: Weights) -> TrainConfig:
    """A run's configuration with the shape of the weights; a smaller block_size that was asked for stays.

    Raises:
        ValueError: for a key of the shape that was asked for and contradicts the weights.
    """
    shape = {key: getattr(weights.config, key) for key in SHAPE}
    for key in asked(config):
        ours, theirs = getattr(config, key), shape[key]
        if key == "block_size" and ours < theirs:
            shape[key] = ours
        elif ours != theirs:
            raise ValueError(f"{key}={ours}: {weights.source} has {key}={theirs}")
    return replace(config, **shape)


def check_vocabulary(weights: Weights, dataset: str, vocab_size: int) -> None:
    """ValueError where the data's tokens are not the weights'."""
    if vocab_size != weights.vocab_size:
        raise ValueError(f"dataset={dataset}: a vocabulary of {vocab_size} tokens, {weights.source} has {weights.vocab_size}")


def starting_ckpt(config: TrainConfig) -> Path | None:
    """The ckpt.pt that ``--init_from=resume`` continues: out_dir holds one of nanoGPT's and no checkpoint of ours yet."""
    path = Path(config.out_dir) / CKPT
    asked = config.init_from == "resume" and not config.resume  # which names a checkpoint of ours
    return path if asked and path.exists() and not checkpoint.steps(path.parent) else None


def asked(config: TrainConfig) -> list[str]:
    """The keys of the network's shape that the user set."""
    defaults = {f.name: f.default for f in fields(config)}
    return [key for key in SHAPE if key in config.given or getattr(config, key) != defaults[key]]


# Sources


def _from_hub(name: str) -> Weights:
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
        from huggingface_hub.utils import logging
    except ImportError:
        raise ValueError(f"init_from={name}: needs huggingface_hub: pip install huggingface_hub") from None
    hub = HUB[name]
    logging.set_verbosity_error()  # each retry is a warning
    try:  # at a pinned revision, a cached file is found without a look at the network; no login is sent
        path = Path(hf_hub_download(hub.repository, WEIGHTS, revision=hub.revision, token=False))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"init_from={name}: {hub.repository}@{hub.revision[:8]} is neither in the cache nor to be had: "
            f"{_first_line(error.__cause__ or error)}"
        ) from error
    with open(path, "rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != hub.sha256:
        raise ValueError(f"init_from={name}: {path}: sha256 {actual} instead of {hub.sha256}; delete it to fetch it anew")
    config = GPTConfig(1024, VOCAB, hub.n_layer, hub.n_head, hub.n_embd, bias=True, gelu="tanh")
    return Weights(name, config, _named(checkpoint.load_tensors(path), config, path, conv1d=True))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


def _from_directory(path: Path, file: str = "") -> Weights:
    """A Hugging Face directory: config.json and one file of weights, or an index of several."""
    config = _read_config(path / CONFIG)
    if config.vocab_size == PADDED_VOCAB and _may_be_gpt2(path):
        config = padded(config)
    tensors: dict[str, Tensor] = {}
    for name in [file] if file else _weight_files(path):
        tensors |= checkpoint.load_tensors(path / name)
    return Weights(str(path), config, _named(tensors, config, path / (file or WEIGHTS), conv1d=True), path)


def _weight_files(path: Path) -> list[str]:
    if (path / WEIGHTS).exists():
        return [WEIGHTS]
    if not (path / INDEX).exists():
        others = [p.name for pattern in ("*.bin", "*.pt") for p in sorted(path.glob(pattern))]
        hint = f"; it has {others[0]}, which is a pickle and is not read" if others else ""
        raise ValueError(f"{path}: neither {WEIGHTS} nor {INDEX} in it{hint}")
    files = _read_json(path / INDEX).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{path / INDEX}: no weight_map in it")
    for name in files.values():
        if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name):
            raise ValueError(f"{path / INDEX}: {name!r} is not the plain name of a safetensors file")
    return sorted(set(files.values()))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object")
    return content


def _read_config(path: Path) -> GPTConfig:
    """The shape that a Hugging Face config.json describes, if it is one that this network computes exactly."""
    content = _read_json(path)
    sizes = {"n_positions": 1024, "vocab_size": VOCAB, "n_layer": 12, "n_head": 12, "n_embd": 768}
    for key, default in sizes.items():
        sizes[key] = content.get(key, default)
        if type(sizes[key]) is not int:
            raise ValueError(f"{path}: {key}={sizes[key]!r}: expected an integer")
    gelu = content.get("activation_function", "gelu_new")
    if not isinstance(gelu, str) or gelu not in GELU:
        raise ValueError(f"{path}: activation_function={gelu!r}: expected one of {', '.join(GELU)}")
    for key, default, wanted in (
        ("model_type", None, ("gpt2",)),
        ("layer_norm_epsilon", 1e-5, (1e-5,)),
        ("n_inner", None, (None, 4 * sizes["n_embd"])),
        ("scale_attn_weights", True, (True,)),
        ("scale_attn_by_inverse_layer_idx", False, (False,)),
        ("add_cross_attention", False, (False,)),
    ):
        if content.get(key, default) not in wanted:
            raise ValueError(f"{path}: {key}={content.get(key, default)!r}: this network has {wanted[-1]!r}")
    try:
        return GPTConfig(*sizes.values(), bias=True, gelu=GELU[gelu])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _named(tensors: dict[str, Tensor], config: GPTConfig, source: Path, conv1d: bool) -> dict[str, Tensor]:
    """Stored tensors under nanoGPT's names, in its orientation.

    Args:
        tensors: by stored names, with or without `_orig_mod.` (of torch.compile) and `transformer.` before them.
        conv1d: the weights of linear layers are stored transposed.

    Raises:
        ValueError: naming the tensor that is missing, of another shape or dtype, or none of this network's.
    """
    found = {}
    for name, t in tensors.items():
        name = name.removeprefix("_orig_mod.")
        if not name.startswith(("transformer.", "lm_head.")):
            name = f"transformer.{name}"
        if not re.fullmatch(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)", name):  # the causal mask, a buffer
            found[name] = t
    with torch.device("meta"):
        wanted = checkpoint.model_tensors(GPT(config))
    named = {}
    for name, parameter in wanted.items():
        if name not in found:
            raise ValueError(f"{source}: tensor {name} is missing")
        t = found.pop(name)
        transposed = conv1d and name.endswith(CONV1D)
        shape = parameter.shape[::-1] if transposed else parameter.shape
        if t.shape != shape:
            raise ValueError(f"{source}: tensor {name} has shape {tuple(t.shape)}, expected {tuple(shape)}")
        if not t.is_floating_point():
            raise ValueError(f"{source}: tensor {name} has dtype {t.dtype}, expected floating point")
        named[name] = t.t() if transposed else t
    head = found.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, named["transformer.wte.weight"]):
        raise ValueError(f"{source}: tensor lm_head.weight differs from transformer.wte.weight; here the two are tied")
    for name in found:
        raise ValueError(f"{source}: tensor {name} is none of GPT-2's")
    return named


def _from_ckpt(path: Path) -> Weights:
    """nanoGPT's {model, optimizer, model_args, iter_num, best_val_loss, config}: weights, and the state of its AdamW."""
    try:  # nothing but tensors and plain values is ever built
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError:
        raise ValueError(f"{path}: refused: it holds more than tensors and plain values") from None
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: cannot be read: {_first_line(error)}") from error
    if not isinstance(content, dict) or not {"model", "model_args"} <= content.keys():
        raise ValueError(f"{path}: no model and model_args in it: not a checkpoint of nanoGPT's")
    tensors, arguments = content["model"], content["model_args"]
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ValueError(f"{path}: model is not a dict of tensors")
    try:
        sizes = {key: arguments[key] for key in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")}
        if any(type(size) is not int for size in sizes.values()):
            raise TypeError(sizes)
        # the first releases had biases always, and no word for it
        config = padded(GPTConfig(**sizes, bias=bool(arguments.get("bias", True))))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: model_args: cannot be understood: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: model_args: {error}") from error
    named = _named(tensors, config, path, conv1d=False)
    settings = content.get("config")
    dataset = settings.get("dataset") if isinstance(settings, dict) else None
    weights = Weights(str(path), config, named, path.parent, {"dataset": dataset} if isinstance(dataset, str) else {})
    try:
        weights.iter_num = int(content.get("iter_num", 0))
        weights.best_val_loss = float(content.get("best_val_loss", "inf"))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: iter_num or best_val_loss is no number: {error}") from error
    if "optimizer" in content:
        weights.optim = _adamw(content["optimizer"], named, path)
    return weights


def _adamw(optimizer: Any, parameters: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
    """nanoGPT's AdamW counts parameters: first those that decay (matrices), then the others, each in the model's order."""
    order = [name for matrices in (True, False) for name, p in parameters.items() if (p.dim() >= 2) == matrices]
    try:
        states = [optimizer["state"][i] for i in range(len(order))]
        named = {f"{key}.{name}": s[key] for name, s in zip(order, states) for key in ("exp_avg", "exp_avg_sq")}
        steps = {float(s["step"]) for s in states}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{source}: optimizer: no AdamW state of each of {len(order)} parameters: {error!r}") from error
    if len(optimizer["state"]) != len(order) or len(steps) != 1:
        raise ValueError(
            f"{source}: optimizer: {len(optimizer['state'])} states with {len(steps)} step counts for {len(order)} parameters"
        )
    for name, t in named.items():
        shape = parameters[name.split(".", 1)[1]].shape
        if not isinstance(t, Tensor) or t.shape != shape:
            raise ValueError(f"{source}: optimizer: {name} is not of shape {tuple(shape)}")
    return named | {"step": torch.tensor(steps.pop())}


# Data and tokenizers


class NoTokenizerError(ValueError):
    """Weights that came with no tokenizer, and name no data that has one."""


def trained_on(weights: Weights) -> str:
    """The dataset that the weights were trained on, for :func:`nanogpt.data.find`; empty where they name none.

    Raises:
        ValueError: where a ckpt.pt, which anyone may have written, gives more than a plain name.
    """
    name, config = weights.state.get("dataset"), weights.state.get("config")
    if isinstance(name, str):  # a run of ours has a dict of what is in the data there
        if name in (".", "..") or Path(name).name != name:
            raise ValueError(f"{weights.source}: dataset {name!r} is not a plain name")
        return name
    found = weights.state.get("data_dir") or (config.get("dataset") if isinstance(config, dict) else "")
    return found if isinstance(found, str) else ""


def find_tokenizer(weights: Weights) -> Tokenizer:
    """The tokenizer saved with the weights, else that of the data they were trained on, else GPT-2's if the vocabulary is.

    Raises:
        NoTokenizerError: where there is none.
        ValueError: where there is one that cannot be understood.
    """
    if weights.directory is None:
        return GPT2Tokenizer()
    directory = weights.directory
    if (directory / CONFIG).exists():
        found = _from_hugging_face(directory)
    else:
        run = directory.parent if (directory / checkpoint.MANIFEST).exists() else directory
        found = tokenizer.load(directory) or tokenizer.load(run)
    if found:
        return found
    dataset, reason = trained_on(weights), "no dataset of its own is named"
    if dataset:
        reason = f"dataset={dataset} has no {tokenizer.FILE}"
        try:
            data_dir = data.find(dataset)
        except ValueError as error:
            reason = str(error)
        else:
            if found := tokenizer.load(data_dir):
                return found
    if weights.vocab_size == VOCAB:
        return GPT2Tokenizer()
    raise NoTokenizerError(f"{weights.source}: no {tokenizer.FILE} beside it, and {reason}")


def _from_hugging_face(directory: Path) -> Tokenizer | None:
    """The tokenizer of a Hugging Face directory: GPT-2's, one of single characters, or another; None without files of one.

    Raises:
        ValueError: for files of one that cannot be understood.
    """
    path = directory / tokenizer.FILE
    if not path.exists():
        return _from_old_files(directory)
    model = _read_json(path).get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        return tokenizer.load(directory)
    vocabulary = model["vocab"]
    single = model.get("merges") == [] and all(len(piece) == 1 and type(i) is int for piece, i in vocabulary.items())
    if single and vocabulary and sorted(vocabulary.values()) == list(range(len(vocabulary))):
        return CharTokenizer("".join(sorted(vocabulary, key=vocabulary.get)))
    found = tokenizer.load(directory)
    if isinstance(found, BPETokenizer) and found.special == GPT2Tokenizer.special and _is_gpt2(vocabulary):
        return GPT2Tokenizer()
    return found


def _from_old_files(directory: Path) -> Tokenizer | None:
    """vocab.json and added_tokens.json, with which a tokenizer was saved before there was tokenizer.json."""
    path = directory / "vocab.json"
    if not path.exists():
        return None
    if not _is_gpt2(_read_json(path)):
        raise ValueError(f"{path}: not GPT-2's; another vocabulary is read from {tokenizer.FILE} alone, which is not there")
    path = directory / "added_tokens.json"
    if path.exists() and _read_json(path).keys() - {tokenizer.EOT_TEXT}:
        raise ValueError(f"{path}: adds tokens to GPT-2's; these are read from {tokenizer.FILE} alone, which is not there")
    return GPT2Tokenizer()


def _may_be_gpt2(directory: Path) -> bool:
    """Whether a Hugging Face directory has no tokenizer but GPT-2's."""
    try:
        found = _from_hugging_face(directory)
    except ValueError:  # one that is not understood is not GPT-2's either
        return False
    return found is None or isinstance(found, GPT2Tokenizer)


def _is_gpt2(vocabulary: dict) -> bool:
    return len(vocabulary) == VOCAB and vocabulary == json.loads(assets.fetch(assets.GPT2_ENCODER).read_bytes())
