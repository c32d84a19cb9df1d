"""What a run says first: device, model, data, and which kernels it takes and why."""

import os
from typing import TYPE_CHECKING

import torch

from kernels import dispatch, extension
from kernels.linear import split_products
from nanogpt import distributed

if TYPE_CHECKING:
    from nanogpt.train import Run


def banner(run: "Run", peak: float | None) -> str:
    """What the run is about to do, and with what.

    Args:
        run: set up.
        peak: FLOP/s of one device, None where not known.
    """
    config, world, device = run.config, run.world, run.world.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    data, c = run.loader.data, run.model.config
    counts = ", ".join(f"{split} {data.count(split):,}" for split in data.splits)
    lines = [
        f"device: {name}, {str(run.model.dtype).removeprefix('torch.')}, {world.size} process{'es' * (world.size > 1)}"
        f"{', sharded' if config.fsdp else ''}, "
        f"torch {torch.__version__}{', deterministic' if config.deterministic else ''}{', compiled' if config.compile else ''}",
        f"model: {run.model.parameter_count() / 1e6:.2f}M parameters, {c.n_layer} layers, {c.n_head} heads, "
        f"{c.n_embd} channels, vocabulary {c.vocab_size}, {c.gelu} GELU",
        f"data: {data.path}, tokens: {counts}, sampling: {config.sampling}",
        f"tokens per update: {run.tokens_per_update:,} = {config.gradient_accumulation_steps} micro-steps x "
        f"{config.batch_size} sequences x {config.block_size} tokens; updates: {run.it} to {run.last:,}",
    ]
    if device.type == "cpu":
        source = "OMP_NUM_THREADS" + ", which torchrun sets to 1 where it is not set" * ("TORCHELASTIC_RUN_ID" in os.environ)
        why = source if "OMP_NUM_THREADS" in os.environ else "the cores, shared out"
        lines.append(f"threads: {torch.get_num_threads()} a process ({why}), {distributed.cores()} cores")
    groups: dict[tuple[str, str], list[str]] = {}
    for op, choice in dispatch.explain(device.type).items():
        groups.setdefault(choice, []).append(op)
    lines += [f"kernels: {backend}: {', '.join(ops)} ({reason})" for (backend, reason), ops in groups.items()]
    if run.model.dtype == torch.float32 and device.type == "cpu" and split_products():
        lines.append("products: fp32 as pairs of bfloat16 numbers on AMX, some 2^-16 off; --kernels=torch for PyTorch's fp32")
    library = {"cpu": "nanogpt_cpu", "cuda": "nanogpt_cuda"}.get(device.type)
    lines += [f"extension: {library}: {extension.status()[library]}"] if library else []
    if peak is None:
        lines.append(f"mfu: n/a, the peak rate of this device ({name}) is not known; --peak_flops=F sets it")
    return "\n".join(lines)
