"""Tiny runs of the trainer, in this process and in ones of their own, and what they leave behind; for several test files."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from nanogpt import checkpoint, train
from nanogpt.config import TrainConfig, load
from nanogpt.saver import Saver

ROOT = Path(__file__).parent.parent
TINY = {"device": "cpu", "n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 4, "eval_iters": 3}
TINY |= {"gradient_accumulation_steps": 2, "max_iters": 12, "eval_interval": 5, "warmup_iters": 2, "lr_decay_iters": 12}
TINY |= {"learning_rate": 1e-2, "min_lr": 1e-3}


def walk(path):
    """A dataset of random walks over 32 tokens, in nanoGPT's headerless form."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 20_000), ("val", 3000)):
        (np.cumsum(generator.integers(-1, 2, count)) % 32).astype(np.uint16).tofile(path / f"{split}.bin")
    (path / "dataset.json").write_text('{"vocab_size": 32}')
    return path


def arguments(data, out_dir, **keys):
    return [f"--{key}={value}" for key, value in (TINY | {"dataset": data, "out_dir": out_dir} | keys).items()]


def run(data, out_dir, **keys):
    """A run in this process."""
    torch.set_num_threads(1)  # as in start(): PyTorch's own sums, unlike those of csrc/, depend on it
    return train.main(load(TrainConfig, arguments(data, out_dir, **keys)))


def start(command, **environment):
    """A run in processes of its own; (exit code, stdout, stderr)."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run([sys.executable, *map(str, command)], env=env, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


def records(out_dir, kind):
    lines = (json.loads(line) for line in (Path(out_dir) / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def losses(out_dir):
    return [(r["iter"], r["loss"]) for r in records(out_dir, "train")]


def status(out_dir):
    return json.loads((Path(out_dir) / "status.json").read_text())


# A run that sends itself a signal while update N runs on rank R, as a scheduler would
KILLED = """
import os, signal, sys
from nanogpt import config, distributed, train
number, rank, at = sys.argv[1:4]
put = distributed.Readback.put
def signalled(self, it, values):
    if it == int(at) and self.world.rank == int(rank):
        os.kill(os.getpid(), getattr(signal, number))
    return put(self, it, values)
distributed.Readback.put = signalled
sys.exit(train.main(config.load(config.TrainConfig, sys.argv[4:])))
"""

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def save_forever(out_dir, pipe):
    """Saves one checkpoint after another in the background, telling first the step it starts from, then each one saved."""
    checkpoint.recover(out_dir)
    checkpoint.tidy(out_dir)
    step = int(checkpoint.find(out_dir).name[5:]) if checkpoint.steps(out_dir) else 0
    pipe.send(step)
    saver = Saver(out_dir, keep=2)
    while True:
        step += 1
        tensors = {name: torch.full((width,), float(step)) for name, width in (("w", 200_000), ("b", 7))}
        saver.save(step, tensors, tensors, {"iter": step})
        assert saver.wait()
        pipe.send(step)


def save_until(out_dir, step, call):
    """One save and what follows it, ended by SIGKILL at the CALL-th of its calls that change the directory."""
    left = [call]

    def killing(function):
        def counted(*args, **keys):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **keys)

        return counted

    for name in ("mkdir", "fsync", "rename", "unlink", "rmdir"):
        setattr(os, name, killing(getattr(os, name)))
    tensors = {"w": torch.full((1000,), float(step))}
    saver = Saver(out_dir, keep=2)
    assert saver.save(step, tensors, tensors, {"iter": step}, wait=True)
