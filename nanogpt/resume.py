"""How a run goes on where an earlier one stopped: which checkpoint it starts from, what it saves, and what it takes back."""

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nanogpt import checkpoint, distributed, monitor, pretrained, sharding
from nanogpt.config import TrainConfig
from nanogpt.guard import not_finite
from nanogpt.pretrained import SHAPE
from nanogpt.saver import Lock

if TYPE_CHECKING:
    from nanogpt.train import Run


def take_out_dir(config: TrainConfig, world: distributed.World) -> Lock | None:
    """Locks the output directory and puts it in order; ValueError on all ranks where another run has it."""
    lock = error = None
    if world.main and not config.eval_only:
        try:
            lock = Lock(Path(config.out_dir))
            checkpoint.recover(Path(config.out_dir))
        except (ValueError, OSError) as refusal:
            error = ValueError(str(refusal))
    error = distributed.gather(error, world)[0]  # after which every rank sees the same steps
    if error:
        raise error
    return lock


def starting_checkpoint(config: TrainConfig, world: distributed.World) -> Path | None:
    """The verified checkpoint to continue from; None to start from scratch, in a directory that holds no other run."""
    out_dir = Path(config.out_dir)
    found = None
    if world.main:  # alone, so that the files are read once; the others learn what came of it
        existing = checkpoint.steps(out_dir)
        # After a crash torchrun starts the same command again, which must then continue, but only what it had itself begun
        restarted = bool(existing) and monitor.begun_before(out_dir)
        try:
            if config.init_from == "resume" or config.resume or restarted:
                found = checkpoint.find(out_dir, 0 if restarted else config.resume)
            elif existing and not config.eval_only and not config.overwrite:
                raise ValueError(
                    f"out_dir={out_dir}: holds step-{existing[-1]} of another run: continue it with --init_from=resume, "
                    "delete it with --overwrite=True, or choose another --out_dir"
                )
        except ValueError as error:
            found = error
    found = distributed.gather(found, world)[0]
    if isinstance(found, ValueError):
        raise found
    return found


def restore(run: "Run", path: Path, state: dict) -> None:
    """Puts a run into the state of a checkpoint."""
    differ = checkpoint.differences(state["model"], asdict(run.model.config), ignore=("dropout",))
    if differ:
        raise ValueError(f"{path}: of another model: {'; '.join(differ)}")
    if (frozen := state["config"].get("freeze", -1)) != run.config.freeze:
        raise ValueError(f"freeze={run.config.freeze}: {path} has freeze={frozen}; a new run can start with --init_from={path}")
    checkpoint.restore_model(run.model, checkpoint.load_tensors(path / checkpoint.MODEL), path / checkpoint.MODEL)
    tensors = checkpoint.load_tensors(path / checkpoint.OPTIM)
    checkpoint.restore_optim(run.model, run.optimizer, run.loss_scale, tensors, path / checkpoint.OPTIM)
    restore_data(run, path, state)
    run.it, run.tokens = state["iter"], state["tokens"]
    if state["loader"].get("fingerprint") == run.loader.fingerprint:  # losses on other data do not compare
        run.evaluated, run.stale = state["evaluated"], state["stale"]
        run.val_loss = math.nan if state["val_loss"] is None else state["val_loss"]
        run.best_val_loss = math.inf if state["best_val_loss"] is None else state["best_val_loss"]
    run.resumed, run.final = True, run.it if state["final"] else -1
    try:
        run.guard.load_state(state["guard"])
        if len(state["rng"]) == run.world.size:
            distributed.restore_rng(state["rng"][run.world.rank], run.world.device)
        else:  # dropout draws anew; the data order goes on
            torch.manual_seed(run.config.seed + run.world.rank + run.it)
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:  # what PyTorch raises for such states too
        raise ValueError(f"{path / checkpoint.STATE}: guard or rng: {error!r:.200}") from error
    if run.world.main:
        now = asdict(run.config)
        ignored = {"init_from", "resume", "overwrite", "out_dir", *SHAPE}
        changed = [f"{key} {old} -> {now[key]}" for key, old in state["config"].items() if now.get(key, old) != old]
        changed = [text for text in changed if text.split()[0] not in ignored]
        print(f"resuming from {path}" + (f"; changed: {', '.join(changed)}" if changed else ""), flush=True)


def restore_data(run: "Run", path: Path, state: dict) -> None:
    """Continues the data order of a checkpoint, if the data is the same; anew from its beginning where the user allows another.

    Raises:
        ValueError: naming every field in which the data, or the order, differs.
    """
    now = run.dataset()
    differ = checkpoint.differences(state["dataset"], now) + run.loader.differences(state["loader"])
    if not differ:
        try:
            run.loader.load_state(state["loader"])
        except ValueError as error:
            raise ValueError(f"{path / checkpoint.STATE}: {error}") from error
    elif not run.config.allow_data_change:
        raise ValueError(
            f"{path}: the data order cannot be continued: {'; '.join(differ)}; --allow_data_change=True begins the new one"
        )
    elif run.world.main:
        print(f"another data order, from its beginning: {'; '.join(differ)}", flush=True)


def restore_ckpt(run: "Run", weights: pretrained.Weights) -> None:
    """Continues a run of nanoGPT's: its updates, its optimizer's state; data order and dropout are this run's own."""
    if not weights.optim:
        raise ValueError(f"{weights.source}: no optimizer state in it; --init_from={weights.source} starts anew from it")
    if run.config.freeze >= 0:
        raise ValueError(
            f"freeze={run.config.freeze}: {weights.source} has nothing frozen; a new run can start from its weights"
        )
    optim = {name: pretrained.resized(name, t, run.model.config) for name, t in weights.optim.items()}
    checkpoint.restore_optim(run.model, run.optimizer, None, optim, Path(weights.source))
    run.it, run.best_val_loss, run.resumed = weights.iter_num, weights.best_val_loss, True
    run.tokens = run.it * run.tokens_per_update  # as it does not say
    if run.world.main:
        print(f"continuing {weights.source} of nanoGPT after {run.it} updates", flush=True)


def save(run: "Run", status: str) -> bool:
    """Saves OUT/step-N, in the background while the run goes on; all ranks take part, the main one writes.

    Returns:
        False where that failed: earlier checkpoints are intact. A failure in the background shows at a later step.
    """
    rng = distributed.gather(distributed.rng_state(run.world.device), run.world)
    model = checkpoint.model_tensors(run.model)
    optim = checkpoint.optim_tensors(run.model, run.optimizer, run.loss_scale)
    if not run.world.main:
        for t in (*model.values(), *optim.values()):  # the order in which the main process asks for them
            sharding.whole(t)
        return True
    state = {
        "iter": run.it,
        "tokens": run.tokens,
        "status": status,
        "final": status == "finished",
        "evaluated": run.evaluated,
        "val_loss": run.val_loss if run.evaluated == run.it and math.isfinite(run.val_loss) else None,
        "best_val_loss": run.best_val_loss if math.isfinite(run.best_val_loss) else None,
        "stale": run.stale,
        "guard": run.guard.state(),
        "config": asdict(run.config),
        "model": asdict(run.model.config),
        "loader": run.loader.state(),
        "dataset": run.dataset(),
        "data_dir": str(run.loader.data.path.absolute()),
        "rng": rng,
        "torch": torch.__version__,
        "time": time.time(),
    }
    return run.saver.save(run.it, model, optim, state, wait=status != "running")


def unsound(run: "Run", status: str = "running") -> str:
    """Why the state of the run is not one to go back to; empty if it is. The same on all ranks."""
    # There is a later chance, but at a run's end: the skipped update left the weights as they were, the evaluation shows
    # whether they are the reason, and one that is asked to stop has no time for it, but keeps the checkpoint before
    if run.guard.unsound and status == "running":
        return "it was not finite"
    if run.evaluated == run.it and not run.finite:
        return "the evaluation is not finite"
    names = distributed.gather(not_finite(run.model, run.optimizer), run.world)
    return "; ".join(f"rank {rank}: {name} or its moments are not finite" for rank, name in enumerate(names) if name)
