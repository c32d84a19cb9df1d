"""What can be set, its defaults, and how it is read: presets, ``.py`` config files, ``--key=value``.

Imports no torch, so a wrong option is answered at once. The command line is read by hand, some 30 lines over the dataclass
fields: argparse knows no ``--compile=False`` beside a bare ``--compile``, and answers a mistake with more than one line.
"""

import ast
import difflib
import io
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

PRESETS = Path(__file__).parent / "configs"
DEVICES = r"auto|cpu|mps|cuda(:\d{1,4})?"
GPT2_SIZES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
T = TypeVar("T")


def key(default: Any, help: str, group: str = "", choices: tuple[str, ...] = ()) -> Any:
    """A dataclass field that can be set from a file and the command line; ``group`` starts a section of ``--help``."""
    return field(default=default, metadata={"help": help, "group": group, "choices": choices})


@dataclass
class GPTConfig:
    """Shape of the network, in nanoGPT's names.

    Raises:
        ValueError: where the sizes do not fit together.
    """

    block_size: int = 1024
    vocab_size: int = 50304  # GPT-2's 50257, padded to a multiple of 64
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = False
    gelu: str = "erf"
    real_vocab_size: int = 0  # ids from here on are padding, never predicted; 0: there are none

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd}: must be a multiple of n_head={self.n_head}")
        if not 0 <= self.real_vocab_size <= self.vocab_size:
            raise ValueError(f"real_vocab_size={self.real_vocab_size}: must be 0 to vocab_size={self.vocab_size}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: must be at least 0 and below 1")
        if self.gelu not in ("erf", "tanh"):
            raise ValueError(f"gelu={self.gelu}: expected erf or tanh")


@dataclass
class TrainConfig:
    """Every key of nanoGPT's ``train.py``, under its name, and ours."""

    given = frozenset()  # the keys that a file or the command line set, where :func:`load` made this

    out_dir: str = key("out", "where checkpoints and metrics go", "Input and output")
    eval_interval: int = key(2000, "updates between evaluations")
    log_interval: int = key(1, "updates between log lines")
    eval_iters: int = key(200, "batches of batch_size per evaluated split, shared by the processes")
    hellaswag: str = key("", "FILE.jsonl, or download: items that evaluations score, see eval_hellaswag_interval")
    eval_hellaswag_interval: int = key(0, "updates between scores of HellaSwag, a multiple of eval_interval (0: none)")
    eval_only: bool = key(False, "evaluate once and stop")
    always_save_checkpoint: bool = key(True, "save at every evaluation, not only at a new best")
    init_from: str = key("scratch", "scratch, resume, gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a path of weights")
    resume: int = key(0, "resume from this step rather than the newest that verifies (0: newest)")
    overwrite: bool = key(False, "from scratch: delete the checkpoints that out_dir holds")
    keep_checkpoints: int = key(2, "newest checkpoints kept, besides the best and the final one (at least 2)")
    checkpoint_minutes: float = key(10.0, "also save whenever this much time has passed (0: never)")
    async_save: bool = key(True, "save in a thread, from a copy in host memory (12 bytes a parameter, on a GPU up to 24)")
    allow_data_change: bool = key(False, "resume on other data or another order of it, which is read from its beginning")

    wandb_log: bool = key(False, "log to Weights & Biases", "Tracking")
    wandb_project: str = key("owt", "its project")
    wandb_run_name: str = key("gpt2", "its run name")
    tensorboard: bool = key(False, "write TensorBoard events to OUT_DIR/tensorboard")

    dataset: str = key("openwebtext", "a name under data/, or a directory", "Data")
    gradient_accumulation_steps: int = key(40, "micro-steps an update, the total over all processes")
    batch_size: int = key(12, "sequences a micro-step and process")
    block_size: int = key(1024, "tokens a sequence")
    sampling: str = key("epoch", "epoch: each window once, seeded order; random: with replacement", "", ("epoch", "random"))

    n_layer: int = key(12, "transformer blocks", "Model")
    n_head: int = key(12, "attention heads; must divide n_embd")
    n_embd: int = key(768, "channels")
    dropout: float = key(0.0, "dropout probability")
    bias: bool = key(False, "biases in Linear and LayerNorm")
    gelu: str = key("erf", "erf is nanoGPT's, tanh is OpenAI's", "", ("erf", "tanh"))

    freeze: int = key(-1, "lowest blocks that are not trained, nor are the embeddings then (0: these alone; -1: none)")
    recompute: bool = key(False, "keep the blocks' inputs alone and compute the blocks again in backward: less memory")

    learning_rate: float = key(6e-4, "peak learning rate", "AdamW")
    max_iters: int = key(600000, "updates in all")
    weight_decay: float = key(0.1, "decay of matrices and embeddings")
    beta1: float = key(0.9, "decay rate of the first moment")
    beta2: float = key(0.95, "decay rate of the second moment")
    layer_lr_decay: float = key(1.0, "learning rate of each layer relative to the one above it (1: all have the same)")
    grad_clip: float = key(1.0, "largest gradient norm (0: no clipping)")

    decay_lr: bool = key(True, "warmup and cosine decay; else constant", "Schedule")
    warmup_iters: int = key(2000, "updates of linear warmup")
    lr_decay_iters: int = key(600000, "the update at which min_lr is reached")
    min_lr: float = key(6e-5, "final learning rate")

    max_bad_steps: int = key(10, "skipped updates in a row (not finite, or spikes) that end the run (0: never)", "Guard")
    spike_guard: bool = key(False, "skip updates whose loss or gradient norm is 6 sigma above that of the last 128")
    anomaly_dump: str = key(
        "", "where to write the batch and every layer's statistics when the guard ends the run; true: OUT/anomaly"
    )
    patience: int = key(0, "evaluations in a row without a better validation loss that end the run (0: never)")
    max_tokens: int = key(0, "tokens trained on in all that end the run, if max_iters does not earlier (0: no limit)")
    max_hours: float = key(0.0, "save and stop, to be resumed, before this process has run so long (0: no limit)")
    timeout: float = key(600.0, "seconds without progress, 64 MiB saved is some, that end a run and name what hangs (0: never)")
    allow_fault_injection: bool = key(False, "obey NANOGPT_FAULT, for tests")

    backend: str = key("auto", "of torch.distributed: auto is nccl on GPUs, gloo on CPUs", "System", ("auto", "nccl", "gloo"))
    fsdp: bool = key(
        False, "share out weights, gradients and moments over the processes (FSDP2), where one GPU cannot hold them; off: DDP"
    )
    device: str = key("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: str = key(
        "auto",
        "of activations and GEMMs; auto: bfloat16 on GPUs that have it, float16 on older ones, float32 elsewhere",
        "",
        ("auto", "float32", "bfloat16", "float16"),
    )
    compile: bool = key(False, "torch.compile the model; off, unlike nanoGPT: the kernels are fused already")
    kernels: str = key("auto", "backend of every op that has it", "", ("auto", "triton", "cuda", "cpp", "torch"))
    seed: int = key(1337, "of weights, dropout and data order")
    deterministic: bool = key(False, "bitwise repeatable on a GPU too, at some speed")
    peak_flops: float = key(0.0, "peak FLOP/s of one device in this dtype, for MFU (0: from the table of known GPUs)")

    def model(self, vocab_size: int) -> GPTConfig:
        """The shape of the network that these keys describe."""
        return GPTConfig(
            self.block_size, vocab_size, self.n_layer, self.n_head, self.n_embd, self.dropout, self.bias, self.gelu
        )

    def check(self) -> None:
        """Judges the values together; reads WORLD_SIZE, which torchrun sets.

        Raises:
            ValueError: naming the key, its value and what would do.
        """

        def require(name: str, holds: object, message: str) -> None:
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)}: {message}")

        self.model(1)
        for name in ("eval_interval", "log_interval", "eval_iters", "gradient_accumulation_steps", "batch_size", "max_iters"):
            require(name, getattr(self, name) >= 1, "must be at least 1")
        limits = ("max_bad_steps", "patience", "max_tokens", "max_hours", "timeout", "checkpoint_minutes")
        for name in ("resume", "weight_decay", "grad_clip", "warmup_iters", "min_lr", "peak_flops", *limits):
            require(name, getattr(self, name) >= 0, "must not be negative")
        require("seed", 0 <= self.seed < 2**31, "must be at least 0 and below 2**31")
        for name in ("beta1", "beta2"):
            require(name, 0 <= getattr(self, name) < 1, "must be at least 0 and below 1")
        require("learning_rate", self.learning_rate > 0, "must be positive")
        require("layer_lr_decay", 0 < self.layer_lr_decay <= 1, "must be above 0 and at most 1")
        require("freeze", self.freeze >= -1, "must be at least -1")
        require("keep_checkpoints", self.keep_checkpoints >= 2, "must be at least 2: one alone may prove unreadable")
        require("hellaswag", not self.hellaswag or self.eval_hellaswag_interval, "set --eval_hellaswag_interval too")
        if self.eval_hellaswag_interval:
            require("eval_hellaswag_interval", self.hellaswag, "set --hellaswag=FILE or --hellaswag=download too")
            message = f"must be a positive multiple of eval_interval={self.eval_interval}, whose evaluations it is part of"
            holds = self.eval_hellaswag_interval > 0 and self.eval_hellaswag_interval % self.eval_interval == 0
            require("eval_hellaswag_interval", holds, message)
        device = re.fullmatch(DEVICES, self.device)
        require("device", device, "expected auto, cpu, cuda, cuda:N or mps")
        check_init_from(self.init_from, ("scratch", "resume"))
        n = int(os.environ.get("WORLD_SIZE", "1"))
        require("fsdp", not self.fsdp or n > 1, "needs several processes: torchrun --nproc_per_node=N")
        require("fsdp", not (self.fsdp and self.compile), "not with compile=True, whose graph would end at every block")
        require(
            "gradient_accumulation_steps",
            self.gradient_accumulation_steps % n == 0,
            f"must be a multiple of the number of processes, {n}, which share it",
        )
        if self.decay_lr:
            limit, name = min((self.max_iters, "max_iters"), (self.lr_decay_iters, "lr_decay_iters"))
            message = f"is more than {name}={limit}, so learning_rate is never reached; set --warmup_iters too"
            require("warmup_iters", self.warmup_iters <= limit, message)
            require("min_lr", self.min_lr <= self.learning_rate, f"is more than learning_rate={self.learning_rate}")


def check_data(config: TrainConfig) -> None:
    """Ends the program where the dataset is not there, damaged, or too short for block_size; imports no torch.

    Only what this takes milliseconds to see: headers and sizes. A resumed run has its block_size from the checkpoint.
    """
    from nanogpt.data import find
    from nanogpt.data.shards import open_dataset

    try:
        data = open_dataset(find(config.dataset))
        data.shards("train")  # which there must be
        for split, shards in data.splits.items():
            longest = max(shard.count for shard in shards)
            if config.init_from == "scratch" and not config.resume and longest <= config.block_size:
                raise ValueError(
                    f"block_size={config.block_size} needs {config.block_size + 1} tokens in a row, not {longest} "
                    f"({data.path}, split {split})"
                )
    except (ValueError, OSError) as error:
        fail(error, "train")


def check_init_from(value: str, words: tuple[str, ...]) -> None:
    """ValueError unless it is one of the words, a size of GPT-2, or a path that exists."""
    known = (*words, *GPT2_SIZES)
    if value not in known and not os.path.exists(value):  # Path.exists raises for a name too long for the system
        raise ValueError(f"init_from={value}: neither {', '.join(known)} nor a path that exists{_nearest(value, known)}")


def parse(cls: type[T], argv: Sequence[str] | None = None, presets: Path | None = PRESETS, prog: str = "") -> T:
    """Reads ``[PRESET|FILE.py ...] --key=value --key value`` into a dataclass of :func:`key` fields, for a command.

    Prints the help and exits 0 on ``--help``; prints one line and exits 2 on a mistake. Arguments as for :func:`load`; ``prog``
    is the command's module in nanogpt, or its FILE.py.
    """
    escape_output()
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        print_help(usage(cls, presets, prog and ("python " + prog if prog.endswith(".py") else f"python -m nanogpt.{prog}")))
        raise SystemExit(0)
    try:
        return load(cls, argv, presets)
    except (ValueError, OSError) as error:
        fail(error, prog)


def print_help(text: str) -> None:
    """Prints it for a reader that may leave before its end, as ``head`` does."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fail(error: Exception, prog: str = "") -> NoReturn:
    """Ends the program on a mistake of the user's: one line on stderr (of each machine's first process), exit code 2."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{prog or 'error'}: {one_line(error)}", file=sys.stderr)
    raise SystemExit(2)


def one_line(error: Exception) -> str:
    """Its message, in which a line end, such as one in the name of a file, is escaped."""
    return str(error).replace("\n", "\\n")


def escape_output() -> None:
    """Has standard output escape what its encoding lacks, such as bytes of a path that are no UTF-8, as standard error does."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def load(cls: type[T], argv: Sequence[str], presets: Path | None = PRESETS) -> T:
    """Like :func:`parse`, for programs: options win over files, later ones over earlier ones.

    Args:
        cls: dataclass whose fields are int, float, bool or str; its ``check()``, where it has one, judges the result.
        argv: bare names and paths of config files, ``--key=value``, ``--key value``, ``--flag``.
        presets: folder of the config files that go by bare name; None where there are none.

    Raises:
        ValueError: for what cannot be understood, with the key, or the file and line.
    """
    known = {f.name: f for f in fields(cls)}
    files, options, rest = [], {}, list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            files.append(word)
            continue
        name, equals, text = word[2:].partition("=")
        if name not in known:
            raise ValueError(f"unknown key --{name}{_nearest(name, known, '--')}")
        if not equals:
            follows = bool(rest) and not rest[0].startswith("--")
            if known[name].type is bool and not (follows and rest[0].lower() in BOOLEANS):
                text = "true"
            elif follows:
                text = rest.pop(0)
            else:
                raise ValueError(f"--{name} needs a value: --{name}=VALUE")
        options[name] = _from_text(known[name], text)
    values = {}
    for name in files:
        values |= read_file(cls, _locate(name, presets))
    config = cls(**values | options)
    config.given = frozenset(values | options)
    if hasattr(config, "check"):
        config.check()
    return config


BOOLEANS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


def _from_text(f: Any, text: str) -> Any:
    """The value of an option: the field's type decides, so ``--out_dir=1`` is a string and ``--learning_rate=1`` a float."""
    if f.type is str:
        return _checked(f, text)
    if f.type is bool:
        if text.lower() not in BOOLEANS:
            raise ValueError(f"{f.name}={text}: expected true or false")
        return BOOLEANS[text.lower()]
    try:
        value = int(text)
    except ValueError:
        try:
            value = float(text)
        except ValueError:
            raise ValueError(f"{f.name}={text}: expected {'an integer' if f.type is int else 'a number'}") from None
    return _checked(f, value)


def _checked(f: Any, value: Any) -> Any:
    """The value in the field's type, if nothing is lost by it."""
    if type(value) in (int, float) and not abs(value) < 2.0**63:  # infinite and NaN as well
        raise ValueError(f"{f.name}={value}: expected a number below 2**63")
    if f.type is float and type(value) in (int, float):
        return float(value)
    if f.type is int and type(value) is float and value.is_integer():
        return int(value)  # --max_iters=1e4
    if type(value) is not f.type:
        raise ValueError(f"{f.name}={value!r}: expected {f.type.__name__}")
    choices = f.metadata.get("choices")
    if choices and value not in choices:
        raise ValueError(f"{f.name}={value}: expected one of {', '.join(choices)}")
    return value


def _nearest(name: str, known: Any, prefix: str = "") -> str:
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f"; did you mean {prefix}{found[0]}?" if found else ""


def _locate(name: str, presets: Path | None) -> Path:
    names = sorted(path.stem for path in presets.glob("*.py")) if presets else []
    if name in names:
        return presets / f"{name}.py"
    if os.path.isfile(name):
        return Path(name)
    if name.endswith(".py"):
        hint = f"; the preset {Path(name).stem} goes by that bare name" if Path(name).stem in names else ""
        raise ValueError(f"{name}: no such config file{hint}")
    raise ValueError(f"{name}: neither a preset nor a file{_nearest(name, names)}")


def read_file(cls: type, path: Path) -> dict[str, Any]:
    """The assignments of a config file, which is parsed and never run.

    Understood: comments, strings and numbers, earlier names and the defaults, ``+ - * / // % **``, str() int() float() min()
    max() and time.time(). An ``import`` does nothing. A name that starts with ``_`` is the file's own; any other must be
    a key.

    Raises:
        ValueError: ``FILE:LINE: ...`` for anything else.
    """
    known = {f.name: f for f in fields(cls)}
    names: dict[str, Any] = {f.name: f.default for f in fields(cls)}
    values: dict[str, Any] = {}
    line = 1
    try:
        for statement in ast.parse(path.read_bytes(), str(path)).body:
            line = statement.lineno
            if isinstance(statement, ast.Import) or (
                isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
            ):
                continue
            if not isinstance(statement, ast.Assign | ast.AnnAssign) or statement.value is None:
                raise ValueError("only `key = value` lines are understood; config files are read, not run")
            value = _evaluate(statement.value, names)
            for target in statement.targets if isinstance(statement, ast.Assign) else [statement.target]:
                if not isinstance(target, ast.Name):
                    raise ValueError(f"cannot assign to {ast.unparse(target)}")
                if target.id in known:
                    values[target.id] = value = _checked(known[target.id], value)
                elif not target.id.startswith("_"):
                    raise ValueError(f"unknown key {target.id}{_nearest(target.id, known)}")
                names[target.id] = value
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except SyntaxError as error:
        raise ValueError(f"{path}:{error.lineno}: {error.msg}") from None
    except (RecursionError, MemoryError):  # the parser's own limits
        raise ValueError(f"{path}:{line}: nested too deeply") from None
    except (ValueError, ArithmeticError, TypeError) as error:
        raise ValueError(f"{path}:{line}: {error}") from None
    return values


OPERATORS = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.FloorDiv: lambda a, b: a // b,
    ast.Mod: lambda a, b: a % b,
    ast.Pow: lambda a, b: a**b,
}
FUNCTIONS = {"str": str, "int": int, "float": float, "min": min, "max": max}


def _evaluate(node: ast.expr, names: dict[str, Any]) -> Any:
    match node:
        case ast.Constant(bool() | str() as value):
            return value
        case ast.Constant(int() | float() as value):
            return _number(value, node)
        case ast.Name(name) if name in names:
            return names[name]
        case ast.UnaryOp(ast.USub() | ast.UAdd() as sign, operand):
            value = _number(_evaluate(operand, names), node)
            return -value if isinstance(sign, ast.USub) else value
        case ast.BinOp(left, operator, right) if type(operator) in OPERATORS:
            a, b = _evaluate(left, names), _evaluate(right, names)
            if isinstance(operator, ast.Add) and isinstance(a, str) and isinstance(b, str):
                return a + b
            if isinstance(operator, ast.Pow) and abs(_number(b, node)) > 64:
                raise ValueError(f"{ast.unparse(node)}: exponent over 64")
            return _number(OPERATORS[type(operator)](_number(a, node), _number(b, node)), node)
        case ast.Call(ast.Name(name), [_, *_] as arguments, []) if name in FUNCTIONS:
            return FUNCTIONS[name](*[_evaluate(argument, names) for argument in arguments])
        case ast.Call(ast.Attribute(ast.Name("time"), "time"), [], []):
            return time.time()
    raise ValueError(f"{ast.unparse(node)}: neither a literal nor arithmetic on earlier names; config files are not run")


def _number(value: Any, node: ast.expr) -> int | float:
    """Bounded, so that no chain of powers in a file can eat the machine's memory."""
    if type(value) not in (int, float) or not abs(value) < 2.0**63:
        raise ValueError(f"{ast.unparse(node)}: arithmetic takes and gives numbers below 2**63")
    return value


def usage(cls: type, presets: Path | None = PRESETS, prog: str = "") -> str:
    """The text of ``--help``: each key with its type, default and one line."""
    lines = [f"usage: {prog or 'python -m nanogpt.train'} [{'PRESET|' * bool(presets)}FILE.py] [--key=value | --key value ...]"]
    if presets:
        names = sorted(path.stem for path in presets.glob("*.py"))
        lines += ["", f"Presets: {', '.join(names)}"]
    for f in fields(cls):
        if f.metadata.get("group"):
            lines += ["", f.metadata["group"]]
        choices = f.metadata.get("choices")
        kind = "|".join(choices) if choices else f.type.__name__
        lines.append(f"  --{f.name + ' ' + kind:<38} {f.metadata.get('help', '')} (default: {f.default!r})")
    return "\n".join(lines)
