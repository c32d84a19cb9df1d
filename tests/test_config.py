"""nanogpt.config: options, config files that are read and never run, presets, and values judged together."""

import os
import subprocess
import sys
from dataclasses import dataclass

import pytest

from nanogpt.config import PRESETS, GPTConfig, TrainConfig, key, load, parse, read_file, usage

# nanoGPT's train.py, all keys and defaults; ours differ where the comment says so
NANOGPT = {
    "out_dir": "out",
    "eval_interval": 2000,
    "log_interval": 1,
    "eval_iters": 200,
    "eval_only": False,
    "always_save_checkpoint": True,
    "init_from": "scratch",
    "wandb_log": False,
    "wandb_project": "owt",
    "wandb_run_name": "gpt2",
    "dataset": "openwebtext",
    "gradient_accumulation_steps": 40,
    "batch_size": 12,
    "block_size": 1024,
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
    "dropout": 0.0,
    "bias": False,
    "learning_rate": 6e-4,
    "max_iters": 600000,
    "weight_decay": 0.1,
    "beta1": 0.9,
    "beta2": 0.95,
    "grad_clip": 1.0,
    "decay_lr": True,
    "warmup_iters": 2000,
    "lr_decay_iters": 600000,
    "min_lr": 6e-5,
    "backend": "auto",  # nccl
    "device": "auto",  # cuda
    "dtype": "auto",  # bfloat16 where supported, else float16
    "compile": False,  # True
}


def write(tmp_path, text):
    path = tmp_path / "mine.py"
    path.write_text(text)
    return path


def test_defaults_are_nanogpts():
    config = TrainConfig()
    assert {name: getattr(config, name) for name in NANOGPT} == NANOGPT


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--learning_rate=1"], "learning_rate", 1.0),
        (["--learning_rate", "1e-4"], "learning_rate", 1e-4),
        (["--weight_decay=1"], "weight_decay", 1.0),
        (["--out_dir=a=b"], "out_dir", "a=b"),
        (["--out_dir=1"], "out_dir", "1"),
        (["--out_dir="], "out_dir", ""),
        (["--compile=False"], "compile", False),
        (["--compile", "false"], "compile", False),
        (["--compile=true"], "compile", True),
        (["--compile"], "compile", True),
        (["--compile", "--seed=1"], "compile", True),
        (["--batch_size", "32"], "batch_size", 32),
        (["--max_iters=1e4"], "max_iters", 10000),
        (["--max_iters=600_000"], "max_iters", 600000),
        (["--seed=1", "--seed=2"], "seed", 2),
        (["--device=cuda:3"], "device", "cuda:3"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_option(argv, name, value):
    found = getattr(load(TrainConfig, argv), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--learning_rat=1"], "unknown key --learning_rat; did you mean --learning_rate?"),
        (["--n-layer=4"], "unknown key --n-layer; did you mean --n_layer?"),
        (["shakespear_char"], "shakespear_char: neither a preset nor a file; did you mean"),
        (["config/train_gpt2.py"], "config/train_gpt2.py: no such config file; the preset train_gpt2 goes by that bare name"),
        (["--batch_size"], "--batch_size needs a value"),
        (["--batch_size", "--seed=1"], "--batch_size needs a value"),
        (["--batch_size=1.5"], "batch_size=1.5: expected int"),
        (["--batch_size=many"], "batch_size=many: expected an integer"),
        (["--learning_rate=nan"], "learning_rate=nan: expected a number below"),
        (["--learning_rate=inf"], "learning_rate=inf: expected a number below"),
        (["--max_iters=" + "9" * 400], f"max_iters={'9' * 400}: expected a number below"),
        (["--compile=maybe"], "compile=maybe: expected true or false"),
        (["--dtype=fp16"], "dtype=fp16: expected one of auto, float32"),
    ],
    ids=lambda value: value[0][:30] if isinstance(value, list) else "",
)
def test_mistaken_option(argv, message):
    with pytest.raises(ValueError, match="^" + message.replace("*", r"\*").replace("?", r"\?")):
        load(TrainConfig, argv)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--n_head=5", "n_embd=768: must be a multiple of n_head=5"),
        ("--n_layer=0", "n_layer=0: must be at least 1"),
        ("--dropout=1", "dropout=1.0: must be at least 0 and below 1"),
        ("--batch_size=0", "batch_size=0: must be at least 1"),
        ("--grad_clip=-1", "grad_clip=-1.0: must not be negative"),
        ("--beta2=1", "beta2=1.0: must be at least 0 and below 1"),
        ("--learning_rate=0", "learning_rate=0.0: must be positive"),
        ("--min_lr=1", "min_lr=1.0: is more than learning_rate=0.0006"),
        ("--max_iters=100", "warmup_iters=2000: is more than max_iters=100"),
        ("--lr_decay_iters=100", "warmup_iters=2000: is more than lr_decay_iters=100"),
        ("--keep_checkpoints=1", "keep_checkpoints=1: must be at least 2"),
        ("--device=gpu", "device=gpu: expected auto, cpu, cuda, cuda:N or mps"),
        ("--init_from=gpt2-xxl", "init_from=gpt2-xxl: neither scratch, resume, gpt2, "),
        ("--init_from=best", "init_from=best: neither scratch, "),
        ("--seed=-1", "seed=-1: must be at least 0"),
    ],
)
def test_values_judged_together(option, message):
    with pytest.raises(ValueError, match="^" + message):
        load(TrainConfig, [option])


def test_accumulation_is_divided_over_the_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"^gradient_accumulation_steps=40: must be a multiple of the number of processes, 3"):
        load(TrainConfig, [])
    assert load(TrainConfig, ["--gradient_accumulation_steps=6"]).gradient_accumulation_steps == 6


def test_constant_learning_rate_needs_no_schedule():
    assert load(TrainConfig, ["--decay_lr=False", "--max_iters=20", "--learning_rate=1e-6"]).max_iters == 20


def test_model_config_refuses_a_padded_vocabulary_smaller_than_the_real_one():
    with pytest.raises(ValueError, match="real_vocab_size=66: must be 0 to vocab_size=65"):
        GPTConfig(vocab_size=65, real_vocab_size=66)


def test_every_preset_reads():
    names = {path.stem for path in PRESETS.glob("*.py")}
    assert names >= {
        "train_gpt2",
        "train_shakespeare_char",
        "finetune_shakespeare",
        "eval_gpt2_xl",
        "shakespeare_cpu",
        "plays_cpu",
    }
    for name in names:
        values = read_file(TrainConfig, PRESETS / f"{name}.py")
        config = TrainConfig(**values)
        config.check()
        if name.startswith("train_gpt2"):  # OpenAI's batch of half a million tokens, on 8 GPUs or 1
            assert config.batch_size * config.block_size * config.gradient_accumulation_steps == 491520
            assert config.gradient_accumulation_steps % 8 == 0


def test_preset_values_are_nanogpts():
    config = load(TrainConfig, ["train_shakespeare_char"])
    expected = {"batch_size": 64, "block_size": 256, "n_layer": 6, "n_embd": 384, "dropout": 0.2, "learning_rate": 1e-3}
    expected |= {"max_iters": 5000, "min_lr": 1e-4, "beta2": 0.99, "warmup_iters": 100, "gradient_accumulation_steps": 1}
    assert {name: getattr(config, name) for name in expected} == expected
    config = load(TrainConfig, ["shakespeare_cpu"])
    expected = {"batch_size": 12, "block_size": 64, "n_layer": 4, "n_head": 4, "n_embd": 128, "dropout": 0.0, "max_iters": 2000}
    assert {name: getattr(config, name) for name in expected} == expected


def test_options_win_over_files_wherever_they_stand(tmp_path):
    path = write(tmp_path, "n_layer = 3\nbatch_size = 5\n")
    config = load(TrainConfig, ["--n_layer=2", "train_shakespeare_char", str(path)])
    assert (config.n_layer, config.batch_size, config.block_size) == (2, 5, 256)


def test_config_file_as_nanogpts_users_have_it(tmp_path):
    path = write(
        tmp_path,
        """# train a miniature character-level shakespeare model
import time
out_dir = 'out-shakespeare-char'
eval_interval = 250 # keep frequent because we'll overfit
wandb_log = False # override via command line if you like
wandb_run_name = 'ft-' + str(time.time())
gradient_accumulation_steps = 5 * 8
batch_size = 12
block_size = batch_size * 2 ** 3 - 1
_tokens = batch_size * block_size
max_iters = 10 * _tokens // 2
learning_rate = 1e-3 # with baby networks can afford to go a bit higher
min_lr = learning_rate / 10
weight_decay = 1
lr_decay_iters = max_iters
warmup_iters = min(100, max_iters)
dropout: float = 0.2
backend = 'nccl'
# device = 'cpu'
compile = False
""",
    )
    config = load(TrainConfig, [str(path)])
    assert config.wandb_run_name.startswith("ft-1")
    assert (config.gradient_accumulation_steps, config.block_size, config.max_iters) == (40, 95, 5700)
    assert (config.min_lr, config.weight_decay, config.dropout) == (1e-4, 1.0, 0.2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch_size = 1\nlearning_rat = 1", "2: unknown key learning_rat; did you mean learning_rate"),
        ("import os\nout_dir = os.getcwd()", "2: os.getcwd.*config files are not run"),
        ("open('MARK', 'w').write('x')", "1: only `key = value` lines"),
        ("out_dir = open('MARK', 'w').name", "1: open.*config files are not run"),
        ("out_dir = __import__('os').system('touch MARK')", "1: __import__.*config files are not run"),
        ("out_dir = ''.__class__", "1: ''.__class__.*config files are not run"),
        ("def f(): pass", "1: only"),
        ("from base import *", "1: only"),
        ("if True:\n  seed = 1", "1: only"),
        ("seed = 9 ** 99", "1: 9 [*][*] 99: exponent over 64"),
        ("seed = 9 ** 9 ** 9", "1: 9 [*][*] 9 [*][*] 9: "),
        ("learning_rate = 1e300 ** 60", "1: "),
        ("seed = 2 ** 62 * 4", "1: .*numbers below"),
        ("out_dir = 'x' * 10 ** 9", "1: .*numbers below"),
        ("seed = 1 / 0", "1: division by zero"),
        ("seed = 'x'", "1: seed='x': expected int"),
        ("compile = 1", "1: compile=1: expected bool"),
        ("batch_size = 0.5", "1: batch_size=0.5: expected int"),
        ("out_dir, seed = 1", "1: cannot assign to"),
        ("seed = (", "1: '[(]' was never closed"),
        ("seed = 1" + " + 1" * 20000, "1: nested too deeply"),
        ("seed = " + "-" * 20000 + "1", "1: nested too deeply"),
    ],
    ids=lambda text: text[:30],
)
def test_config_file_refuses(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=f"^{path}:{message}"):
        load(TrainConfig, [str(path)])
    assert list(tmp_path.iterdir()) == [path]  # nothing ran: no MARK


@dataclass
class Sample:
    start: str = key("\n", "the prompt", "Prompt")
    top_k: int = key(200, "draw from the k likeliest")


def test_other_commands_share_the_machinery(capsys):
    assert parse(Sample, ["--start=a=b", "--top_k", "5"], presets=None) == Sample("a=b", 5)
    assert parse(Sample, ["--start=--help"], presets=None).start == "--help"
    with pytest.raises(SystemExit) as stop:
        parse(Sample, ["train_gpt2"], presets=None, prog="sample")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "sample: train_gpt2: neither a preset nor a file\n"


def test_help_names_every_key_with_type_and_default():
    text = usage(TrainConfig)
    for name, default in NANOGPT.items():
        line = next(line for line in text.splitlines() if line.startswith(f"  --{name} "))
        assert f"(default: {default!r})" in line
        assert len(line.split("(default")[0].split()) >= 3  # name, type, some words
    assert "train_shakespeare_char" in text


@pytest.mark.parametrize("module", ["nanogpt.train", "nanogpt.data.prepare", "nanogpt.data"])
def test_help_whose_reader_left(module):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", module, "--help"], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("argv", [["--learning_rat=1"], ["--n_head=5"], ["--help"]], ids=" ".join)
def test_answer_comes_before_torch_is_imported(argv):
    code = (
        "import sys; from nanogpt.config import *; sys.modules['torch'] = None; parse(TrainConfig, sys.argv[1:], prog='train')"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
    assert done.returncode == (0 if argv == ["--help"] else 2)
    if done.returncode:
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith("train: ")


def test_names_longer_than_the_systems_and_files_that_cannot_be_read_are_one_line(tmp_path, monkeypatch, capsys):
    name, hidden = 300 * "x", tmp_path / "hidden.py"
    hidden.write_text("")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    for argument, message in (
        (f"--init_from={name}", f"init_from={name}: neither "),
        (name, f"{name}: neither a preset nor a file"),
        (f"{name}.py", f"{name}.py: no such config file"),
        (str(hidden), f"{hidden}: Permission denied\n"),
    ):
        with pytest.raises(SystemExit) as stopped:
            parse(TrainConfig, [argument], prog="train")
        err = capsys.readouterr().err
        assert (stopped.value.code, err.count("\n")) == (2, 1)
        assert err.startswith(f"train: {message}")
