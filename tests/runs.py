"""Tiny runs of the trainer, in this process and in ones of their own, and what they leave behind; for several test files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from nanogpt import train
from nanogpt.config import TrainConfig, load

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
