"""What the user is told when a run ends badly: a diverged loss, a device out of memory.

Statistics of a tensor: largest magnitude, root mean square, mean and the number of values that are not finite.
"""

import json
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nanogpt import checkpoint
from nanogpt.config import TrainConfig
from nanogpt.guard import WHY, DivergenceError
from nanogpt.sharding import whole

if TYPE_CHECKING:
    from nanogpt.train import Run


def explain(run: "Run", error: DivergenceError) -> str:
    """The message of a run that the guard ended: what happened, where in the data, and what to try."""
    config, first = run.config, error.first
    begin = position(run, first.it)
    end = begin + config.gradient_accumulation_steps * config.batch_size
    run.saver.wait()  # one may be under way
    found = checkpoint.steps(run.out_dir)
    last = f"{run.out_dir}/step-{found[-1]} is untouched" if found else "there is none yet"
    lines = [
        f"{error}; loss {first.loss:g}, gradient norm {first.norm:g}",
        f"data: samples {begin:,} to {end - 1:,} of the order of seed {config.seed} in {run.loader.data.path}",
        f"last checkpoint: {last}; the weights in memory are those from before update {first.it}",
        "history (update: loss, gradient norm):",
        *(f"  {s.it}: {s.loss:g}, {s.norm:g}" + f"  {WHY[s.verdict]}" * bool(s.verdict) for s in error.history),
        "what to try, with --init_from=resume:",
        f"  --learning_rate={config.learning_rate / 2:g} (now {config.learning_rate:g})"
        + f", or a longer --warmup_iters (now {config.warmup_iters})" * config.decay_lr,
    ]
    if not config.grad_clip:
        lines.append("  --grad_clip=1.0 (now off)")
    if not config.spike_guard:
        lines.append("  --spike_guard, which skips the updates that often come before")
    if str(run.model.dtype) == "torch.float16":
        lines.append("  --dtype=bfloat16 where the device has it, or float32")
    if not config.anomaly_dump:
        lines.append("  --anomaly_dump=true, which writes that batch and every layer's statistics")
    return "\n".join(lines)


def position(run: "Run", it: int) -> int:
    """The first sample of update ``it`` in the data order; it is one of this process's updates."""
    return run.loader.position - (run.it - it) * run.config.gradient_accumulation_steps * run.config.batch_size


def directory(config: TrainConfig) -> Path | None:
    """Where --anomaly_dump wants its files; None where it does not."""
    if config.anomaly_dump.lower() in ("", "false"):
        return None
    return Path(config.out_dir) / "anomaly" if config.anomaly_dump.lower() == "true" else Path(config.anomaly_dump)


def dump(run: "Run", it: int, out: Path) -> str:
    """Does update ``it`` again on this rank, with the weights as they are, and writes what goes through every layer; for a run
    that has ended, as its loader goes back there.

    OUT/step-N-rank-R.safetensors holds the batch, x and y (micro-steps, B, T) int64; the .json beside it statistics of every
    weight, of every module's output and its gradient in the order in which they came to be, and of every weight's gradient.

    Returns:
        One line that names the first that is not finite, or says why nothing could be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    config, world, model = run.config, run.world, run.model
    run.loader.load_state(run.loader.state() | {"position": position(run, it)})
    batches = [next(run.loader) for _ in range(config.gradient_accumulation_steps // world.size)]
    record: dict[str, Any] = {"iter": it, "rank": world.rank, "losses": []}
    record["weights"] = {name: statistics(whole(p)) for name, p in model.named_parameters()}
    activations, gradients = record["activations"], record["output gradients"] = {}, {}
    model.zero_grad(set_to_none=True)
    model.train()
    scale = 1.0 if run.loss_scale is None else run.loss_scale.value
    for micro_step, (x, y) in enumerate(batches):
        hooks = [
            module.register_forward_hook(_recorder(f"{name} (micro-step {micro_step})", activations, gradients))
            for name, module in model.named_modules()
            if name
        ]
        _, loss = model(x, y)
        record["losses"].append(str(loss.item()))
        (loss * scale / len(batches)).backward()
        for hook in hooks:
            hook.remove()
    weight_gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    record["weight gradients"] = {name: statistics(whole(grad)) for name, grad in weight_gradients.items()}
    kinds = ("weights", "activations", "output gradients", "weight gradients")
    bad = ((kind, name) for kind in kinds for name, values in record[kind].items() if values["not finite"])
    record["first not finite"] = found = next(map(": ".join, bad), None)
    stem = f"step-{it}-rank-{world.rank}"
    x, y = (torch.stack(tensors).cpu() for tensors in zip(*batches, strict=True))
    try:
        out.mkdir(parents=True, exist_ok=True)
        save_file({"x": x, "y": y}, out / f"{stem}.safetensors")
        (out / f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n")
    except (OSError, SafetensorError) as error:
        return f"anomaly_dump={config.anomaly_dump}: rank {world.rank}: not written: {error}"
    what = f"first not finite: {found}" if found else "done again, it is finite: an effect of dropout, or of the hardware"
    return f"{out / stem}.json: {what}"


def statistics(t: Tensor) -> dict[str, float | int]:
    """Of the finite values of a tensor, and how many others there are; waits for the device."""
    t = t.detach().float()
    finite = t.isfinite()
    t = torch.where(finite, t, 0.0)
    largest, square, mean = t.abs().max().item(), t.square().mean().sqrt().item(), t.mean().item()
    return {"max": min(largest, 3e38), "rms": min(square, 3e38), "mean": mean, "not finite": (~finite).sum().item()}


def _recorder(name: str, activations: dict, gradients: dict) -> Callable[[nn.Module, Any, Any], None]:
    """A forward hook that notes a module's outputs, and attaches one for their gradients."""

    def note(label: str, grad: Tensor | None) -> None:
        if grad is not None:  # an output that nobody used has none
            gradients[label] = statistics(grad)

    def record(module: nn.Module, args: Any, output: Any) -> None:
        tensors = output if isinstance(output, tuple) else (output,)
        for i, t in enumerate(t for t in tensors if t is not None):
            label = name if len(tensors) == 1 else f"{name}[{i}]"
            activations[label] = statistics(t)
            if t.requires_grad:
                t.register_hook(partial(note, label))

    return record


OUT_OF_MEMORY = (
    r"DefaultCPUAllocator",
    r'"aten::(new_)?(empty|zeros|full)\w*".*call failed',  # in our compiled kernels, whose ABI passes on only the fact
    r"CUDA(?: error:|\]:) out of memory",  # what is not PyTorch's allocator's: pinned memory, code that Triton loads
    r"CUBLAS_STATUS_ALLOC_FAILED",
    r"Storage size calculation overflowed",
)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error is a lack of memory, the GPU's or the CPU's, whoever met it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return re.search("|".join(OUT_OF_MEMORY), str(error)) is not None


def memory_advice(config: TrainConfig, device: torch.device, error: BaseException, saving: bool = False) -> str:
    """What was asked for, what there is, and three ways to need less; of which `saving` needs another first."""
    B, G, T = config.batch_size, config.gradient_accumulation_steps, config.block_size
    if device.type == "cuda":
        peak, (free, _) = torch.cuda.max_memory_allocated(device), torch.cuda.mem_get_info(device)
    else:
        peak, free = _host_memory()
    flags = ["--async_save=false"] * (config.async_save and saving)
    if B > 1:  # the same tokens an update
        flags.append(f"--batch_size={(B + 1) // 2} --gradient_accumulation_steps={2 * G}")
    if not config.recompute:
        flags.append("--recompute=true")
    if not config.fsdp and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        flags.append("--fsdp=true")
    if config.init_from == "scratch":
        flags.append(f"--block_size={max(1, T // 2)}")
    if config.dtype == "float32" or (config.dtype == "auto" and device.type == "cpu"):
        flags.append("--dtype=bfloat16")
    if config.async_save and device.type == "cpu" and not saving:
        flags.append("--async_save=false")
    what = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    return (
        f"out of memory on {device} with batch_size={B}, block_size={T}: peak {peak:,} bytes, free {free:,}; "
        f"try {', or '.join(flags[:3])} ({what})"
    )


def _host_memory() -> tuple[int, int]:
    """(this process's peak, what the machine has left) in bytes; 0 where the system does not tell."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1 if os.uname().sysname == "Darwin" else 1024
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    except OSError:
        return peak, 0
    return peak, int(lines["MemAvailable"].split()[0]) * 1024
