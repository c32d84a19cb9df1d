"""The whole training step of a GPT-2, ours beside plain PyTorch: tokens/s, MFU, peak memory, time to the first step.

    python benchmarks/train_step.py --size 124M --batch 64            # all providers, in turns, on this GPU
    python benchmarks/train_step.py --providers ours --breakdown      # by component; --profile keeps the traces

A step is forward, backward, gradient clipping and AdamW on one micro-batch of T tokens a sequence. Providers:

    eager               plain PyTorch, autocast, fp32 residual stream, PyTorch's choice of attention; AdamW as nanoGPT takes it:
                        fused on a GPU, not on a CPU;  eager-fused, on a CPU: with PyTorch's fused AdamW
    compile-flash       the same under torch.compile, FlashAttention 2
    compile-cudnn       the same, cuDNN's attention
    compile-cudnn-low   the same, residual stream in 16 bits: the strongest of them
    ours                nanogpt.model with the kernels that --kernels=auto picks;  ours-torch: with the PyTorch references
    ours-exact          on a CPU with AMX: ours with fp32 products; `ours`, as the trainer does, multiplies pairs of bfloat16
                        numbers there (float32_matmul_precision "high")
    ours-compile        ours under torch.compile;  compile-max: compile-cudnn-low with max-autotune.  Only if asked for by name

All start from the same weights and see the same batch. Before it is timed, a provider's loss and gradients must be as close to
fp32 as plain PyTorch's with a 16-bit residual stream are, within three times, parameter by parameter. Under precision "high"
gradients in fp32 may be off by 2^-14 of their norm: TF32 rounds each factor to 2^-11.
"""

import gc
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import breakdown
import common
import torch
import torch.nn as nn
from baseline import BaselineGPT, adamw
from torch import Tensor

from kernels import cpu, dispatch
from kernels.linear import split_products

STARTED = float(os.environ.get("TRAIN_STEP_STARTED", "0"))  # by the parent process, before it started this one
VOCABULARY = 50304


class Size(NamedTuple):
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    batch: int  # sequences a step unless --batch says otherwise: what an 80 GB GPU holds
    vocab_size: int = VOCABULARY


SIZES = {
    "tiny": Size(2, 2, 64, 32, 2, 256),
    "shakespeare_cpu": Size(4, 4, 128, 64, 12, 65),  # nanoGPT's recipe for a CPU, as in the preset of this name
    "124M": Size(12, 12, 768, 1024, 64),
    "350M": Size(24, 16, 1024, 1024, 32),
    "774M": Size(36, 20, 1280, 1024, 16),
    "1558M": Size(48, 25, 1600, 1024, 16),  # 70 of 85 GB by benchmarks/memory.py; 24 need --recompute
}


BY_NAME = ("ours-compile", "compile-max")  # providers that run only if asked for


class Trainer(NamedTuple):
    model: nn.Module
    forward: Callable[[Tensor, Tensor], Tensor]
    update: Callable[[], object]  # clips, steps, clears the gradients
    precision: str = "highest"  # of fp32 products
    kernels: str = "auto"

    def loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        torch.set_float32_matmul_precision(self.precision)  # for backward and update too, as the kernels
        dispatch.use(self.kernels)
        return self.forward(idx, targets)

    def step(self, idx: Tensor, targets: Tensor) -> Tensor:
        loss = self.loss(idx, targets)
        loss.backward()
        self.update()
        return loss


def baseline(
    size: Size,
    dtype: torch.dtype,
    device: str,
    compiled: bool,
    attention: str,
    low_residual: bool = False,
    fused: bool | None = None,
) -> Trainer:
    with torch.device(device):
        model = BaselineGPT(*size[:4], size.vocab_size, attention=attention, dtype=dtype, low_residual=low_residual)
    optimizer = adamw(model, fused=fused)

    def update():
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    mode = compiled if isinstance(compiled, str) else None
    return Trainer(model, torch.compile(model, mode=mode) if compiled else model, update)


def ours(
    size: Size, dtype: torch.dtype, device: str, kernels: str, compiled: bool = False, precision: str = "highest"
) -> Trainer:
    from nanogpt.config import GPTConfig
    from nanogpt.model import GPT
    from nanogpt.optim import AdamW

    names = ("n_layer", "n_head", "n_embd", "block_size")
    with torch.device(device):
        model = GPT(GPTConfig(**dict(zip(names, size)), vocab_size=size.vocab_size, dropout=0.0, bias=False), dtype=dtype)
    optimizer = AdamW(model.decay_groups(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1)

    run = torch.compile(model) if compiled else model
    return Trainer(model, lambda *batch: run(*batch)[1], lambda: optimizer.step(max_norm=1.0), precision, kernels)


def _splits() -> bool:
    """Whether precision "high" changes fp32 products here."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        return split_products()
    finally:
        torch.set_float32_matmul_precision(before)


def providers(size: Size, dtype: torch.dtype, device: str) -> dict[str, Callable[[], Trainer]]:
    made = {
        "ours": lambda: ours(size, dtype, device, "auto"),
        "compile-cudnn-low": lambda: baseline(size, dtype, device, True, "cudnn", low_residual=True),
        "compile-cudnn": lambda: baseline(size, dtype, device, True, "cudnn"),
        "compile-flash": lambda: baseline(size, dtype, device, True, "flash"),
        "eager": lambda: baseline(size, dtype, device, False, "default"),
        "ours-torch": lambda: ours(size, dtype, device, "torch"),
        "ours-compile": lambda: ours(size, dtype, device, "auto", compiled=True),
        "compile-max": lambda: baseline(size, dtype, device, "max-autotune-no-cudagraphs", "cudnn", low_residual=True),
    }
    if not device.startswith("cuda"):  # one attention only, and no compile where there may be no C++ compiler
        split = {
            "ours": lambda: ours(size, dtype, device, "auto", precision="high"),
            "ours-exact": made["ours"],
        }
        cpu = (split if _splits() else {"ours": made["ours"]}) | {
            "compile": lambda: baseline(size, dtype, device, True, "default"),
            "eager-fused": lambda: baseline(size, dtype, device, False, "default", fused=True),
        }
        made = cpu | {name: made[name] for name in ("eager", "ours-torch", "ours-compile")}
    return made


class Reference:
    """The first step in fp32 (fp64 for fp32): loss, gradients, and PyTorch's own error at the compute dtype, 16-bit residual.

    Gradients are kept on the host: the GPU's memory is the providers'.

    Args:
        state: the weights everyone starts from.
    """

    def __init__(self, size: Size, dtype: torch.dtype, device: str, state: dict[str, Tensor], idx: Tensor, targets: Tensor):
        exact = torch.float64 if dtype == torch.float32 else torch.float32
        self.loss, self.grads = self._run(size, exact, device, state, idx, targets)
        loss, grads = self._run(size, dtype, device, state, idx, targets)
        self.loss_error = abs(loss - self.loss)
        self.allowed = {name: (g - self.grads[name]).norm().item() for name, g in grads.items()}

    @staticmethod
    def _run(size, dtype, device, state, idx, targets) -> tuple[float, dict[str, Tensor]]:
        torch.set_float32_matmul_precision("highest")
        with torch.device(device):
            model = BaselineGPT(*size[:4], size.vocab_size, attention="default", dtype=dtype, low_residual=True)
        model.to(torch.promote_types(dtype, torch.float32)).load_state_dict(state)
        model.recompute = True  # the same values in less memory
        rows = max(1, min(len(idx), 8192 // idx.shape[1]))  # so that fp32 logits stay small
        total = 0.0
        for i in range(0, len(idx), rows):
            part = slice(i, min(i + rows, len(idx)))
            loss = model(idx[part], targets[part]) * ((part.stop - part.start) / len(idx))
            loss.backward()
            total += loss.item()
        return total, {name: p.grad.cpu() for name, p in model.named_parameters()}

    def verdict(self, loss: float, model: nn.Module, precision: str, factor: float = 3.0) -> tuple[str, float]:
        """("ok" or what is wrong, largest ratio of an error to PyTorch's own)."""
        if not abs(loss - self.loss) <= factor * self.loss_error + 5e-5 * abs(self.loss):  # their rounding averages out
            return f"wrong: loss {loss:.6f}, fp32 {self.loss:.6f}", float("nan")
        worst = 0.0
        for name, p in model.named_parameters():
            exact = self.grads[name].to(p.grad.device)
            error, size = (p.grad.to(exact.dtype) - exact).norm().item(), exact.norm().item()
            torch_error = max(self.allowed[name], 1e-7 * size)
            allowed = max(factor * torch_error, 0.0 if precision == "highest" else 2.0**-14 * size)
            if not error <= allowed:
                return f"wrong: gradient of {name} off by {error:.3g}, {allowed:.3g} allowed", error / torch_error
            worst = max(worst, error / torch_error)
        return "ok", worst


def free(bench: common.Bench) -> None:
    gc.collect()
    if bench.gpu:
        torch.cuda.empty_cache()


def turn(trainer: Trainer, batch, bench: common.Bench, steps: int) -> list[float]:
    """ms of each of some steps in a row, after one untimed."""
    trainer.step(*batch)
    if not bench.gpu:
        times = [time.perf_counter()]
        for _ in range(steps):
            trainer.step(*batch)
            times.append(time.perf_counter())
        return [1e3 * (b - a) for a, b in itertools.pairwise(times)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        trainer.step(*batch)
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(events)]


class Benchmark:
    """One size and batch: the providers checked, then timed in turns."""

    def __init__(self, bench: common.Bench, size_name: str, batch: int | None):
        args = bench.args
        self.bench, self.size = bench, SIZES[size_name]
        self.B, self.T = batch or self.size.batch, min(args.length or self.size.block_size, self.size.block_size)
        self.case = f"{size_name}-B{self.B}-T{self.T}" + ("-recompute" if args.recompute else "")
        self.size_name = size_name
        generator = torch.Generator().manual_seed(1337)
        tokens = torch.randint(self.size.vocab_size, (self.B, self.T + 1), generator=generator).to(bench.device)
        self.batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        c = self.size
        n = c.n_layer * (12 * c.n_embd**2 + 2 * c.n_embd) + c.n_embd + c.vocab_size * c.n_embd  # without positions
        self.flops = {
            "mfu": 6 * n + 12 * c.n_layer * c.n_embd * self.T,
            "mfu_causal": 6 * n + 6 * c.n_layer * c.n_embd * self.T,
        }
        with torch.device(bench.device):
            model = BaselineGPT(*c[:4], c.vocab_size, attention="default", dtype=bench.dtype)
        self.state = {name: p.detach().to("cpu", copy=True) for name, p in model.state_dict().items()}
        self.trainers: dict[str, Trainer] = {}
        self.peaks: dict[str, float | str] = {}
        self.errors: dict[str, float] = {}
        self.times: dict[str, list[float]] = {}

    def failed(self, name: str, error: Exception) -> None:
        self.bench.row(self.case, name, "step", common.failure(error))
        self.trainers.pop(name, None)
        error.__traceback__ = None  # which holds its frames' tensors
        free(self.bench)

    def prepare(self, name: str, make: Callable[[], Trainer], reference: Reference) -> None:
        """Builds a provider and checks its first step; those that pass are kept for timing."""
        bench = self.bench
        free(bench)
        before = torch.cuda.memory_allocated() if bench.gpu else 0
        started = time.perf_counter()
        trainer = make()
        trainer.model.load_state_dict(self.state)
        trainer.model.recompute = bench.args.recompute
        loss = trainer.loss(*self.batch)
        loss.backward()
        status, self.errors[name] = reference.verdict(loss.item(), trainer.model, trainer.precision)
        if status != "ok":
            bench.row(self.case, name, "step", status, error=self.errors[name])
            return
        trainer.update()
        if bench.gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        trainer.step(*self.batch)
        self.peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**20 if bench.gpu else ""
        self.trainers[name], self.times[name] = trainer, []
        self.report(name, turn(trainer, self.batch, bench, 3))  # a row at once; the one timed in turns replaces it
        print(
            f"# {name}: ready in {time.perf_counter() - started:.1f} s, error {self.errors[name]:.2f} x PyTorch's", flush=True
        )

    def timed(self, rounds: int, steps: int) -> None:
        """Rounds of turns over the providers that are ready."""
        for _ in range(rounds):
            for name in list(self.trainers):
                free(self.bench)  # one provider's cached blocks would starve the next
                try:
                    self.times[name] += turn(self.trainers[name], self.batch, self.bench, steps)
                except Exception as error:
                    self.failed(name, error)

    def report(self, name: str, times: list[float]) -> None:
        peak = common.data_sheet(self.bench.facts["device"], self.bench.dtype).flops
        stats = common.quantiles(times)
        rate = self.B * self.T / stats.median * 1e3
        mfu = {key: 100 * flops * rate / peak for key, flops in self.flops.items()} if peak else {}
        more = {"tokens_per_s": round(rate), "peak_mib": self.peaks[name], "error": self.errors[name], **mfu}
        self.bench.row(self.case, name, "step", stats=stats, **more)

    def breakdown(self, name: str, keep: bool) -> None:
        """Rows `part COMPONENT` in ms a step, and their share of it."""
        step_ms, steps = common.quantiles(self.times[name]).median, 3
        free(self.bench)
        trainer = self.trainers[name]
        trainer.step(*self.batch)
        with tempfile.TemporaryDirectory() as folder:
            path = (self.bench.path.parent if keep else Path(folder)) / f"trace-{self.case}-{name}.json.gz"
            breakdown.profile(lambda: trainer.step(*self.batch), steps, path)
            parts, kernels = breakdown.read_trace(path, steps, self.size.vocab_size)
        parts["gaps"] = max(0.0, step_ms - sum(parts.values()))
        for part, ms in parts.items():
            self.bench.row(self.case, name, f"part {part}", ms=ms, percent=100 * ms / step_ms)
        for ms, where, kernel in kernels[:25]:
            print(f"#   {ms:8.3f} ms  {where:<14} {kernel[:110]}", flush=True)

    def run(self) -> None:
        args, bench, started = self.bench.args, self.bench, time.perf_counter()
        rounds, steps = (1, 2) if args.tiny else (3, max(2, args.steps // 3))
        makers = bench.wanted(providers(self.size, bench.dtype, bench.device))
        makers = {name: make for name, make in makers.items() if args.providers or name not in BY_NAME}
        if args.startup:
            for name in makers:
                startup(bench, self.case, name, self.size_name, self.B)
            return
        reference = Reference(self.size, bench.dtype, bench.device, self.state, *self.batch)
        states = 20 * sum(p.numel() for p in self.state.values())  # weights, gradient, moments, shadow: 20 bytes each, at most
        memory = torch.cuda.get_device_properties(bench.device).total_memory if bench.gpu else float("inf")
        together = states * len(makers) < 0.3 * memory and not args.one_by_one
        for name, make in makers.items():
            if args.seconds and time.perf_counter() - started > args.seconds:
                bench.row(self.case, name, "step", f"skipped: {args.seconds} seconds had passed")
                continue
            try:
                self.prepare(name, make, reference)
            except Exception as error:  # any provider may fail in any way: the row says how, the others go on
                self.failed(name, error)
            if not together:
                self.finish(rounds, steps)
                self.trainers.clear()
        del reference
        self.finish(rounds, steps)
        self.trainers.clear()
        free(bench)

    def finish(self, rounds: int, steps: int) -> None:
        self.timed(rounds, steps)
        for name in self.trainers:
            self.report(name, self.times[name])
        args = self.bench.args
        if self.bench.gpu and (args.breakdown or args.profile):
            for name in self.trainers:
                try:
                    self.breakdown(name, args.profile)
                except Exception as error:
                    print(f"# breakdown of {name} failed: {type(error).__name__}: {error}", flush=True)


def startup(bench: common.Bench, case: str, name: str, size: str, batch: int) -> None:
    """Seconds from the start of a process to the end of its first step, with empty kernel caches and with filled ones."""
    with tempfile.TemporaryDirectory() as folder:
        caches = {"TRITON_CACHE_DIR": f"{folder}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
        for pass_ in ("start cold", "start warm"):
            env = os.environ | caches | {"TRAIN_STEP_STARTED": repr(time.time())}
            command = [sys.executable, __file__, "--first-step", name, "--size", size, "--batch", str(batch)]
            command += ["--device", bench.device, "--dtype", bench.args.dtype]
            done = subprocess.run(command, env=env, capture_output=True, text=True)
            if done.returncode:
                bench.row(case, name, pass_, f"failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
                return
            bench.row(case, name, pass_, ms=1e3 * json.loads(done.stdout.strip().splitlines()[-1])["seconds"])


def first_step(args) -> int:
    """The child of :func:`startup`: one step, and the seconds since the parent started it."""
    size, dtype = SIZES[args.size[0]], common.DTYPES[args.dtype]
    with torch.device(args.device) if args.device != "cpu" else nullcontext():
        tokens = torch.randint(size.vocab_size, (args.batch[0], size.block_size + 1))
    trainer = providers(size, dtype, args.device)[args.first_step]()
    loss = trainer.step(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    print(json.dumps({"loss": loss.item(), "seconds": time.time() - STARTED}))
    return 0


def main(argv: list[str] | None = None) -> common.Bench | int:
    parser = common.parser(__doc__)
    parser.add_argument("--size", "--preset", nargs="*", choices=SIZES, help="default: 124M on a GPU, shakespeare_cpu on a CPU")
    parser.add_argument("--batch", type=common.positive, nargs="*", help="sequences; default: as much as 80 GB hold")
    parser.add_argument("--length", type=common.positive, help="tokens a sequence, at most the size's block_size")
    parser.add_argument("--steps", type=common.positive, help="timed steps a provider; default 30, quick 12")
    parser.add_argument("--breakdown", action="store_true", help="device time by component")
    parser.add_argument("--profile", action="store_true", help="--breakdown, and keep the traces beside the rows")
    parser.add_argument("--startup", action="store_true", help="instead, time from process start to the end of the first step")
    parser.add_argument("--recompute", action="store_true", help="blocks keep their inputs alone, in every provider")
    parser.add_argument("--seconds", type=float, help="after these, no further provider is compiled and checked")
    parser.add_argument("--one-by-one", action="store_true", help="one provider in memory at a time, so no turns")
    parser.add_argument("--first-step", help="internal: one step of this provider in this process")
    args = parser.parse_args(argv)
    if args.first_step:
        return first_step(args)
    args.steps = args.steps or (12 if args.quick else 30)
    bench = common.Bench("train_step", args)
    if not bench.gpu:
        cpu.keep_memory()  # as the trainer does; PyTorch gains from it too
    torch.backends.cuda.matmul.allow_tf32 = False  # the fp32 reference means fp32
    before = dispatch.requested()
    sizes = args.size or (["tiny"] if args.tiny else ["124M"] if bench.gpu else ["shakespeare_cpu"])
    for size in sizes:
        for batch in args.batch or [None]:
            Benchmark(bench, size, batch).run()
    dispatch.use(before)
    bench.finish()
    return bench


if __name__ == "__main__":
    result = main()
    raise SystemExit(result if isinstance(result, int) else 0)
