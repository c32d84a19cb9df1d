"""Kills and corrupts real training runs, hundreds of them, and demands that each ends as the one that was left in peace.

    bash scripts/soak.sh --minutes=15

A run saves after every update. It is killed (SIGKILL, or SIGTERM) at a random time, again and again until it finishes; between
two starts a file of one of its checkpoints may lose a bit, its end, all of its sense or its name. Weights, optimizer state and
loss log must then be, bitwise, those of the run that nobody touched, and no restart may begin earlier than the newest
checkpoint that verifies. In between, hypothesis feeds damaged checkpoints and datasets to their readers, which must answer
with ValueError or the truth. The last line sums up; exit code 1 where anything was lost.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanogpt.config import TrainConfig, key, load, parse

if __name__ == "__main__":
    import importlib.util

    if importlib.util.find_spec("hypothesis") is None:
        raise SystemExit("soak: hypothesis is not installed; pip install hypothesis")

import numpy as np

from nanogpt import checkpoint
from nanogpt.data.shards import SIDECAR, SPLITS, open_dataset, write_shard
from nanogpt.saver import LOCK

LAST = 24  # updates
OPTIONS = {"device": "cpu", "n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 4, "dropout": 0.1}
OPTIONS |= {"gradient_accumulation_steps": 2, "max_iters": LAST, "lr_decay_iters": LAST, "warmup_iters": 2, "eval_interval": 7}
OPTIONS |= {"eval_iters": 2, "keep_checkpoints": 3, "checkpoint_minutes": 1e-9, "learning_rate": 1e-2, "min_lr": 1e-3}


@dataclass
class SoakConfig:
    minutes: float = key(15.0, "how long")
    seed: int = key(0, "of the times and kinds of damage (0: a new one, which is printed)")
    folder: str = key("", "where to work; left there if anything is lost (empty: a temporary one)")

    def check(self) -> None:
        if not 0 < self.minutes <= 24 * 60:
            raise ValueError(f"minutes={self.minutes}: must be more than 0, and a day at most")


class LostError(Exception):
    """Something that must not happen has happened."""


def child(options: list[str], output: str) -> None:
    """A training process."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    from nanogpt import train

    sys.exit(train.main(load(TrainConfig, options)))


class Soak:
    """One soak: the folder it works in, the undisturbed run, and what was counted."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.random, self.counts = folder, random.Random(seed), Counter()
        os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": sys.path[0]}
        self.processes = multiprocessing.get_context("forkserver")  # whose server has PyTorch loaded
        self.processes.set_forkserver_preload(["nanogpt.train"])
        self.data = folder / "data"
        self.data.mkdir(parents=True)
        generator = np.random.default_rng(0)
        entries = {}
        for split, count in (("train", 20_000), ("val", 2000)):
            tokens = (np.cumsum(generator.integers(-1, 2, count)) % 32).astype(np.uint16)
            entries[split] = {"shards": [write_shard(self.data / f"{split}_000000.bin", tokens)]}
        (self.data / SIDECAR).write_text(json.dumps({"vocab_size": 32, "splits": entries}))
        self.reference = folder / "reference"
        if self.wait(self.start(self.reference, False)) != 0:
            raise LostError(f"the undisturbed run failed:\n{self.output(self.reference)}")
        self.expected = self.end(self.reference)

    def start(self, out_dir: Path, resume: bool) -> multiprocessing.Process:
        keys = OPTIONS | {"dataset": self.data, "out_dir": out_dir, "init_from": "resume" if resume else "scratch"}
        options = [f"--{name}={value}" for name, value in keys.items()]
        Path(f"{out_dir}.log").write_text("")
        process = self.processes.Process(target=child, args=(options, f"{out_dir}.log"))
        process.start()
        return process

    @staticmethod
    def wait(process: multiprocessing.Process, seconds: float = 300.0) -> int:
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
            raise LostError("a run hangs")
        return process.exitcode

    @staticmethod
    def output(out_dir: Path) -> str:
        return Path(f"{out_dir}.log").read_text()

    @staticmethod
    def records(out_dir: Path, kind: str) -> list[dict]:
        path = out_dir / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [record for record in map(json.loads, lines) if record["kind"] == kind]

    def end(self, out_dir: Path) -> tuple[list, dict[str, bytes]]:
        """Losses and final tensors of a run."""
        path = out_dir / f"step-{LAST}"
        checkpoint.verify(path)
        tensors = {
            f"{file}/{name}": t.numpy().tobytes()
            for file in (checkpoint.MODEL, checkpoint.OPTIM)
            for name, t in checkpoint.load_tensors(path / file).items()
        }
        return [(r["iter"], r["loss"], r["grad_norm"]) for r in self.records(out_dir, "train")], tensors

    def run(self, out_dir: Path, deadline: float) -> None:
        """One run, disturbed until it has finished or the time is up, then left to finish."""
        while True:
            found = checkpoint.steps(out_dir)
            newest = int(checkpoint.find(out_dir).name[5:]) if found else 0
            process = self.start(out_dir, bool(found))
            number = self.disturb(process, out_dir, newest) if time.monotonic() < deadline else 0
            code = self.wait(process)
            if number:
                self.counts[signal.Signals(number).name] += 1
            if code not in (0, -number):
                raise LostError(f"{out_dir}: exit code {code}\n{self.output(out_dir)}")
            self.judge_start(out_dir, newest)
            left = checkpoint.find(out_dir).name if newest else "step-0"
            if int(left[5:]) < newest:
                raise LostError(f"{out_dir}: {left} is the newest that is left, and step-{newest} was whole")
            status = out_dir / "status.json"
            if code == 0 and json.loads(status.read_text())["state"] == "finished":
                break
            if self.random.random() < 0.5:
                self.damage(out_dir)
            if self.random.random() < 0.05:
                self.damage_all(out_dir)
        if self.end(out_dir) != self.expected:
            raise LostError(f"{out_dir}: another end than the undisturbed run's")
        self.counts["runs"] += 1
        shutil.rmtree(out_dir)

    def disturb(self, process: multiprocessing.Process, out_dir: Path, newest: int) -> int:
        """Sends a signal at a random moment after a random update, or before any; 0 where the process has ended before."""
        target = newest + self.random.randrange(8)
        while process.exitcode is None and max(checkpoint.steps(out_dir), default=0) < target:
            process.join(0.005)
        process.join(self.random.uniform(0, 0.1))
        if process.exitcode is not None:
            return 0
        number = self.random.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
        try:
            os.kill(process.pid, number)
        except ProcessLookupError:  # it has just ended: the fork server, whose child it is, hears of that first
            return 0
        return number

    def judge_start(self, out_dir: Path, newest: int) -> None:
        """Where the last process began: at the newest checkpoint that was whole, or a newer one that it put back."""
        starts = [line for line in self.output(out_dir).splitlines() if line.startswith("resuming from ")]
        if starts:
            began = int(starts[0].split("step-")[1].split(";")[0])
            self.counts["resumes"] += 1
            if began < newest:
                raise LostError(f"{out_dir}: resumed from {began}, but {newest} was whole")
        elif newest and "updates: 0 to" in self.output(out_dir):
            raise LostError(f"{out_dir}: began at 0, though step-{newest} was whole")

    def damage(self, out_dir: Path) -> None:
        """Harms one file of a checkpoint, if another whole one is left."""
        whole = []
        for step in checkpoint.steps(out_dir):
            try:
                checkpoint.verify(out_dir / f"step-{step}")
                whole.append(step)
            except ValueError:
                continue
        if len(whole) > 1:
            self.harm(out_dir / f"step-{self.random.choice(whole)}")

    def damage_all(self, out_dir: Path) -> None:
        """Harms every checkpoint: the next start must refuse, and touch nothing; then they are put back."""
        if not checkpoint.steps(out_dir):
            return
        spare = self.folder / "spare"
        shutil.copytree(out_dir, spare)
        for step in checkpoint.steps(out_dir):
            self.harm(out_dir / f"step-{step}")
        before = contents(out_dir)
        for resume in (True, False):
            if self.wait(self.start(out_dir, resume)) != 2:
                raise LostError(f"{out_dir}: a run without a readable checkpoint went on\n{self.output(out_dir)}")
        if contents(out_dir) != before:
            raise LostError(f"{out_dir}: a refused run changed something")
        self.counts["refusals"] += 2
        shutil.rmtree(out_dir)
        spare.rename(out_dir)

    def harm(self, path: Path) -> None:
        names = [name for name in (*checkpoint.FILES, checkpoint.MANIFEST) if (path / name).is_file()]
        name = self.random.choice(names)
        content = bytearray((path / name).read_bytes())
        blank = b" \n" if name == checkpoint.MANIFEST else b""  # another byte there is no damage
        places = [i for i, byte in enumerate(content) if byte not in blank]
        kind = self.random.choice(["flip", "flip", "truncate", "garbage", "remove"])
        if kind == "flip":
            content[self.random.choice(places)] ^= 1 << self.random.randrange(8)
        elif kind == "truncate":
            del content[self.random.randrange(len(content)) :]
        elif kind == "garbage":
            content = self.random.randbytes(len(content))
        if kind == "remove":
            (path / name).unlink()
        else:
            (path / name).write_bytes(content)
        self.counts["corruptions"] += 1

    def fuzz(self) -> None:
        """Damaged checkpoints and datasets, as hypothesis invents them: readers raise ValueError, or read what was written."""
        from hypothesis import HealthCheck, Phase, given, seed, settings
        from hypothesis import strategies as st

        whole = contents(self.reference / f"step-{LAST}")
        shards = contents(self.data)
        place = self.folder / "fuzz" / f"step-{LAST}"
        truth = self.expected[1]
        deep = b"<deep>"  # stands for many brackets, which would fill the report of a failure
        counts = self.counts
        options = settings(
            max_examples=50,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
        )

        def edited(content: bytes, edits: list[tuple]) -> bytes:
            result = bytearray(content)
            for where, drop, insert in edits:
                at = int(where * len(result))
                result[at : at + drop] = insert
            return bytes(result).replace(deep, b"[" * 100_000)

        text = st.sampled_from([b"{}", b"[]", b"null", b"-1", b"1e999", b'"', deep, b"\\u0000", b"..", b"NaN", b"{"])
        edit = st.tuples(st.floats(0, 1), st.integers(0, 9), st.one_of(st.binary(max_size=9), text))
        edits = st.lists(edit, min_size=1, max_size=4)

        def lay_out(folder: Path, files: dict[str, bytes]) -> None:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            for name, content in files.items():
                (folder / name).write_bytes(content)

        def refit(files: dict[str, bytes]) -> dict[str, bytes]:
            """With a manifest that fits, as whoever means harm would write it."""
            manifest = json.loads(files[checkpoint.MANIFEST])
            for name in checkpoint.FILES:
                manifest["files"][name] = {"size": len(files[name]), "sha256": sha256(files[name]).hexdigest()}
            manifest.pop("sha256")
            manifest["sha256"] = checkpoint.digest(manifest)
            return files | {checkpoint.MANIFEST: json.dumps(manifest).encode()}

        @options
        @given(st.sampled_from(sorted(whole)), edits, st.booleans())
        def read_checkpoint(name, changes, fitting):
            files = whole | {name: edited(whole[name], changes)}
            fitting = fitting and name != checkpoint.MANIFEST
            lay_out(place, refit(files) if fitting else files)
            counts["fuzzed"] += 1
            try:
                path = checkpoint.find(place.parent)
                state = checkpoint.run_state(path)
                checkpoint.model_config(state, path)
                read = {
                    f"{file}/{name}": t.numpy().tobytes()
                    for file in (checkpoint.MODEL, checkpoint.OPTIM)
                    for name, t in checkpoint.load_tensors(path / file).items()
                }
            except ValueError:
                return
            assert fitting or read == truth

        @options
        @given(st.sampled_from(sorted(shards)), edits)
        def read_dataset(name, changes):
            lay_out(place, shards | {name: edited(shards[name], changes)})
            counts["fuzzed"] += 1
            try:
                data = open_dataset(place)
                for split in SPLITS:
                    data.fingerprint(split)
            except ValueError:
                return

        for test in (read_checkpoint, read_dataset):
            seed(self.random.randrange(2**32))(test)()


def contents(folder: Path) -> dict[str, bytes]:
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file() and path.name != LOCK}
    return {name: path.read_bytes() for name, path in files.items()}


def main(argv: list[str] | None = None) -> int:
    config = parse(SoakConfig, argv, presets=None, prog="scripts/soak.py")
    seed = config.seed or random.SystemRandom().randrange(1, 2**31)
    folder = Path(config.folder or tempfile.mkdtemp(prefix="nanogpt-soak-"))
    checkpoint.log.setLevel("ERROR")  # what is passed over is told by the hundred
    begin, fuzzing, lost, soak = time.monotonic(), 0.0, "", None
    try:
        soak = Soak(folder, seed)
        deadline = time.monotonic() + config.minutes * 60
        while time.monotonic() < deadline:
            soak.run(folder / "run", deadline)
            while fuzzing <= 0.15 * (time.monotonic() - begin):
                started = time.monotonic()
                soak.fuzz()
                fuzzing += time.monotonic() - started
    except (LostError, AssertionError, ValueError) as error:  # ValueError: of checkpoint.find, where nothing is left
        lost = str(error)
        print(f"soak: {lost}", file=sys.stderr)
    c = soak.counts if soak else Counter()
    facts = (
        f"{(time.monotonic() - begin) / 60:.1f} minutes, seed {seed}",
        f"{c['SIGKILL'] + c['SIGTERM']} kills ({c['SIGKILL']} SIGKILL, {c['SIGTERM']} SIGTERM)",
        f"{c['corruptions']} corruptions",
        f"{c['resumes']} resumes",
        f"{c['refusals']} starts without a readable checkpoint refused",
        f"{c['runs']} runs ended bitwise like the undisturbed one",
        f"{c['fuzzed']} files fuzzed",
        f"LOST, see above and {folder}" if lost else "none lost, none restarted at 0",
    )
    print(f"soak: {', '.join(facts)}")
    if not lost:
        shutil.rmtree(folder)
    return 1 if lost else 0


if __name__ == "__main__":
    raise SystemExit(main())
