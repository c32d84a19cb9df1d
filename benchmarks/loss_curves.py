"""Training truth: whole curves of the loss on the kernels, beside those on the PyTorch references, from the same weights.

    python -m nanogpt.data.prepare plays
    python benchmarks/loss_curves.py --kernels triton           # GPT-2 124M, 300 updates, in bf16 and in fp32

Every curve sees the same batches. For each dtype there are four: the kernels and the references from the weights of one
seed, the references from those weights perturbed as rounding would, and the references from the weights of another seed. A
distance of two curves is the root mean square of their difference over the updates. The kernels pass if theirs from the
references is at most 3 times that of the perturbed curve, or of a loss's last place (row `verdict rounding`), and no more
than that of the other seed (row `verdict seeds`, which wrong gradients may well pass: on nanoGPT's CPU recipe in fp32, dq
halved is 1400 times the former and a fourteenth of the latter); `error` of these rows is the ratio of the distances.
fp32 products are exact here, without TF32, though the trainer allows it. The row of a curve holds the mean loss of its last
tenth; OUT/curves holds every loss and a plot.

One update of B=4, T=1024 is 3.5 TFLOP, so 300 of them on an H100 are estimated to take 7 s in bf16, where launches are the
limit, in fp32 25 s on the references (45 TFLOP/s without tensor cores) and 45 s with Triton's attention: 150 s in all.
"""

import csv
import math
import time
from pathlib import Path

import common
import torch
from torch import Tensor
from train_step import SIZES, Size

from kernels import dispatch
from nanogpt import config, data
from nanogpt.config import GPTConfig, TrainConfig
from nanogpt.data.loader import Loader
from nanogpt.model import GPT
from nanogpt.optim import AdamW, learning_rate
from nanogpt.pretrained import pad_vocabulary

SEEDS = 1337, 1338  # of the weights
PERTURBED = "torch-perturbed"  # provider: the references, from perturbed weights
ROUNDINGS = 3.0  # times the perturbed curve's distance that the kernels may be off
COLUMNS = "case", "dtype", "provider", "seed", "step", "loss"
Curves = dict[tuple[str, str, int], list[float]]  # (dtype, provider, seed) -> the loss of each update


@torch.no_grad()
def perturb(model: GPT, dtype: torch.dtype) -> None:
    """Each weight up or down by its last place in fp32; in 16 bits by 1/16 of their last place, so that one in 16 is rounded
    to the other side (a whole one would move all of them, which is more than rounding does)."""
    step = max(torch.finfo(torch.float32).eps, torch.finfo(dtype).eps / 16)
    for p in model.parameters():
        p.mul_(1 + step * torch.randint(2, p.shape).mul_(2).sub_(1))


def train(
    size: Size,
    vocab_size: int,
    dtype: torch.dtype,
    device: str,
    kernels: str,
    seed: int,
    batches: list[Tensor],
    perturbed: bool = False,
) -> list[float]:
    """The loss of each update of nanoGPT's recipe, warmup and cosine over the batches (2, B, T)."""
    dispatch.use(kernels)
    steps = len(batches)
    schedule = TrainConfig(max_iters=steps, lr_decay_iters=steps, warmup_iters=steps // 10)
    shape = GPTConfig(batches[0].shape[2], vocab_size, size.n_layer, size.n_head, size.n_embd)
    torch.manual_seed(seed)
    model = GPT(pad_vocabulary(shape), dtype)  # drawn on the host: the same weights on every device
    if perturbed:
        perturb(model, dtype)
    model.to(device)
    optimizer = AdamW(model.decay_groups(), lr=0.0)
    losses = []
    for step, (x, y) in enumerate(batches):
        optimizer.set_lr(learning_rate(step, schedule))
        loss = model(x, y)[1]
        loss.backward()
        optimizer.step(max_norm=schedule.grad_clip)
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def distance(a: list[float], b: list[float]) -> float:
    """Root mean square of the difference of two curves."""
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(a))


def verdict(
    kernels: list[float], reference: list[float], perturbed: list[float], other_seed: list[float]
) -> dict[str, tuple[str, float, float]]:
    """By yardstick: ("ok" or what is wrong, distance of the kernels to the reference, that of the yardstick)."""
    ours = distance(kernels, reference)
    last_place = torch.finfo(torch.float32).eps * reference[0]  # of a loss, which any two curves may differ by
    rounding, seeds = max(distance(perturbed, reference), last_place), distance(other_seed, reference)
    found = {}
    for name, yardstick, times in (("rounding", rounding, ROUNDINGS), ("seeds", seeds, 1.0)):
        wrong = f"wrong: {ours:.4g} from the reference, {name} {yardstick:.4g}"
        found[name] = "ok" if ours <= times * yardstick else wrong, ours, yardstick
    return found


def tail(losses: list[float]) -> float:
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last)


def plot(path: Path, target: Path) -> None:
    """Draws a file of curves: the losses, and below how far each is from the first reference of its dtype."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves: Curves = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            curves.setdefault((row["dtype"], row["provider"], int(row["seed"])), []).append(float(row["loss"]))
            case = row["case"]
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 7), sharex=True, height_ratios=(2, 1))
    for (dtype, provider, seed), losses in curves.items():
        label, steps = f"{provider} {dtype}, seed {seed}", range(1, len(losses) + 1)
        (line,) = above.plot(steps, losses, label=label, linewidth=0.8)
        reference = curves.get((dtype, "torch", SEEDS[0]))
        if reference not in (None, losses):
            off = [abs(a - b) + 1e-7 for a, b in zip(losses, reference)]
            below.semilogy(steps, off, color=line.get_color(), linewidth=0.8)
    above.set_ylabel("loss")
    above.legend(fontsize=7)
    above.set_title(case, fontsize=9)
    below.set_ylabel(f"|loss - torch's|, seed {SEEDS[0]}", fontsize=8)
    below.set_xlabel("update")
    figure.tight_layout()
    figure.savefig(target, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> common.Bench:
    parser = common.parser(__doc__)
    parser.add_argument("--size", choices=SIZES, help="default: 124M on a GPU, shakespeare_cpu on a CPU")
    parser.add_argument("--batch", type=common.positive, default=4, help="sequences an update")
    parser.add_argument("--length", type=common.positive, help="tokens a sequence; default: the size's block_size")
    parser.add_argument("--steps", type=common.positive, default=300, help="updates a curve")
    parser.add_argument("--kernels", default="auto", choices=("auto", *dispatch.BACKENDS), help="to be compared with torch")
    parser.add_argument("--data", default="plays", help="a prepared dataset: its directory, or a name under data/")
    parser.add_argument("--seconds", type=float, help="after these no further curve is begun")
    args = parser.parse_args(argv)
    dtypes = [args.dtype] if args.dtype else ["bf16", "fp32"] if args.device.startswith("cuda") else ["fp32"]
    size_name = args.size or ("tiny" if args.tiny else "124M" if args.device.startswith("cuda") else "shakespeare_cpu")
    size, T = SIZES[size_name], args.length or SIZES[size_name].block_size
    before = dispatch.requested()
    try:
        if args.dtype == "fp16":
            raise ValueError("--dtype fp16: needs a loss scale; expected bf16 or fp32")
        dispatch.use(args.kernels)
        dispatch.explain(torch.device(args.device).type)
        loader = Loader(data.find(args.data), "train", args.batch, T)
    except ValueError as error:
        dispatch.use(before)
        config.fail(error, "loss_curves")
    bench, started = common.Bench("loss_curves", args), time.perf_counter()
    batches = [torch.stack(next(loader)).to(bench.device) for _ in range(args.steps)]  # (2, B, T) each
    loader.close()
    torch.set_float32_matmul_precision("highest")

    case = f"{size_name}-B{args.batch}-T{T}-N{args.steps}"
    path = bench.path.parent / "curves" / f"{case}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    ours, curves = f"ours-{args.kernels}", Curves()
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for dtype in dtypes:
            args.dtype = dtype
            chosen = (ours, SEEDS[0]), ("torch", SEEDS[0]), (PERTURBED, SEEDS[0]), ("torch", SEEDS[1])
            for provider, seed in chosen:
                if args.seconds and time.perf_counter() - started > args.seconds:
                    bench.row(case, provider, f"seed {seed}", f"skipped: {args.seconds:g} seconds had passed")
                    continue
                kernels = args.kernels if provider == ours else "torch"
                model = size, loader.vocab_size, common.DTYPES[dtype], bench.device
                losses = train(*model, kernels, seed, batches, perturbed=provider == PERTURBED)
                curves[dtype, provider, seed] = losses
                writer.writerows((case, dtype, provider, seed, step, loss) for step, loss in enumerate(losses, 1))
                file.flush()
                bench.row(case, provider, f"seed {seed}", loss=tail(losses))
            found = [curves.get((dtype, *curve)) for curve in chosen]
            if all(found):
                for name, (status, off, yardstick) in verdict(*found).items():
                    bench.row(case, ours, f"verdict {name}", status, error=off / yardstick)
                    print(f"# {dtype}: {ours} is {off:.3g} from torch, {name} {yardstick:.3g}: {status}", flush=True)
    dispatch.use(before)
    if args.plot:
        plot(path, path.with_suffix(".png"))
    bench.finish()
    return bench


if __name__ == "__main__":
    raise SystemExit(any(row["status"].startswith("wrong") for row in main().rows))
