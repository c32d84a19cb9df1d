"""What a run tells about itself: speed, MFU, the GPU's sensors, where its time went; to the terminal, OUT/metrics.jsonl and
trackers.

MFU (model FLOPs utilisation) is printed under two names, because projects count differently: `mfu` as nanoGPT and PaLM do, 6N
+ 12 L C T FLOPs a token, and `mfu_causal` with half the attention, 6N + 6 L C T. Of a GPU whose peak is not known, neither.
"""

import atexit
import errno
import json
import logging
import math
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from nanogpt.config import TrainConfig
from nanogpt.goodput import Ledger
from nanogpt.telemetry import Telemetry

log = logging.getLogger(__name__)

# Dense 16-bit FLOP/s with fp32 accumulation, from NVIDIA's data sheets; TF32 has half of it from Ampere (2020) on.
PEAKS = {
    r"NVIDIA B200.*": 2250e12,
    r"NVIDIA H200 NVL": 835e12,
    r"NVIDIA (H200|GH200).*": 989e12,
    r"NVIDIA H100 NVL": 835e12,
    r"NVIDIA H100 PCIe": 756e12,
    r"NVIDIA H100 80GB HBM3": 989e12,
    r"NVIDIA A100.*": 312e12,
    r"NVIDIA L40S": 362e12,
    r"NVIDIA L40": 181e12,
    r"NVIDIA L4": 121e12,
    r"NVIDIA A40": 149.7e12,
    r"NVIDIA A10": 125e12,
    r"NVIDIA RTX A6000": 154.8e12,
    r"NVIDIA GeForce RTX 5090": 209.5e12,
    r"NVIDIA GeForce RTX 4090": 165.2e12,
    r"NVIDIA GeForce RTX 3090": 71e12,
    r"Tesla V100-SXM.*": 125e12,
    r"Tesla V100-PCIE.*": 112e12,
    r"Tesla T4": 65e12,
}
BEFORE_AMPERE = ("Tesla",)  # float16 only


def peak_flops(name: str, dtype: torch.dtype) -> float | None:
    """The peak FLOP/s of a GPU by torch's name for it; None where it is not known, which is never guessed."""
    for pattern, peak in PEAKS.items():
        if re.fullmatch(pattern, name):
            if name.startswith(BEFORE_AMPERE):
                return peak if dtype == torch.float16 else None
            return peak / 2 if dtype == torch.float32 else peak
    return None


class Throughput:
    """Time per step and what follows from it. Evaluations and saves are left out by :meth:`start` after them.

    Args:
        tokens: a step, over all processes.
        flops, flops_causal: per token.
        peak: FLOP/s of all devices together, None where not known.
    """

    def __init__(
        self, tokens: int, flops: int, flops_causal: int, peak: float | None, clock: Callable[[], float] | None = None
    ):
        self.tokens, self.flops, self.flops_causal, self.peak = tokens, flops, flops_causal, peak
        self.clock = clock or time.perf_counter
        self.steps, self.seconds = 0, 0.0
        self.start()

    def start(self) -> None:
        self.last = self.clock()

    def step(self) -> None:
        """A step has ended."""
        now = self.clock()
        self.seconds += now - self.last
        self.steps += 1
        self.last = now

    def rates(self) -> dict[str, float]:
        """ms a step, tokens_per_s, mfu and mfu_causal as fractions, over the steps since the last call."""
        seconds = self.seconds / self.steps
        rates = {"ms": seconds * 1e3, "tokens_per_s": self.tokens / seconds}
        if self.peak:
            rates["mfu"] = rates["tokens_per_s"] * self.flops / self.peak
            rates["mfu_causal"] = rates["tokens_per_s"] * self.flops_causal / self.peak
        self.steps, self.seconds = 0, 0.0
        return rates


class MetricsFile:
    """OUT/metrics.jsonl: one JSON object a line, each with its `kind`: start, train, eval, checkpoint, health or end.

    Args:
        path: the file; continued if it exists.
        start: the update the run (re)starts with; what an earlier run logged beyond it is dropped, since it happens again.
        evaluated: whether the evaluation before that update was done already.
        resumed: whether the run continues an earlier one; else nothing of the file is kept.

    Attributes:
        past: all records that were there, those dropped included.
    """

    def __init__(self, path: Path, start: int, evaluated: bool, resumed: bool):
        self.past = list(_records(path)) if path.exists() else []
        kept = [line for line, record in self.past if _precedes(record, start, evaluated)]
        self.past = [record for _, record in self.past]
        partial = path.with_name(f".{path.name}")
        partial.write_text("".join(line + "\n" for line in kept if resumed))
        os.replace(partial, path)
        self.file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by close()
        self.pending, self.refused = b"", False
        self._lock = threading.Lock()  # the GPU's thread writes too

    def write(self, record: dict[str, Any]) -> None:
        """Appends a line; on a full disk it waits in memory, and is written with the first that finds space."""
        line = json.dumps({k: _plain(v) for k, v in record.items()}, allow_nan=False).encode() + b"\n"
        with self._lock:
            self.pending += line
            try:
                while self.pending:
                    self.pending = self.pending[self.file.write(self.pending) :]
                self.refused = False
            except OSError as error:
                if not self.refused:
                    log.warning("%s: %s; its lines wait in memory", self.file.name, error.strerror)
                self.refused = True

    def close(self) -> None:
        with self._lock:
            self.file.close()


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(line, record) of each line of a metrics file that is one; the others are named, but for a last one cut short."""
    lines = path.read_bytes().decode(errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if isinstance(record["kind"], str) and type(record["iter"]) is int:
                yield line, record
                continue
        except (ValueError, TypeError, KeyError, RecursionError):
            pass
        if number < len(lines):  # what follows the last newline was cut short by a crash, or is nothing
            log.warning("%s:%d: not a record, dropped: %.80s", path, number, line)


def _precedes(record: dict[str, Any], start: int, evaluated: bool) -> bool:
    if record["kind"] == "train":
        return record["iter"] < start
    return record["iter"] < start + (record["kind"] != "eval" or evaluated)


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they are written as strings, which float() reads."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class Console:
    """Lines on stdout; on a terminal, a progress bar below them."""

    def __init__(self, start: int, end: int):
        self.progress = None
        if sys.stdout.isatty():
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self.progress = Progress(*columns, transient=True)
            self.task = self.progress.add_task("training", completed=start, total=end)
            self.progress.start()

    def print(self, line: str) -> None:
        if self.progress is None:
            try:
                print(line, flush=True)
            except BrokenPipeError:  # its reader is gone, as `| tee` is after Ctrl-C, which this process saves after
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):  # into a file: Python keeps the line for the next print
                    raise
        else:
            self.progress.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def advance(self, done: int) -> None:
        if self.progress is not None:
            self.progress.update(self.task, completed=done)

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()


def trackers(config: TrainConfig, out_dir: Path) -> list[Callable[[dict[str, float], int], None]]:
    """Functions that take scalars by name and the update they belong to: TensorBoard's and W&B's, where asked for.

    Raises:
        ValueError: where a package is not installed.
    """
    found = []
    if config.tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError("tensorboard=True: not installed; pip install tensorboard") from error
        writer = SummaryWriter(str(out_dir / "tensorboard"))

        def close() -> None:
            with suppress(OSError):  # which was told when it came
                writer.close()

        atexit.register(close)  # its thread dies with the program, and with it what it has not written yet
        found.append(lambda values, it: [writer.add_scalar(name, value, it) for name, value in values.items()])
    if config.wandb_log:
        try:
            import wandb
        except ImportError as error:
            raise ValueError("wandb_log=True: not installed; pip install wandb") from error
        run = wandb.init(project=config.wandb_project, name=config.wandb_run_name, config=asdict(config), dir=str(out_dir))
        found.append(lambda values, it: run.log(values, step=it))
    return found


class Monitor:
    """Everything that the main process reports; one call for each kind of news.

    Args:
        config: of the run.
        device: of this process.
        throughput: counts the steps.
        start: the first update of this run.
        evaluated: whether the evaluation before it was done by an earlier run.
        resumed: whether the run continues an earlier one.
        last: the number of updates of the whole run; None: max_iters.
        started: when this process was, by time.time(); None: now.
        tokens: that were trained on before the first update of this run.
    """

    def __init__(
        self,
        config: TrainConfig,
        device: torch.device,
        throughput: Throughput,
        start: int,
        evaluated: bool,
        resumed: bool,
        last: int | None = None,
        started: float | None = None,
        tokens: int = 0,
    ):
        self.config, self.device, self.throughput, self.it = config, device, throughput, start
        self.start, self.tokens = start, tokens
        self.last = config.max_iters if last is None else last
        out_dir = Path(config.out_dir)
        self.trackers = trackers(config, out_dir)
        # An evaluation alone leaves the record of the training as it is
        self.metrics = None if config.eval_only else MetricsFile(out_dir / "metrics.jsonl", start, evaluated, resumed)
        continued = resumed or begun_before(out_dir)
        self.ledger = Ledger(started or time.time(), self.metrics.past if self.metrics and continued else [], start)
        self.console = Console(start, self.last)
        self.telemetry = Telemetry(device, warn=self.health)
        self._record("start", start, {})

    @contextmanager
    def spending(self, kind: str) -> Iterator[None]:
        """Around an evaluation or a checkpoint: the time is no update's."""
        if kind == "checkpoint":
            self._record(kind, self.it, {})
        with self.ledger.spend(kind):
            yield
        self.throughput.start()

    def begin(self) -> None:
        """The first update is about to start."""
        self.ledger.enter("training")
        self.throughput.start()

    def train(self, it: int, loss: float, norm: float, lr: float, why: str = "") -> None:
        """After update ``it``; reported every log_interval, and whenever the update was skipped, for the reason given."""
        self.it = it + 1
        self.throughput.step()
        self.console.advance(it + 1)
        if it % self.config.log_interval and not why:
            return
        rates, gpu = self.throughput.rates(), self.telemetry.read()
        if self.device.type == "cuda":
            gpu["peak_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        if gpu.get("gpu_power_w"):
            world = int(os.environ.get("WORLD_SIZE", "1"))
            gpu["tokens_per_joule"] = rates["tokens_per_s"] / world / gpu["gpu_power_w"]
        eta = (self.last - it - 1) * rates["ms"] / 1e3
        values = {"loss": loss, "lr": lr, "grad_norm": norm, **rates, **gpu, "eta_s": eta}
        tokens = self.tokens + (it + 1 - self.start) * self.throughput.tokens
        self._record("train", it, values | {"tokens": tokens} | ({"skipped": why} if why else {}))
        mfu = f"{rates['mfu']:.2%}, causal {rates['mfu_causal']:.2%}" if "mfu" in rates else "n/a"
        line = f"iter {it}: loss {loss:.4f}, time {rates['ms']:.2f}ms, mfu {mfu}, lr {lr:.2e}, norm {norm:.3f}"
        line += f", {rates['tokens_per_s']:,.0f} tok/s"
        for name, form in (("peak_memory_gib", "{:.1f}GiB"), ("gpu_power_w", "{:.0f}W"), ("gpu_temperature_c", "{:.0f}C")):
            if name in gpu:
                line += ", " + form.format(gpu[name])
        self.print(f"{line}, eta {duration(eta)}" + (f": {why}, update skipped" if why else ""))

    def evaluation(self, it: int, figures: dict[str, float]) -> None:
        self._record("eval", it, figures)
        shown = [f"{name.replace('_', ' ')} {value:.4f}" for name, value in figures.items() if not name.endswith("_stderr")]
        self.print(f"step {it}: {', '.join(shown)}")

    def health(self, message: str) -> None:
        """What the GPU's sensors say is wrong; from their thread."""
        self.print(message)
        self._record("health", self.it, {"message": message})

    def print(self, line: str) -> None:
        self.console.print(line)

    def close(self, it: int, state: str, reason: str = "") -> None:
        self.telemetry.close()
        self._record("end", it, {"state": state, "reason": reason})
        if self.metrics:
            self.print(self.ledger.summary())
            self.metrics.close()
        self.console.close()

    def _record(self, kind: str, it: int, values: dict[str, Any]) -> None:
        if self.metrics:
            spent = self.ledger.spent()
            self.metrics.write({"kind": kind, "iter": it, "time": time.time(), **values, "spent": spent})
        scalars = {f"{kind}/{name}": value for name, value in values.items() if not isinstance(value, str)}
        for track in list(self.trackers if scalars else ()):
            try:
                track(scalars, it)
            except OSError as error:  # such as a full disk, which ends no run
                log.warning("a tracker is given up: %s", error)
                self.trackers.remove(track)


def spending(log: Monitor | None, kind: str) -> AbstractContextManager:
    """:meth:`Monitor.spending` where there is a monitor."""
    return log.spending(kind) if log else nullcontext()


def write_status(out_dir: Path, it: int, state: str, reason: str = "") -> None:
    """OUT/status.json: running, finished, preempted or failed, and why. Exit codes do not tell: torchrun replaces them."""
    partial = out_dir / ".status.json"
    try:
        status = {"state": state, "iter": it, "reason": reason, "time": time.time(), "launch": launch()}
        partial.write_text(json.dumps(status) + "\n")
        os.replace(partial, out_dir / "status.json")
    except OSError as error:  # a full disk ends no run
        log.warning("%s: not written: %s", out_dir / "status.json", error.strerror)


def launch() -> str:
    """What tells the torchrun that started this process, again and again if need be, from any other; empty without one.

    Its id alone does not, which is "none" by default, nor its pid, which is 1 in many a container.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ""
    agent = os.getppid()
    try:
        began = Path(f"/proc/{agent}/stat").read_text().rpartition(")")[2].split()[19]  # in ticks since the machine's start
    except OSError:  # no Linux
        began = ""
    return f"{os.environ['TORCHELASTIC_RUN_ID']} {socket.gethostname()} {agent} {began}"


def begun_before(out_dir: Path) -> bool:
    """Whether the run in a directory is this launch's own, begun by an attempt before this one."""
    try:
        status = json.loads((out_dir / "status.json").read_bytes())
        return launch() != "" and status["launch"] == launch()
    except (OSError, ValueError, KeyError, TypeError):  # none, or not ours
        return False


def duration(seconds: float) -> str:
    """72.4 -> 1m12s; at most two units."""
    seconds = round(seconds)
    for size, unit, smaller, small_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if seconds >= size:
            return f"{seconds // size}{unit}{seconds % size // smaller:02d}{small_unit}"
    return f"{seconds}s"
