"""What a training step must cost: FLOPs and bytes of each component over what the GPU reaches, beside what was measured.

    python benchmarks/roofline.py [--size 124M] [--batch 64] [--gpu h100 a100] [--results DIR]

Two plans: `fused` is the traffic of this project's kernels (16-bit residual stream added inside LayerNorm, GELU inside the
matmuls, one read and one write of the logits); `compile` that of plain PyTorch under torch.compile, residual stream in fp32.
With --results, the ceilings are those measured into that folder (ceilings, attention), and the measured step's breakdown is
printed beside the prediction. ns are per token; nothing here runs on a GPU.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import common
from report import read
from train_step import SIZES, Size


class Ceilings(NamedTuple):
    """What a GPU reaches: FLOP/s and bytes/s."""

    name: str
    matmul: float
    attention_fwd: float  # causal half counted, head size 64
    attention_bwd: float
    memory: float
    gaps: float  # of the step, between kernels
    peak: float  # data sheet, for MFU


# Per GPU and plan. Matmuls: what cuBLAS sustains over a step; attention: published rates at T=1024 (fused: Triton on an H100,
# FlashAttention 2 on an A100; compile: FlashAttention 2); memory: 88% and 86% of the data sheets' 3.35 and 2.04 TB/s.
GPUS = {
    "h100": {
        "fused": Ceilings("H100", 600e12, 291e12, 216e12, 2.95e12, 0.015, 989e12),
        "compile": Ceilings("H100", 600e12, 229e12, 182e12, 2.95e12, 0.020, 989e12),
    },
    "a100": {
        "fused": Ceilings("A100-80GB", 235e12, 119e12, 119e12, 1.75e12, 0.010, 312e12),
        "compile": Ceilings("A100-80GB", 235e12, 119e12, 119e12, 1.75e12, 0.015, 312e12),
    },
}


class Part(NamedTuple):
    """Work per token of one component."""

    matmul: float = 0.0  # FLOPs
    attention_fwd: float = 0.0
    attention_bwd: float = 0.0
    bytes: float = 0.0

    def ns(self, c: Ceilings) -> float:
        seconds = self.matmul / c.matmul + self.attention_fwd / c.attention_fwd + self.attention_bwd / c.attention_bwd
        return 1e9 * (seconds + self.bytes / c.memory)


def parameters(size: Size) -> int:
    """Without position embeddings and biases, the vocabulary padded: what nanoGPT counts."""
    C = size.n_embd
    return size.n_layer * (12 * C * C + 2 * C) + C + size.vocab_size * C


def flops_per_token(size: Size, causal: bool) -> float:
    return 6 * parameters(size) + (6 if causal else 12) * size.n_layer * size.n_embd * size.block_size


def components(size: Size, tokens: int, plan: str) -> dict[str, Part]:
    """Name -> work per token, forward and backward, of a step of so many tokens."""
    L, C, T, V = size.n_layer, size.n_embd, size.block_size, size.vocab_size
    fused = plan == "fused"
    low, wide = 2, 4  # bytes
    residual = low if fused else wide
    # LayerNorm with the addition before it. Forward: residual in and out, branch in, y out. Backward: dy, the residual, its
    # gradient in, the gradient out; where the stream is fp32 also in 16 bits, and dy and the residual in once more for dw.
    norm = 2 * residual + 2 * low + (low + 3 * residual if fused else low + 3 * residual + low + low + residual)
    # GELU of its own: pre in, post out; dpost and pre in, dpre out.
    gelu = 0 if fused else 5 * 4 * C * low
    # Logits: in and out once. Compiled: in for the maximum, for the sum, for the gradient, and that out.
    logits = (2 if fused else 4) * V * low
    delta = 2 * C * low  # O and dO
    concatenation = 0 if fused else 6 * C * low
    embedding = C * (wide + 2 * residual) + (0 if fused else C * wide - C * low) + V * C * wide / tokens
    # AdamW p g m v in, p m v out, and the norm's read; fused writes the shadow; compiled clips (8) and casts the weights (6).
    optimizer = (34 if fused else 46) * parameters(size) / tokens
    return {
        "block GEMMs": Part(matmul=6 * 12 * L * C * C),
        "head GEMMs": Part(matmul=6 * V * C),
        "attention": Part(attention_fwd=2 * L * C * T, attention_bwd=5 * L * C * T),
        "LayerNorm": Part(bytes=(2 * L + 1) * C * norm),
        "GELU": Part(bytes=L * gelu),
        "cross-entropy": Part(bytes=logits),
        "cat, delta, embedding": Part(bytes=L * (delta + concatenation) + embedding),
        "optimizer": Part(bytes=optimizer),
    }


def predict(size: Size, tokens: int, plan: str, ceilings: Ceilings) -> dict[str, float]:
    """Component -> ns per token, with gaps and the total."""
    ns = {name: part.ns(ceilings) for name, part in components(size, tokens, plan).items()}
    total = sum(ns.values()) / (1 - ceilings.gaps)
    return ns | {"gaps": total * ceilings.gaps, "total": total}


def measured_ceilings(rows: list[dict], providers: tuple[str, ...], gaps: float) -> Ceilings:
    """From the rows of ceilings.py and attention.py in a results folder.

    Raises:
        ValueError: naming the row that is missing.
    """
    from nanogpt.monitor import peak_flops

    def best(op: str, case: str, pass_: str, column: str, names: tuple[str, ...] | None = None) -> float:
        found = [
            float(r[column])
            for r in rows
            if r["op"] == op
            and case in r["case"]
            and r["pass"] == pass_
            and r[column]
            and (names is None or r["provider"] in names)
        ]
        if not found:
            raise ValueError(f"no row {op} {case} {pass_} with {column} in the results")
        return max(found)

    device = rows[0]["device"]
    return Ceilings(
        device,
        1e12 * best("ceilings", "matmul-8192", "fwd", "tflops"),
        1e12 * best("attention", "T1024-D64", "fwd", "tflops", providers),
        1e12 * best("attention", "T1024-D64", "bwd", "tflops", providers),
        1e9 * best("ceilings", "copy-1024MiB", "copy", "gbps"),
        gaps,
        peak_flops(device, common.DTYPES["bf16"]) or float("nan"),
    )


def measured_parts(rows: list[dict], size: str, ours: bool) -> tuple[str, dict[str, float]]:
    """(provider, component -> ns per token) of the fastest provider of that kind with a breakdown."""
    steps = [
        r for r in rows if r["op"] == "train_step" and r["case"].startswith(f"{size}-") and r["status"] == "ok" and r["ms"]
    ]
    kind = {r["provider"] for r in steps if r["pass"].startswith("part ") and r["provider"].startswith("ours") == ours}
    timed = [r for r in steps if r["pass"] == "step" and r["provider"] in kind]
    if not timed:
        return "", {}
    fastest = max(timed, key=lambda r: float(r["tokens_per_s"]))
    tokens = float(fastest["tokens_per_s"]) * float(fastest["ms"]) / 1e3
    same = [r for r in steps if (r["provider"], r["case"]) == (fastest["provider"], fastest["case"])]
    parts = {r["pass"].removeprefix("part "): 1e6 * float(r["ms"]) / tokens for r in same if r["pass"].startswith("part ")}
    parts["cat, delta, embedding"] = parts.pop("embedding", 0.0) + parts.pop("other", 0.0)
    return fastest["provider"], parts | {"total": 1e6 * float(fastest["ms"]) / tokens}


def lines(
    size: Size, tokens: int, columns: dict[str, tuple[str, Ceilings]], measured: dict[str, dict[str, float]]
) -> list[str]:
    """The table: a column per prediction (plan and ceilings), then the measured ones."""
    predicted = {name: predict(size, tokens, plan, c) for name, (plan, c) in columns.items()}
    every = predicted | {name: parts for name, parts in measured.items() if parts}
    out = [f"{'ns per token':<24}" + "".join(f"{name:>26}" for name in every)]
    for part in next(iter(predicted.values())):
        out.append(f"{part:<24}" + "".join(f"{v.get(part, 0):>26.0f}" for v in every.values()))
    out.append(f"{'tokens/s':<24}" + "".join(f"{1e9 / v['total']:>26,.0f}" for v in every.values()))
    for causal, label in ((False, "mfu"), (True, "mfu_causal")):
        flops = flops_per_token(size, causal)
        peaks = [c.peak for _, c in columns.values()] + [next(iter(columns.values()))[1].peak] * (len(every) - len(columns))
        shares = [100 * flops / (v["total"] * 1e-9) / peak for v, peak in zip(every.values(), peaks)]
        out.append(f"{label:<24}" + "".join(f"{s:>25.1f}%" for s in shares))
    return out


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[s for s in SIZES if s.endswith("M")], default="124M")
    parser.add_argument("--batch", type=int, help="sequences a step; default: as train_step.py")
    parser.add_argument("--gpu", nargs="*", choices=GPUS, default=list(GPUS))
    parser.add_argument("--results", type=Path, help="a results folder: its ceilings and its breakdown")
    args = parser.parse_args(argv)
    size = SIZES[args.size]
    tokens = (args.batch or size.batch) * size.block_size
    columns, measured = {}, {}
    if args.results:
        try:
            rows = read(args.results)
            columns["fused"] = "fused", measured_ceilings(rows, ("ours",), 0.015)
            columns["compile"] = "compile", measured_ceilings(rows, ("flash", "cudnn"), 0.02)
        except ValueError as error:
            print(f"roofline.py: {error}", file=sys.stderr)
            return 2
        for ours in (True, False):
            name, parts = measured_parts(rows, args.size, ours)
            measured[f"measured {name}"] = parts
    else:
        columns = {f"{gpu} {plan}": (plan, c) for gpu in args.gpu for plan, c in GPUS[gpu].items()}
    print(f"{args.size}, {tokens} tokens a step, {flops_per_token(size, True) / 1e6:.0f} MFLOP a token (causal)\n")
    print("\n".join(lines(size, tokens, columns, measured)))
    if args.size == "124M" and "a100" in args.gpu and not args.results:
        ns = 755e6 / (100 * 1024)  # nanoGPT's README: 100 sequences in 755 ms, 37% MFU by its count
        mfu = 100 * flops_per_token(size, False) / (ns * 1e-9) / 312e12
        floor = predict(size, 100 * 1024, "compile", GPUS["a100"]["compile"])["total"]
        rates = f"{1e9 / ns:,.0f} tokens/s, mfu {mfu:.0f}%, {ns / floor:.2f}x the time of `a100 compile`"
        print(f"\nnanoGPT's published step on an A100: {ns:.0f} ns, {rates}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
