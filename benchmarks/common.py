"""What every benchmark shares: command line, machine facts, correctness gate, interleaved timing, rows, plots.

Method. A provider is checked first, forward and gradients, by the rule of the tests: its largest error against fp32 (fp64
where the dtype is fp32) may be at most three times PyTorch's own at the same dtype. One that is wrong, or raises, gets a row
that says so and no time. The rest are timed in turns (timing.py). A row holds median, p20 and p80, and what machine, versions
and commit it is of.
"""

import argparse
import csv
import functools
import importlib.util
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
from timing import Stats, Work, ceilings, interleaved, quantiles  # noqa: F401 (for all benchmarks)
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # run as a script from anywhere, installed or not
    sys.path.insert(0, str(ROOT))

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# Data sheets: bytes/s of memory; peak FLOP/s are in nanogpt.monitor. First match wins.
BANDWIDTH = {
    "H200": 4.8e12,
    "H100 PCIe": 2.0e12,
    "H100 NVL": 3.9e12,
    "H100": 3.35e12,
    "A100-SXM4-80GB": 2.039e12,
    "A100-PCIE-80GB": 1.935e12,
    "A100": 1.555e12,
    "RTX 4090": 1.008e12,
    "RTX 3090": 0.936e12,
}

_MEASURED = ("ms", "p20", "p80", "n", "tflops", "gbps", "percent", "tokens_per_s", "mfu", "mfu_causal", "peak_mib")
_MEASURED += ("error", "loss")
_ORIGIN = ("device", "driver", "sm_mhz", "load", "torch", "triton", "commit", "date", "command")
COLUMNS = ("op", "case", "provider", "pass", "dtype", "status", *_MEASURED, *_ORIGIN)


def data_sheet(device_name: str, dtype: torch.dtype) -> Work:
    """Peak FLOP/s and bytes/s as the vendor states them; 0 where they are not known."""
    from nanogpt.monitor import peak_flops

    bandwidth = next((rate for name, rate in BANDWIDTH.items() if name in device_name), 0.0)
    return Work(peak_flops(device_name, dtype) or 0.0, bandwidth)


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name} x{torch.get_num_threads()}"


@functools.cache
def machine(device: str) -> dict[str, str]:
    """Device, driver, versions, commit and date: the columns that tie a row to where it comes from."""
    commit = os.environ.get("NANOGPT_COMMIT") or _output("git", "rev-parse", "--short", "HEAD") or "unknown"
    if _output("git", "status", "--porcelain", "--untracked-files=no", "--", "kernels", "nanogpt", "csrc", "benchmarks/*.py"):
        commit += "+"  # with changes of its own
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = ""
    gpu = device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name(device) if gpu else _cpu_name(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0] if gpu else "",
        "torch": torch.__version__,
        "triton": triton_version,
        "commit": commit,
        "date": date.today().isoformat(),
        "command": " ".join(["python", *(os.path.relpath(a, ROOT) if a.endswith(".py") else a for a in sys.argv)]),
    }


def sm_clock(device: str) -> str:
    """MHz now, so that a row of a throttled GPU shows."""
    if not device.startswith("cuda"):
        return ""
    return _output("nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits").split("\n")[0]


def slug(device_name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in device_name.lower().replace("nvidia", "")).split())


class Parser(argparse.ArgumentParser):
    """Answers a mistake with one line, as the tools of ``nanogpt`` do."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _device(name: str) -> str:
    """The name of a device, if that is there."""
    from nanogpt.distributed import pick_device

    try:
        found = pick_device(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return found.type if name == "auto" else name


def positive(text: str) -> int:
    """A count, for an option's ``type``."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text}: expected an integer of at least 1")
    return int(text)


def parser(description: str) -> Parser:
    """The options every benchmark has."""
    p = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", type=_device, default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", choices=DTYPES, help="default: bf16 on a GPU, fp32 on a CPU")
    p.add_argument("--providers", type=lambda s: s.split(","), help="names, separated by commas; default: all")
    p.add_argument("--quick", action="store_true", help="fewer shapes and repetitions")
    p.add_argument("--tiny", action="store_true", help="the smallest form, for tests")
    p.add_argument("--out", type=Path, help="folder, or a .csv to append to; default benchmarks/results/DEVICE-DATE")
    p.add_argument("--plot", action="store_true", help="also draw the rows of this run as OUT/OP.png")
    return p


class Bench:
    """One run of one benchmark: its options, ceilings, and the rows written so far.

    Args:
        op: the name in the rows and of the file.
        args: parsed options of :func:`parser`.
    """

    def __init__(self, op: str, args: argparse.Namespace):
        if args.plot and importlib.util.find_spec("matplotlib") is None:  # before measuring, not after
            print("--plot: matplotlib is not installed; pip install matplotlib", file=sys.stderr)
            raise SystemExit(2)
        self.op, self.args, self.device = op, args, args.device
        self.gpu = args.device.startswith("cuda")
        if self.gpu:
            torch.cuda.set_device(torch.device(args.device).index or 0)
        torch._dynamo.config.cache_size_limit = 64  # one function compiled for many shapes
        args.dtype = args.dtype or ("bf16" if self.gpu else "fp32")
        self.dtype = DTYPES[args.dtype]
        self.facts = machine(args.device)
        out = args.out or ROOT / "benchmarks" / "results" / f"{slug(self.facts['device'])}-{self.facts['date']}"
        self.path = out if out.suffix == ".csv" else out / f"{op}.csv"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.open("a").close()
        except (OSError, ValueError) as error:  # a NUL is a ValueError
            print(f"--out={args.out}: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        self.rows: list[dict] = []
        self.offered: dict[str, None] = {}  # names of the providers that there are here
        torch.manual_seed(1337)
        print(f"# {op}: " + ", ".join(f"{k} {v}" for k, v in self.facts.items() if v and k != "command"), flush=True)

    @functools.cached_property
    def ceilings(self) -> Work:
        """Measured FLOP/s of a large matmul and bytes/s of a large copy, in this dtype on this device."""
        return ceilings(self.device, self.dtype)

    def wanted(self, providers: dict[str, Callable]) -> dict[str, Callable]:
        """Those of the providers that were asked for."""
        asked = self.args.providers
        self.offered |= dict.fromkeys(providers)
        return {name: f for name, f in providers.items() if asked is None or name in asked}

    def row(self, case: str, provider: str, pass_: str, status: str = "ok", stats: Stats | None = None, **more) -> None:
        """Appends a row to the file at once, and prints it."""
        row = {"op": self.op, "case": case, "provider": provider, "pass": pass_, "dtype": self.args.dtype, "status": status}
        if stats:
            row |= {"ms": f"{stats.median:.5g}", "p20": f"{stats.p20:.5g}", "p80": f"{stats.p80:.5g}", "n": stats.n}
        row |= {key: f"{value:.5g}" if isinstance(value, float) else value for key, value in more.items()}
        load = "" if self.gpu else f"{os.getloadavg()[0]:.1f}"  # of all processes: above the number of cores, times say little
        row |= self.facts | {"sm_mhz": sm_clock(self.device), "load": load}
        unknown = row.keys() - set(COLUMNS)
        assert not unknown, unknown
        with self.path.open("a+", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            file.seek(0)
            header = file.readline()
            if not header:
                writer.writeheader()
            elif header.strip() != ",".join(COLUMNS):
                raise ValueError(f"{self.path}:1: other columns than this version writes; choose another --out")
            writer.writerow(row)  # at the end, wherever the file was read
        self.rows.append(row)
        shown = [f"{row[c]} {unit}" for c, unit in _SHOWN.items() if row.get(c, "") != ""]
        print(f"{case:<28} {provider:<22} {pass_:<5} {status[:90] if status != 'ok' else '  '.join(shown)}", flush=True)

    def timed_row(self, case: str, provider: str, pass_: str, stats: Stats, work: Work, ceilings: Work | None = None, **more):
        """A row with rates, and on a GPU the percentage of the (measured) ceiling that bounds this work."""
        seconds = stats.median / 1e3
        limit = (
            (ceilings or self.ceilings) if self.gpu else Work()
        )  # a CPU's caches hold our shapes: no one bandwidth bounds them
        floor = max(amount / rate if rate else 0.0 for amount, rate in zip(work, limit))
        if work.flops:
            more["tflops"] = work.flops / seconds / 1e12
        if work.bytes:
            more["gbps"] = work.bytes / seconds / 1e9
        if floor:
            more["percent"] = 100 * floor / seconds
        self.row(case, provider, pass_, stats=stats, **more)

    def compare(
        self,
        case: str,
        providers: dict[str, Callable],
        reference: Callable,
        inputs: Sequence[Tensor],
        work: dict[str, Work],
        solve: Callable[[Sequence[Tensor], Sequence[Tensor]], list[Tensor]] | None = None,
    ) -> None:
        """Checks, times and reports one case.

        Args:
            providers: name -> function of the inputs that returns a tensor or several, or a :class:`Own`.
            reference: the same in plain PyTorch, at whatever dtype its inputs have.
            inputs: leaves; those that require a gradient get one in the check and in the passes `bwd` and `both`.
            work: the passes to time (`fwd`, `bwd`, `both`) and what each must do.
            solve: (inputs, dy) -> the reference's outputs and gradients, where there is a way with less memory.
        """
        torch._functorch.config.donated_buffer = False  # which forbids the repeated backward of the pass `bwd`
        train = any(x.requires_grad for x in inputs) and set(work) != {"fwd"}
        solve = solve or (lambda inputs, dy: evaluate(reference, inputs, dy, train))
        with torch.no_grad():
            dy = [torch.randn_like(y) for y in outputs(reference(*inputs))]
        wide = torch.float64 if self.dtype == torch.float32 else torch.float32
        exact = solve([widened(x, wide) for x in inputs], [g.to(wide) for g in dy])
        allowed = [error_of(a, b) for a, b in zip(solve(inputs, dy), exact, strict=True)]
        good: dict[str, Own] = {}
        peaks, errors = {}, {}
        for name, provider in self.wanted(providers).items():
            own = provider if isinstance(provider, Own) else Own(provider)
            try:
                before = self._reset_peak()
                got = own.collect(evaluate(own.function, own.prepare(inputs), dy, train))
                peaks[name] = self._peak(before)
                status, errors[name] = verdict(got, exact, allowed)
                del got
            except Exception as error:  # any provider may fail in any way: the row says how, the others go on
                status = failure(error)
            if status == "ok":
                good[name] = own
            else:
                self.row(case, name, "check", status, error=errors.get(name, ""))
        del exact
        for pass_, least in work.items():
            calls = {}
            for name, own in good.items():
                try:
                    calls[name] = one_pass(own.function, own.prepare(inputs), dy, pass_)
                    calls[name]()
                except Exception as error:
                    calls.pop(name, None)
                    self.row(case, name, pass_, failure(error))
            for name, stats in self.time(calls).items():
                self.timed_row(case, name, pass_, stats, least, peak_mib=peaks[name], error=errors[name])

    def _reset_peak(self) -> int:
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() if self.gpu else 0

    def _peak(self, before: int) -> float | str:
        return (torch.cuda.max_memory_allocated() - before) / 2**20 if self.gpu else ""

    def time(self, calls: dict[str, Callable[[], object]]) -> dict[str, Stats]:
        """Interleaved timing of functions without arguments; about 0.1 s each when quick, else 0.4 s."""
        budget = 0.0 if self.args.tiny else 100.0 if self.args.quick else 400.0  # ms a provider
        return interleaved(calls, self.device, budget)

    def finish(self) -> None:
        """Draws the plot if asked, and names the file; ends the program where no provider was one that was asked for."""
        if self.args.providers and self.offered and not self.offered.keys() & set(self.args.providers):
            if not self.path.stat().st_size:
                self.path.unlink()
            print(f"--providers {','.join(self.args.providers)}: there are {', '.join(self.offered)}", file=sys.stderr)
            raise SystemExit(2)
        if self.args.plot and any(r.get("ms") for r in self.rows):
            plot(self.rows, self.path.with_name(f"{self.op}.png"))
        print(f"# rows in {self.path}", flush=True)


_SHOWN = {"ms": "ms", "tflops": "TFLOP/s", "gbps": "GB/s", "percent": "% of ceiling", "tokens_per_s": "tokens/s"}
_SHOWN |= {"mfu": "% mfu", "mfu_causal": "% mfu_causal", "peak_mib": "MiB", "error": "x torch's error", "loss": "loss"}


def failure(error: Exception) -> str:
    """The status of a provider that raised."""
    return f"failed: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


class Own(NamedTuple):
    """A provider that wants its inputs in another form, made outside of the timing."""

    function: Callable
    prepare: Callable[[Sequence[Tensor]], Sequence[Tensor]] = lambda inputs: inputs
    collect: Callable[[list[Tensor]], list[Tensor]] = lambda got: got  # outputs and gradients back in the common form


def outputs(y: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [y] if isinstance(y, Tensor) else list(y)


def widened(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A leaf of its own in a wider dtype (integers as they are)."""
    return x.detach().to(dtype).requires_grad_(x.requires_grad) if x.is_floating_point() else x


def evaluate(function: Callable, inputs: Sequence[Tensor], dy: Sequence[Tensor], train: bool) -> list[Tensor]:
    """[outputs, gradient of each input that requires one]."""
    if not train:
        with torch.no_grad():
            return outputs(function(*inputs))
    ys = outputs(function(*inputs))
    kept = [y.detach().clone() for y in ys]  # an op's backward may overwrite what its forward returned
    return [*kept, *torch.autograd.grad(ys, [x for x in inputs if x.requires_grad], dy)]


def error_of(got: Tensor, exact: Tensor) -> float:
    """max |got - exact|; NaN stays NaN."""
    pairs = zip(got.reshape(-1).split(1 << 26), exact.reshape(-1).split(1 << 26))  # fp32 copies stay small
    wide = torch.float64 if exact.dtype == torch.float64 else torch.float32
    return torch.stack([(g.to(wide) - e.to(wide)).abs().max() for g, e in pairs]).max().item()


def verdict(got: Sequence[Tensor], exact: Sequence[Tensor], allowed: Sequence[float], factor: float = 3.0) -> tuple[str, float]:
    """("ok" or what is wrong, the largest ratio of an error to PyTorch's own at the same dtype)."""
    worst = 0.0
    for i, (g, e, a) in enumerate(zip(got, exact, allowed, strict=True)):
        what = f"result {i}"  # outputs, then gradients
        if g.shape != e.shape:
            return f"wrong: {what} has shape {tuple(g.shape)}, not {tuple(e.shape)}", float("nan")
        a = max(a, 2.0**-22 * e.float().abs().max().item())  # PyTorch may be exact, and fp32 ends there
        error = error_of(g, e)
        worst = max(worst, error / a) if error == error else float("nan")
        if not error <= factor * a:
            return f"wrong: {what} is off by {error:.3g}, {factor:g} x {a:.3g} allowed", error / a
    return "ok", worst


def one_pass(function: Callable, inputs: Sequence[Tensor], dy: Sequence[Tensor], pass_: str) -> Callable[[], object]:
    """The call to time: `fwd` without autograd, `bwd` of a graph kept from one forward, or `both`."""
    leaves = [x for x in inputs if x.requires_grad]
    if pass_ == "fwd":

        def call():
            with torch.no_grad():
                return function(*inputs)
    elif pass_ == "bwd":
        ys = outputs(function(*inputs))

        def call():
            return torch.autograd.grad(ys, leaves, dy, retain_graph=True)
    else:

        def call():
            return torch.autograd.grad(outputs(function(*inputs)), leaves, dy)

    return call


def plot(rows: list[dict], path: Path, unit: str | None = None) -> None:
    """Bars per case and provider: TFLOP/s, else GB/s, else tokens/s, else ms; one panel a pass."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in rows if r.get("ms") and r["status"] == "ok"]
    unit = unit or next((u for u in ("tokens_per_s", "tflops", "gbps") if all(r.get(u) for r in rows)), "ms")
    label = {"tokens_per_s": "tokens/s", "tflops": "TFLOP/s", "gbps": "GB/s", "ms": "ms"}[unit]
    passes, cases, names = (list(dict.fromkeys(r[key] for r in rows)) for key in ("pass", "case", "provider"))
    figure, axes = plt.subplots(len(passes), 1, figsize=(max(6, 1.6 * len(cases)), 3.2 * len(passes)), squeeze=False)
    for axis, pass_ in zip(axes[:, 0], passes):
        for i, name in enumerate(names):
            value = {r["case"]: float(r[unit]) for r in rows if r["pass"] == pass_ and r["provider"] == name}
            xs = [j + (i - len(names) / 2 + 0.5) * 0.8 / len(names) for j in range(len(cases))]
            axis.bar(xs, [value.get(c, 0.0) for c in cases], 0.8 / len(names), label=name)
        axis.set_xticks(range(len(cases)), cases, rotation=20, ha="right", fontsize=8)
        axis.set_ylabel(label)
        axis.set_title(f"{rows[0]['op']} {pass_}, {rows[0]['dtype']}, {rows[0]['device']}", fontsize=9)
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def backend(name: str, function: Callable) -> Callable:
    """The function with ``kernels`` asked for this backend while it runs."""
    from kernels import dispatch

    def call(*inputs):
        before = dispatch.requested()
        dispatch.use(name)
        try:
            return function(*inputs)
        finally:
            dispatch.use(before)

    return call
