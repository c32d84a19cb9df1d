"""Tokens per second of a preparation beside a plain loop over tiktoken's encode_ordinary_batch; its memory; killed and resumed.

    python benchmarks/prepare.py [--quick] [--megabytes 1000] [--keep DIR]

The corpus is Shakespeare's plays, their speeches in another order on each pass, as .jsonl of documents of about 4 kB. The
preparation is the command itself: it reads, encodes in as many processes as there are cores, splits, writes, syncs, hashes.
The loop reads the same file and encodes with as many threads, and writes nothing. Both run side by side in slices of some
seconds: while one works the other is stopped, so that a busy machine slows both alike. `slice` is ms per million tokens over
slices, `whole` all of it from start to end, `cpu` the processor time of all its processes, in ms. Then the preparation is done
again, killed twice, resumed, and compared by byte.
"""

import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import common
import numpy as np

from nanogpt.data import assets, plays
from nanogpt.data.shards import HEADER_BYTES, open_dataset
from nanogpt.data.splitting import Draw
from nanogpt.tokenizer import GPT2Tokenizer

BATCH = 1024  # documents the loop encodes at a time


def corpus(path: Path, size: int) -> None:
    """Writes about `size` bytes of documents; another order of the speeches on each pass."""
    speeches = [speech for play in plays.read(assets.fetch(assets.PLAYS)) for speech in play.split("\n\n")]
    shuffle = random.Random(1337).shuffle
    written, held = 0, ""
    with open(path, "w", encoding="utf-8") as file:
        while True:
            shuffle(speeches)
            for speech in speeches:
                held += speech + "\n\n"
                if len(held) > 4000:
                    written += file.write(json.dumps({"text": held}) + "\n")
                    held = ""
                    if written >= size:
                        return


def documents(path: Path) -> Iterator[list[str]]:
    with open(path, encoding="utf-8") as file:
        batch = []
        for line in file:
            batch.append(json.loads(line)["text"])
            if len(batch) == BATCH:
                yield batch
                batch = []
        if batch:
            yield batch


def loop(path: Path, count, cpu) -> None:
    """The plain loop; shared are `count`, tokens so far, and `cpu`, seconds of processor at the end."""
    encoding = GPT2Tokenizer()._encoding
    for batch in documents(path):
        count.value += sum(map(len, encoding.encode_ordinary_batch(batch, num_threads=os.cpu_count()))) + len(batch)
    cpu.value = time.process_time()


class Runner:
    """A process with its children that can be stopped and go on."""

    def __init__(self, pid: int, tokens: Callable[[], int], ended: Callable[[], bool]):
        self.pid, self.tokens, self.ended = pid, tokens, ended
        self.active, self.slices, self.memory = 0.0, [], []
        self.open = 0.0  # seconds of slices in which no block was finished, part of the next

    def signal(self, number: int) -> None:
        for pid in family(self.pid):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue  # it ended

    def work(self, seconds: float) -> None:
        """Lets it work for a slice, and keeps (seconds, tokens), after the first tokens, and the memory at its end."""
        before = self.tokens()
        start = time.perf_counter()
        self.signal(signal.SIGCONT)
        while not (over := self.ended()) and time.perf_counter() - start < seconds:
            time.sleep(0.02)
        spent = time.perf_counter() - start
        self.active += spent
        if not over:
            self.memory.append(resident(self.pid))
            self.signal(signal.SIGSTOP)
            self.open += spent if before else 0.0
            if before and self.tokens() > before:
                self.slices.append((self.open, self.tokens() - before))
                self.open = 0.0


def family(pid: int) -> list[int]:
    """A process and its children's children."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(member for child in children for member in family(int(child)))]


def resident(pid: int) -> float:
    """MiB of memory of a process and its children."""
    pages = 0
    for member in family(pid):
        try:
            pages += int(Path(f"/proc/{member}/statm").read_text().split()[1])
        except OSError:
            continue  # it ended
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def children() -> float:
    """Seconds of processor of all processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def start(path: Path, out: Path) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "nanogpt.data.prepare",
        str(path),
        f"--out={out}",
        "--tokenizer=gpt2",
        "--val_fraction=0.005",
    ]
    environment = os.environ | {"PYTHONPATH": str(common.ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)


def written(out: Path) -> int:
    """Tokens on disk of a preparation, finished or not."""
    folder = next((p for p in (out.with_name(f".{out.name}.partial"), out) if p.exists()), out)
    return sum(max(0, file.stat().st_size - HEADER_BYTES) // 2 for file in folder.glob("*.bin"))


def verdict(out: Path, path: Path, total: int) -> str:
    """Whether the dataset holds what the loop counted, and the first documents exactly."""
    data = open_dataset(out)
    if data.count("train") + data.count("val") != total:
        return f"wrong: {data.count('train') + data.count('val')} tokens, the loop counted {total}"
    encoder = GPT2Tokenizer()
    first = next(documents(path))
    want: dict[bool, list[int]] = {False: [], True: []}
    for text, is_val in zip(first, Draw(0.005)(np.arange(len(first)))):
        want[bool(is_val)] += [*encoder.encode(text), encoder.eot]
    for split, ids in (("train", want[False]), ("val", want[True])):
        if data.shards(split)[0].tokens[: len(ids)].tolist() != ids:
            return f"wrong: {split} begins otherwise"
    return "ok"


def killed(path: Path, out: Path, whole: Path, total: int, shares: tuple[float, ...]) -> str:
    """Kills a preparation at these shares of its tokens, finishes it, and compares it with the one that was not killed."""
    begun = out.with_name(f".{out.name}.partial")
    for share in shares:
        process = start(path, out)
        while process.poll() is None and not (begun.exists() and written(out) >= share * total):
            time.sleep(0.02)
        process.kill()
        process.wait()
        if out.exists():
            return "wrong: killed, and there is a dataset"
    if start(path, out).wait():
        return "failed: the resumed preparation"
    names = sorted(file.name for file in whole.iterdir())
    equal = names == sorted(file.name for file in out.iterdir())
    return "ok" if equal and all((whole / n).read_bytes() == (out / n).read_bytes() for n in names) else "wrong: other bytes"


def main(argv: list[str] | None = None) -> common.Bench:
    p = common.parser(__doc__)
    p.add_argument("--megabytes", type=float, default=1000.0, help="of the corpus; 64 when quick, 1 when tiny")
    p.add_argument("--keep", type=Path, help="a folder for corpus and datasets that stays")
    args = p.parse_args(argv)
    bench = common.Bench("prepare", args)
    megabytes = 1.0 if args.tiny else 64.0 if args.quick else args.megabytes
    case = f"jsonl-{megabytes:g}MB"
    with tempfile.TemporaryDirectory(dir=args.keep) as folder:
        path, out = Path(folder) / "plays.jsonl", Path(folder) / "whole"
        corpus(path, int(megabytes * 1e6))
        count, cpu = multiprocessing.Value("q", 0), multiprocessing.Value("d", 0.0)
        before = children()
        plain = multiprocessing.get_context("fork").Process(target=loop, args=(path, count, cpu))
        plain.start()
        ours = start(path, out)
        runners = {
            "ours": Runner(ours.pid, lambda: written(out), lambda: ours.poll() is not None),
            "tiktoken": Runner(plain.pid, lambda: count.value, lambda: not plain.is_alive()),
        }
        for runner in runners.values():
            runner.signal(signal.SIGSTOP)
        seconds = 0.2 if args.tiny else 1.0 if args.quick else 4.0
        while not all(runner.ended() for runner in runners.values()):
            for runner in runners.values():
                if not runner.ended():
                    runner.work(seconds)
        plain.join()
        status = "failed: the preparation" if ours.wait() else verdict(out, path, count.value)
        if status != "ok":
            bench.row(case, "ours", "check", status)
        for name, runner in runners.items():
            peak = max(runner.memory, default="") if name == "ours" else ""  # the loop's process has PyTorch in it
            if runner.slices:
                stats = common.quantiles([1e9 * s / n for s, n in runner.slices])
                bench.row(case, name, "slice", status, stats, tokens_per_s=1e9 / stats.median, peak_mib=peak)
            spent = cpu.value if name == "tiktoken" else children() - before - cpu.value
            bench.row(case, name, "cpu", status, common.quantiles([1e3 * spent]), tokens_per_s=count.value / spent)
            whole = common.quantiles([1e3 * runner.active])
            bench.row(case, name, "whole", status, whole, tokens_per_s=count.value / runner.active, peak_mib=peak)
        curve = runners["ours"].memory
        print("# MiB of the preparation's processes: " + " ".join(f"{m:.0f}" for m in curve[:: max(1, len(curve) // 20)]))
        started = time.perf_counter()
        shares = (0.0,) if args.tiny else (1 / 3, 2 / 3)  # of one block there is all or nothing
        status = killed(path, Path(folder) / "killed", out, count.value, shares)
        bench.row(case, "ours", "killed", status, common.quantiles([1e3 * (time.perf_counter() - started)]))
    bench.finish()
    return bench


if __name__ == "__main__":
    main()
