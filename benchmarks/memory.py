"""What fine-tuning a GPT-2 takes in memory: calculated for every size, measured for one.

    python benchmarks/memory.py --recompute                      # a table of all sizes
    python benchmarks/memory.py --fsdp=4                         # on each of four GPUs that share out the model
    python benchmarks/memory.py --size=gpt2 --block_size=256     # two updates of one, beside its calculation; --out=DIR: rows

Bytes per trained parameter: 4 each for itself, its gradient and AdamW's two moments; 2 more for the shadow that 16-bit GEMMs
read; a frozen parameter has neither gradient nor moments. Activations: a block keeps 16 C elements a token (both LayerNorms'
input and output, qkv, attention's output, both factors of the GELU-MLP's gradient), or the 2 C of its input where it is
recomputed, and a frozen one nothing. The head keeps a chunk of logits and its fp32 weight gradient, which is tied to the
embedding's: at the end of backward the two and their sum are there at once.

Under --fsdp=N a process has an N-th of the parameters and moments, but all of the gradients' sum over the micro-steps, until
the last one shares it out. In place of shadows it has, in the compute dtype, the embeddings and two blocks, these twice: as
they arrive and as they are used, or their gradients.

B sequences of T tokens, C channels, V vocabulary. Measured is the peak of two updates of two micro-steps, random weights and
tokens: the allocator's on a GPU, the process's resident memory on a CPU, less what it was before the model.
"""

import argparse
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

if str(Path(__file__).resolve().parent) not in sys.path:  # imported by a test
    sys.path.insert(0, str(Path(__file__).resolve().parent))

import common  # which finds the rest from anywhere, installed or not
import torch

from kernels.cross_entropy import CHUNK_ROWS
from nanogpt.config import GPT2_SIZES, GPTConfig, fail, key, parse
from nanogpt.distributed import pick_device, pick_dtype
from nanogpt.model import GPT
from nanogpt.optim import AdamW
from nanogpt.pretrained import HUB, PADDED_VOCAB, VOCAB


@dataclass
class MemoryConfig:
    size: str = key("", "the model to measure; empty: calculate all", "Memory", ("", *GPT2_SIZES))
    batch_size: int = key(1, "sequences a micro-step")
    block_size: int = key(1024, "tokens a sequence")
    freeze: int = key(-1, "as in training")
    recompute: bool = key(False, "as in training")
    fsdp: int = key(1, "processes that share out the model; only calculated")
    device: str = key("auto", "to measure on")
    out: str = key("", "folder, or a .csv to append to, for what was measured (empty: it is printed only)")
    dtype: str = key(
        "auto", "of GEMMs and activations; tables take bfloat16 for auto", "", ("auto", "float32", "bfloat16", "float16")
    )

    def check(self) -> None:
        blocks = max(hub.n_layer for name, hub in HUB.items() if self.size in ("", name))
        for name, least, most in (("batch_size", 1, 2**31), ("block_size", 1, 1024), ("freeze", -1, blocks), ("fsdp", 1, 1024)):
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name}={getattr(self, name)}: must be {least} to {most}")
        if self.size and self.fsdp > 1:
            raise ValueError(f"fsdp={self.fsdp}: not with size={self.size}, which measures one process")
        if self.out and not self.size:
            raise ValueError(f"out={self.out}: only what is measured has rows; set --size too")

    def case(self) -> str:
        """What is measured, in the column of a row."""
        options = [f"freeze{self.freeze}"] * (self.freeze >= 0) + ["recompute"] * self.recompute
        return "-".join([self.size, f"B{self.batch_size}", f"T{self.block_size}", *options])


def shape(name: str, block_size: int) -> GPTConfig:
    hub = HUB[name]
    sizes = block_size, PADDED_VOCAB, hub.n_layer, hub.n_head, hub.n_embd
    return GPTConfig(*sizes, bias=True, gelu="tanh", real_vocab_size=VOCAB)


def calculated(config: MemoryConfig, name: str, dtype: torch.dtype, device_type: str) -> dict[str, float]:
    """Bytes of each part, and of all at the peak."""
    c, e = shape(name, 1024), dtype.itemsize  # positions stay 1024, however many are used
    with torch.device("meta"):
        model = GPT(c, dtype)
    model.freeze(config.freeze)
    counts = {p: p.numel() for p in model.parameters()}
    trained = sum(n for p, n in counts.items() if p.requires_grad)
    tokens, C = config.batch_size * config.block_size, c.n_embd
    blocks = c.n_layer - max(config.freeze, 0)
    block = tokens * (16 * C * e + 4 * (4 + c.n_head))  # and LayerNorm's and attention's statistics, fp32
    activations = blocks * block
    if config.recompute:
        activations = blocks * tokens * 2 * C * e + min(blocks, 1) * block
    activations += tokens * C * e * 2  # ln_f's input, and the gradient of its output
    gradient = 4 * c.vocab_size * C if model.lm_head.weight.requires_grad else 0
    logits = min(tokens, CHUNK_ROWS[device_type]) * c.vocab_size * e
    every = sum(counts.values())
    shadows = 0 if e == 4 else e * (every - 1024 * C)
    if config.fsdp > 1:
        per_block = sum(counts[p] for p in model.transformer.h[0].parameters())
        shadows = e * (every - (c.n_layer - min(c.n_layer, 4)) * per_block)
    parts = {
        "parameters": 4 * every // config.fsdp,
        "gradients": 4 * trained,
        "moments": 8 * trained // config.fsdp,
        "shadows": shadows,
        "activations": activations,
        "head": max(logits + gradient, 2 * gradient),
    }
    static = sum(parts[part] for part in ("parameters", "gradients", "moments", "shadows"))
    return parts | {"total": static + max(activations + parts["head"], 3 * gradient)}


def resident() -> int:
    """Bytes of memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def measured(config: MemoryConfig, dtype: torch.dtype, device: torch.device) -> int:
    """Peak bytes of two updates."""
    before = resident()
    torch.set_float32_matmul_precision("high")  # as in training
    model = GPT(shape(config.size, 1024), dtype).to(device)
    model.recompute = config.recompute
    model.freeze(config.freeze)
    optimizer = AdamW(model.decay_groups(), lr=1e-5)
    tokens = torch.randint(VOCAB, (config.batch_size, config.block_size + 1), device=device)
    for _ in range(2):
        for _ in range(2):
            _, loss = model(tokens[:, :-1], tokens[:, 1:].contiguous())
            (loss / 2).backward()
        optimizer.step(1.0)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def main(argv: list[str]) -> None:
    config = parse(MemoryConfig, argv, presets=None, prog="benchmarks/memory.py")
    try:
        device = pick_device(config.device)
        dtype = pick_dtype(config.dtype, device)
        if not config.size and config.dtype == "auto":
            dtype = torch.bfloat16
        names = [config.size] if config.size else [name for name in GPT2_SIZES if HUB[name].n_layer >= config.freeze]
        kind = device.type if config.size else "cuda"
        rows = {name: calculated(config, name, dtype, kind) for name in names}
    except ValueError as error:
        fail(error, "benchmarks/memory.py")
    print(
        f"B={config.batch_size} T={config.block_size} freeze={config.freeze} recompute={config.recompute} "
        f"fsdp={config.fsdp} "
        f"{str(dtype).removeprefix('torch.')}; GB (1e9 bytes)"
    )
    bench = None
    if config.out:  # where rows cannot be written is known before measuring
        name = next(short for short, kind in common.DTYPES.items() if kind == dtype)
        bench = common.Bench("memory", argparse.Namespace(device=str(device), dtype=name, out=Path(config.out), plot=False))
    parts = list(next(iter(rows.values())))
    print(f"{'':12}" + "".join(f"{part:>13}" for part in parts) + (f"{'measured':>13}" if config.size else ""))
    for name, row in rows.items():
        line = f"{name:12}" + "".join(f"{row[part] / 1e9:13.2f}" for part in parts)
        peak = measured(config, dtype, device) if config.size else 0
        print(line + (f"{peak / 1e9:13.2f} on {device.type}" if config.size else ""), flush=True)
        if bench:
            bench.row(config.case(), "calculated", "peak", peak_mib=row["total"] / 2**20)
            bench.row(config.case(), "measured", "peak", peak_mib=peak / 2**20)


if __name__ == "__main__":
    main(sys.argv[1:])
