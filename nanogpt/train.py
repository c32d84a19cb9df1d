"""Trains a GPT, from scratch or from where an earlier run stopped.

    python -m nanogpt.train shakespeare_cpu
    python -m nanogpt.train my_config.py --learning_rate=1e-3 --init_from=resume
    torchrun --standalone --nproc_per_node=8 -m nanogpt.train train_gpt2

B batch_size, T block_size. An iteration is one update: gradient_accumulation_steps micro-steps of B sequences of T tokens,
shared out among the processes.
"""

import math
import os
import random
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from nanogpt.config import TrainConfig, check_data, parse

if __name__ == "__main__":  # ahead of the heavy imports, so that a mistake is answered at once
    STARTED = time.time()
    CONFIG = parse(TrainConfig, prog="train")
    check_data(CONFIG)

import numpy as np
import torch
from torch import nn

from kernels import cpu, dispatch
from kernels.linear import shadow
from nanogpt import anomaly, checkpoint, distributed, faults, hellaswag, monitor, pretrained, resume, sharding, tokenizer
from nanogpt.banner import banner
from nanogpt.data import find
from nanogpt.data.loader import Loader, TokenError, Windows, eval_batches
from nanogpt.guard import WHY, DivergenceError, Guard, Step, latest_stop
from nanogpt.model import GPT
from nanogpt.optim import AdamW, LossScale, learning_rate
from nanogpt.pretrained import SHAPE
from nanogpt.saver import Lock, Saver, abandon, clear
from nanogpt.telemetry import Telemetry
from nanogpt.watchdog import Watchdog


@dataclass
class Run:
    """All that a run consists of; what a checkpoint restores are `it` and below, the weights, the optimizer and the loader."""

    config: TrainConfig
    world: distributed.World
    loader: Loader
    model: GPT  # the parameters
    compiled: nn.Module  # what evaluates: the model, or torch.compile of it
    wrapped: nn.Module  # what trains: the former, in DDP where there are several processes and no shards
    optimizer: AdamW
    loss_scale: LossScale | None  # fp16 only
    guard: Guard
    saver: Saver
    lock: Lock | None  # of out_dir, in the main process where it writes there
    task: hellaswag.Task | None  # HellaSwag, where evaluations score it
    it: int = 0  # updates done
    tokens: int = 0  # trained on in them
    evaluated: int = -1  # the `it` of the last evaluation
    val_loss: float = math.nan  # of the last evaluation
    finite: bool = True  # whether all losses of the last evaluation are
    best_val_loss: float = math.inf
    stale: int = 0  # evaluations since the best
    resumed: bool = False
    final: int = -1  # the `it` of the final checkpoint that it resumed from
    reason: str = ""  # why it ended, where max_iters is not it

    @property
    def out_dir(self) -> Path:
        return Path(self.config.out_dir)

    @property
    def tokens_per_update(self) -> int:
        return self.config.gradient_accumulation_steps * self.config.batch_size * self.config.block_size

    @property
    def last(self) -> int:
        """The number of updates that the run consists of."""
        if not self.config.max_tokens:
            return self.config.max_iters
        enough = -(-max(0, self.config.max_tokens - self.tokens) // self.tokens_per_update)
        return min(self.config.max_iters, self.it + enough)

    def dataset(self) -> dict[str, Any]:
        """What the training data is known by, besides the loader's digest of its content."""
        shards = self.loader.shards
        sizes = {"shards": len(shards), "tokens": sum(shard.count for shard in shards), "dtype": shards[0].dtype.name}
        return {"vocab_size": self.loader.vocab_size, **sizes}


def setup(config: TrainConfig) -> Run:
    """Builds the run, and restores it where it resumes.

    Raises:
        ValueError: for what the user can set right; one line.
    """
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # else a write more of each new tensor
    dispatch.use(config.kernels)
    world = distributed.init(config)
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs, pairs of bfloat16 numbers on CPUs with AMX
    if world.device.type == "cpu":
        cpu.keep_memory()
    dtype = distributed.pick_dtype(config.dtype, world.device)

    lock = resume.take_out_dir(config, world)
    ckpt = pretrained.starting_ckpt(config)
    path = None if ckpt else resume.starting_checkpoint(config, world)
    state = checkpoint.run_state(path) if path else {}
    weights = None
    if path:  # the shape of the network comes from the checkpoint
        saved = checkpoint.model_config(state, path)
        other = [key for key in pretrained.asked(config) if getattr(config, key) != getattr(saved, key)]
        if other and world.main:
            differ = "; ".join(f"{key}={getattr(saved, key)}, not {getattr(config, key)}" for key in other)
            print(f"the network's shape is that of {path}: {differ}", flush=True)
        config = replace(config, **{key: getattr(saved, key) for key in SHAPE})
    elif ckpt or config.init_from != "scratch":
        weights = pretrained.load(ckpt or config.init_from)
        config = pretrained.adopt(config, weights)

    seed = config.seed + world.rank
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    loader = Loader(
        find(config.dataset),
        split="train",
        batch_size=config.batch_size,
        block_size=config.block_size,
        rank=world.rank,
        world_size=world.size,
        seed=config.seed,
        sampling=config.sampling,
        device=world.device,
    )
    data = loader.data
    for shards in data.splits.values():  # what is too short to evaluate is told now
        Windows(shards, config.block_size, config.seed, config.sampling)
    if config.patience and "val" not in data.splits:
        raise ValueError(f"patience={config.patience}: {data.path} has no split val to evaluate")
    if weights:
        pretrained.check_vocabulary(weights, config.dataset, loader.vocab_size)
        model = weights.model(world.device, dtype, config.block_size, config.dropout)
    else:
        model = GPT(pretrained.pad_vocabulary(config.model(loader.vocab_size)), dtype).to(world.device)
    model.recompute = config.recompute
    model.freeze(config.freeze)
    if config.fsdp:
        sharding.shard(model, world, dtype)
    optimizer = AdamW(
        model.decay_groups(),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        keep_gradients=world.size > 1 and not config.fsdp,
        lr_scales={p: config.layer_lr_decay**depth for p, depth in model.layers_above().items()},
    )
    loss_scale = LossScale(world.device) if dtype == torch.float16 else None
    compiled = torch.compile(model) if config.compile else model
    wrapped = model if config.fsdp else distributed.wrap(compiled, world, dtype)
    task = None
    if config.hellaswag:
        task = hellaswag.load(config.hellaswag, tokenizer.load(data.path), config.block_size)
    guard = Guard(world.device, loss_scale, config.spike_guard, config.max_bad_steps)
    saver = Saver(Path(config.out_dir), config.keep_checkpoints, config.async_save)
    run = Run(config, world, loader, model, compiled, wrapped, optimizer, loss_scale, guard, saver, lock, task)
    if path:
        resume.restore(run, path, state)
    elif ckpt:
        resume.restore_ckpt(run, weights)
    if config.compile and dtype != torch.float32:
        # Before the first step, whose code would not hold for the second otherwise; after the weights are restored, as compiled
        # code takes a shadow as it is
        for p in (p for module in model.modules() if isinstance(module, nn.Linear) for p in module.parameters()):
            shadow(p, dtype)
    return run


@torch.no_grad()
def evaluate(run: Run, stop: distributed.StopRequest, watchdog: Watchdog) -> dict[str, float] | None:
    """What the ranks find together, None where any of them wants to stop: the mean loss of each split over its fixed set of
    windows, and HellaSwag's accuracies where they are due."""
    c, world = run.config, run.world
    sizes = c.batch_size, c.block_size, c.eval_iters, world.rank, world.size
    data = run.loader.data
    sums = torch.zeros(len(data.splits), 2, device=world.device)  # loss * windows, windows
    stopping = distributed.StopVote(stop, world)
    batches = ((row, *xy) for row, split in zip(sums, data.splits) for xy in eval_batches(data, split, *sizes, world.device))
    sharding.set_training(run.model, False)
    for row, x, y in batches:
        watchdog.at("evaluation")
        if len(x):
            _, loss = run.compiled(x, y)
            row += torch.stack([loss * len(x), torch.full_like(loss, len(x))])
        elif c.fsdp:  # in vain: the ranks go through the weights together
            run.compiled(*torch.zeros(2, 1, 1, dtype=torch.int64, device=world.device))
        watchdog.at("the end of an evaluation's batch")
        if stopping():
            sharding.set_training(run.model, True)
            return None
    figures = {f"{split}_loss": loss / count for split, (loss, count) in zip(data.splits, distributed.total(sums).tolist())}
    if run.task and (c.eval_only or run.it % c.eval_hellaswag_interval == 0 or run.it >= run.last):

        def on_round(*_) -> bool:
            watchdog.at("HellaSwag")
            return stopping()

        scores = hellaswag.score(run.model, run.task, c.batch_size * c.block_size, world, on_round)
        figures = None if scores is None else figures | {f"hellaswag_{name}": value for name, value in scores.items()}
    sharding.set_training(run.model, True)
    return figures


def train(run: Run, log: monitor.Monitor | None, stop: distributed.StopRequest, watchdog: Watchdog) -> str:
    """The loop: exactly `run.last` updates, the last one evaluated and saved.

    Args:
        log: on the main process.
        stop: true once the process is to end.
        watchdog: is told where the loop is.

    Returns:
        "finished", "preempted" (asked to stop, and saved), "evaluated" (eval_only), or "failed": the last save did not succeed.

    Raises:
        DivergenceError: where the guard ends the run, on all ranks alike.
    """
    config, world, model, optimizer, loss_scale = run.config, run.world, run.wrapped, run.optimizer, run.loss_scale
    accumulation = config.gradient_accumulation_steps // world.size
    readback = distributed.Readback(world)
    votes = torch.zeros(2, device=world.device)  # of any rank to stop, of the main one to save
    begun, last_save = run.it, time.monotonic()
    if log:
        log.begin()

    def report(steps: list[tuple[int, list[float]]]) -> tuple[bool, bool]:
        """Logs and judges the steps that have arrived from the device; (stop, save) as voted in them."""
        for it, (loss, _, _, norm, verdict) in steps:
            if log:
                log.train(it, loss, norm, learning_rate(it, config), WHY[int(verdict)])
            run.guard.observe(Step(it, loss, norm, int(verdict)))
        return any(values[1] for _, values in steps), any(values[2] for _, values in steps)

    def save_now(status: str = "running") -> bool:
        nonlocal last_save
        watchdog.at("saving")
        report(readback.flush())
        with monitor.spending(log, "checkpoint"):
            why = resume.unsound(run, status)
            if why and world.main:
                checkpoint.log.warning("checkpoint not written after update %d: %s", run.it, why)
            saved = not why and resume.save(run, status)
        votes.zero_()
        last_save = time.monotonic()
        return saved

    while True:
        impatient = config.patience and run.stale >= config.patience
        done = run.it >= run.last or impatient
        due = (run.it % config.eval_interval == 0 or done) and run.evaluated != run.it
        if due or config.eval_only:
            report(readback.flush())
            with monitor.spending(log, "evaluation"):
                figures = evaluate(run, stop, watchdog)
            if figures is None:  # to be done again by the run that resumes
                return "preempted" if config.eval_only or save_now("preempted") else "failed"
            run.evaluated, run.val_loss = run.it, figures.get("val_loss", math.nan)
            run.finite = all(math.isfinite(value) for name, value in figures.items() if name.endswith("_loss"))
            improved = run.val_loss < run.best_val_loss
            run.stale = 0 if improved else run.stale + 1
            if improved:
                run.best_val_loss = run.val_loss
            if log:
                log.evaluation(run.it, figures)
            if config.eval_only:
                return "evaluated"
            if config.patience and run.stale >= config.patience:
                continue
            if not done and run.it > 0 and (improved or config.always_save_checkpoint):
                save_now()
        if done:
            if impatient:
                run.reason = f"patience={config.patience}: no better validation loss in {run.stale} evaluations"
            return "finished" if run.final == run.it or save_now("finished") else "failed"

        optimizer.set_lr(learning_rate(run.it, config))
        mean_loss = torch.zeros((), device=world.device)
        for micro_step in range(accumulation):
            watchdog.at("reading data")
            x, y = next(run.loader)  # (B, T)
            with distributed.gradient_sync(model, micro_step == accumulation - 1):
                watchdog.at("the forward pass")
                _, loss = model(x, y)
                loss = loss / accumulation
                watchdog.at("the backward pass")
                (loss if loss_scale is None else loss * loss_scale.value).backward()
            mean_loss += loss.detach()

        watchdog.at("the update")
        if log and config.max_hours:
            stop.until = latest_stop(config.max_hours, log.ledger, run.model.parameter_count(False), run.it - begun, run.saver)
        votes[0].fill_(bool(stop))  # `votes[0] =` would wait for a GPU
        if world.main and config.checkpoint_minutes and time.monotonic() - last_save > config.checkpoint_minutes * 60:
            votes[1].fill_(1)
        shared = distributed.mean(torch.cat([mean_loss[None], votes]))  # what every rank decides by
        norm = optimizer.step(config.grad_clip, loss_scale, partial(run.guard.admits, shared[0]))
        run.it += 1
        run.tokens += run.tokens_per_update
        run.saver.poll()

        arrived = readback.put(run.it - 1, torch.cat([shared, torch.stack([norm, run.guard.verdict])]))
        stopping, saving = report(arrived)
        if stopping:
            return "preempted" if save_now("preempted") else "failed"
        if saving:
            save_now()


def main(config: TrainConfig, started: float | None = None) -> int:
    """Runs a whole training; the exit code: 0, 1 where it failed, 2 where the user can set it right.

    Args:
        started: when the process was, by time.time(), for --max_hours and the account of time; None: now.
    """
    started = time.time() if started is None else started
    stop = distributed.StopRequest()
    log = None
    try:
        injected = faults.requested(config.allow_fault_injection)
        run = setup(config)
        config, world, model = run.config, run.world, run.model
        faults.install(run, injected)
        if world.main:
            run.out_dir.mkdir(parents=True, exist_ok=True)
            peak = config.peak_flops or None
            if peak is None and world.device.type == "cuda":
                peak = monitor.peak_flops(torch.cuda.get_device_name(world.device), model.dtype)
            flops = model.flops_per_token(causal=False), model.flops_per_token(causal=True)
            throughput = monitor.Throughput(run.tokens_per_update, *flops, peak and peak * world.size)
            evaluated = run.evaluated == run.it
            begin = run.it, evaluated, run.resumed, run.last, started, run.tokens
            log = monitor.Monitor(config, world.device, throughput, *begin)
            log.print(banner(run, peak))
            if log.telemetry.missing:
                log.print(f"GPU sensors: {log.telemetry.missing}")
            if not config.eval_only:
                checkpoint.tidy(run.out_dir)
                if config.overwrite and not run.resumed:  # only now that the rest of the command has proved right
                    clear(run.out_dir)
                elif config.resume:
                    abandon(run.out_dir, run.it)
                tokenizer.save_beside(run.loader.data.path, run.out_dir)
                monitor.write_status(run.out_dir, run.it, "running")
    except (ValueError, OSError) as error:
        distributed.fail(error, "train")
    except (MemoryError, RuntimeError) as error:
        if not anomaly.out_of_memory(error):
            raise
        rank, local_rank, _, local_size = (int(os.environ.get(name, default)) for name, default in distributed.ENVIRONMENT)
        device = distributed.pick_device(config.device, local_rank, local_size)
        with distributed.abandoning(2):  # the other ranks do not know
            print(f"train: rank {rank}: {anomaly.memory_advice(config, device, error)}", file=sys.stderr)
            return 2

    def status(state: str, reason: str) -> None:
        if world.main and not config.eval_only:
            monitor.write_status(run.out_dir, run.it, state, reason)

    # The main process's GPU is the monitor's
    health = None if log else Telemetry(world.device, warn=partial(print, file=sys.stderr, flush=True))
    watchdog = Watchdog(world, config.timeout, partial(status, "failed"))
    run.saver.progress = watchdog.alive
    state, code = "failed", None
    try:
        state = train(run, log, stop, watchdog)
        if state == "preempted":
            run.reason = stop.reason
        elif state == "failed":
            run.reason = "the last checkpoint was not written"
    except DivergenceError as error:
        run.reason = str(error)
        if world.main:
            print(anomaly.explain(run, error), file=sys.stderr)
        if out := anomaly.directory(config):
            print(anomaly.dump(run, error.first.it, out), file=sys.stderr)
    except TokenError as error:
        run.reason, code = str(error), 2
        print(f"train: rank {world.rank}: {run.reason}", file=sys.stderr)
    except (MemoryError, RuntimeError) as error:
        if not anomaly.out_of_memory(error):
            raise
        run.reason, code = anomaly.memory_advice(config, world.device, error, watchdog.where == "saving"), 2
        print(f"train: rank {world.rank}: {run.reason}", file=sys.stderr)
    finally:
        watchdog.close()
        if health:
            health.close()
        try:
            run.saver.close()
        finally:  # told even where it raises, which it does only of a run that has failed
            if state == "failed" and not run.reason:
                run.reason = repr(sys.exc_info()[1])[:300]
            status(state, run.reason)
            if log:
                because = f" ({run.reason.splitlines()[0]})" if run.reason else ""
                log.print(f"{state} after {run.it} updates; {run.out_dir}{because}")
                log.close(run.it, state, run.reason)
    run.loader.close()
    if run.lock:
        run.lock.release()
    if code:  # the other ranks do not know
        with distributed.abandoning(code):
            return code
    run.wrapped = None
    distributed.shutdown()
    return 1 if state == "failed" else 0


if __name__ == "__main__":
    raise SystemExit(main(CONFIG, STARTED))
