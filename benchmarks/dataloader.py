"""Batches per second from shards on disk to tensors on the device: ours in both orders, and nanoGPT's way.

    python benchmarks/dataloader.py [--quick]

The shard holds consecutive numbers, so a batch proves itself: every y is its x plus one, and so is every next token. Batches
are drawn back to back, so ours waits for its thread, which a training step hides behind the GPU's work.
"""

import tempfile
import time
from pathlib import Path

import common
import numpy as np
import torch

from nanogpt.data.loader import Loader
from nanogpt.data.shards import write_shard

WRAP = 50_000  # consecutive numbers modulo this


def plain(path: Path, B: int, T: int, device: str):
    """nanoGPT's way: a memory map, random offsets, one copy a row, pinned on a GPU."""
    data = np.memmap(path, dtype=np.uint16, mode="r", offset=1024)

    def batch():
        starts = torch.randint(len(data) - T, (B,)).tolist()
        x = torch.stack([torch.from_numpy(data[i : i + T].astype(np.int64)) for i in starts])
        y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + T].astype(np.int64)) for i in starts])
        if device.startswith("cuda"):
            return x.pin_memory().to(device, non_blocking=True), y.pin_memory().to(device, non_blocking=True)
        return x, y

    return batch


def verdict(batch, B: int, T: int) -> str:
    x, y = (t.cpu() for t in batch)
    if x.shape != (B, T) or y.shape != (B, T):
        return f"wrong: shapes {tuple(x.shape)} and {tuple(y.shape)}"
    consecutive = (x[:, 1:] == (x[:, :-1] + 1) % WRAP).all() and (y == (x + 1) % WRAP).all()
    return "ok" if consecutive else "wrong: the batch holds no windows of the shard"


def main(argv: list[str] | None = None) -> common.Bench:
    args = common.parser(__doc__).parse_args(argv)
    bench = common.Bench("dataloader", args)
    shapes = [(2, 16)] if args.tiny else [(64, 1024)] if args.quick else [(12, 1024), (64, 1024), (64, 256)]
    tokens, count = (20_000, 2) if args.tiny else (20_000_000, 20 if args.quick else 60)
    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder) / "numbers_train_000000.bin"
        write_shard(shard, (np.arange(tokens) % WRAP).astype(np.uint16))
        for B, T in shapes:
            loaders = {
                name: Loader(Path(folder), "train", B, T, sampling=name, device=bench.device) for name in ("epoch", "random")
            }
            makers = {f"ours-{name}": loader.__next__ for name, loader in loaders.items()}
            makers["nanogpt"] = plain(shard, B, T, bench.device)
            good, times = {}, {}
            for name, make in bench.wanted(makers).items():
                status = verdict(make(), B, T)
                if status == "ok":
                    good[name], times[name] = make, []
                else:
                    bench.row(f"B{B}-T{T}", name, "batch", status)
            for name, make in [*good.items()] * 3:
                for _ in range(count):
                    start = time.perf_counter()
                    make()
                    if bench.gpu:
                        torch.cuda.synchronize()
                    times[name].append(1e3 * (time.perf_counter() - start))
            for name, t in times.items():
                stats = common.quantiles(t)
                bench.row(f"B{B}-T{T}", name, "batch", stats=stats, tokens_per_s=B * T / stats.median * 1e3)
            for loader in loaders.values():
                loader.close()
    bench.finish()
    return bench


if __name__ == "__main__":
    main()
