"""How long a save stops the training: in the background, from a copy in host memory, beside one that is waited for.

    python benchmarks/checkpoint.py                   # 124M, 12 bytes a parameter: 1.5 GB a checkpoint
    python benchmarks/checkpoint.py --folder /data    # on that disk; default: the current folder's

Providers: `async` and `sync`. Passes:

    first     what the first save takes from the loop, `async` with the memory for its copy
    blocked   what each later one takes from the loop
    on-disk   from asking for a save until it is on disk, hashed, forced there, older ones deleted
    slowdown  how much longer the steps take altogether while the thread writes, which shares cores and memory with them

Before it is timed, a save of either kind must hold the weights of the moment in which it was asked for, though the next step
changes them.
"""

import tempfile
import time
from pathlib import Path

import common
import torch
from train_step import SIZES

from nanogpt import checkpoint
from nanogpt.config import GPTConfig
from nanogpt.model import GPT
from nanogpt.optim import AdamW
from nanogpt.saver import Saver

T = 16  # tokens a step: a short one, so that many fall into a save


def main(argv: list[str] | None = None) -> common.Bench:
    parser = common.parser(__doc__)
    parser.add_argument("--folder", type=Path, default=Path(), help="where to save; default: here")
    args = parser.parse_args(argv)
    bench = common.Bench("checkpoint", args)
    name = "tiny" if args.tiny else "124M"
    size = SIZES[name]
    shape = GPTConfig(size.block_size, size.vocab_size, size.n_layer, size.n_head, size.n_embd)
    model = GPT(shape, bench.dtype).to(bench.device)
    optimizer = AdamW(model.decay_groups(), lr=1e-4)
    tokens = torch.randint(size.vocab_size, (1, min(T, size.block_size)), device=bench.device)

    def sync() -> None:
        if bench.gpu:
            torch.cuda.synchronize()

    def step() -> float:
        """ms"""
        begin = time.perf_counter()
        model(tokens, tokens)[1].backward()
        optimizer.step(1.0)
        sync()
        return 1e3 * (time.perf_counter() - begin)

    repetitions = 3 if args.tiny or args.quick else 5
    times: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="checkpoint-") as folder:
        savers = {name: Saver(Path(folder) / name, 2, background=name == "async") for name in ("async", "sync")}
        savers = bench.wanted(savers)
        alone = [step() for _ in range(5)][1:]  # ms of steps while nothing is saved
        for number in range(repetitions + 1):
            for provider, saver in savers.items():
                alone.append(step())
                usual = common.quantiles(alone[-9:]).median
                before = model.transformer.wte.weight.detach().clone() if number == 0 else None
                begin = time.perf_counter()
                saver.save(number, checkpoint.model_tensors(model), checkpoint.optim_tensors(model, optimizer, None), {})
                sync()
                blocked = 1e3 * (time.perf_counter() - begin)
                written, slower = blocked, 0.0
                if saver.pending is not None:
                    ended: list[float] = []
                    saver.pending.add_done_callback(lambda _, ended=ended: ended.append(time.perf_counter()))
                    while not ended:
                        slower += step() - usual
                    written = 1e3 * (ended[0] - begin)
                saver.wait()
                if before is not None:
                    step()
                    path = saver.out_dir / f"step-{number}"
                    checkpoint.verify(path)
                    saved = checkpoint.load_tensors(path / checkpoint.MODEL)["transformer.wte.weight"]
                    if not torch.equal(saved, before.cpu()) or torch.equal(saved, model.transformer.wte.weight.detach().cpu()):
                        raise AssertionError(f"{provider}: the checkpoint holds other weights than those of its step")
                for what, ms in (("first" if number == 0 else "blocked", blocked), ("on-disk", written), ("slowdown", slower)):
                    times.setdefault((provider, what), []).append(ms)
        for saver in savers.values():
            saver.close()
    nbytes = sum(t.numel() * t.element_size() for t in checkpoint.optim_tensors(model, optimizer, None).values()) * 3 // 2
    case = f"{name}-{nbytes / 1e9:.2f}GB"
    for (provider, what), ms in times.items():
        rate = {"gbps": nbytes / common.quantiles(ms).median / 1e6} if what == "on-disk" else {}
        bench.row(case, provider, what, stats=common.quantiles(ms), **rate)
    bench.row(case, "step", "alone", stats=common.quantiles(alone))
    bench.finish()
    return bench


if __name__ == "__main__":
    main()
