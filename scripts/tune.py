"""Rewrites the table of tile configurations for the GPU at hand: kernels/configs.json.

    python scripts/tune.py [--ops attention_fwd,attention_dq] [--out FILE] [--workers 12]

For every op that has candidates, on the shapes of GPT-2: worker processes compile each candidate and check the whole op with it
against the reference (compiling takes most of the time and a candidate that faults takes only its worker along); then this
process times those that passed, and the best few once more in turns with the present entry, which stays unless it is beaten.
The table is written after every op.
"""

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import common  # noqa: E402  (adds ROOT to the path)
import torch  # noqa: E402

from kernels import configs  # noqa: E402

FINALISTS = 4


class Job(NamedTuple):
    """One candidate of one op, with the public call that reaches it."""

    case: str
    op: str
    bucket: str
    config: dict[str, int]


class Problem(NamedTuple):
    function: Callable
    inputs: list[torch.Tensor]
    solve: Callable  # (inputs, dy) -> outputs and gradients of the reference


def _attention(D: int, tiny: bool, small: bool, device: str, dtype: torch.dtype) -> Problem:
    import attention

    from kernels.attention import causal_attention

    B, T, H = (1, 64, 2) if tiny else (2, 1024, 4) if small else (32, 1024, 768 // D)
    qkv = torch.randn(B, T, 3 * H * D, device=device, dtype=dtype).requires_grad_()
    return Problem(lambda x: causal_attention(x, H), [qkv], lambda i, dy: attention.solve(i[0], dy[0], H))


def _layer_norm(C: int, tiny: bool, small: bool, device: str, dtype: torch.dtype) -> Problem:
    import layernorm

    from kernels.layernorm import layer_norm_residual

    M = 64 if tiny else 4096 if small else 50_331_648 // C
    x, residual = (torch.randn(M, C, device=device, dtype=dtype).requires_grad_() for _ in range(2))
    weight, bias = (torch.randn(C, device=device).requires_grad_() for _ in range(2))
    return Problem(layer_norm_residual, [x, residual, weight, bias], _reference(layernorm.reference))


def _mlp(C: int, tiny: bool, small: bool, device: str, dtype: torch.dtype) -> Problem:
    import mlp

    M = 128 if tiny else 4096 if small else 50_331_648 // C
    x = torch.randn(M, C, device=device, dtype=dtype).requires_grad_()
    w_fc = (torch.randn(4 * C, C, device=device) * C**-0.5).requires_grad_()
    w_proj = (torch.randn(C, 4 * C, device=device) * (4 * C) ** -0.5).requires_grad_()
    return Problem(mlp.ours, [x, w_fc, w_proj], _reference(mlp.reference))


def _cross_entropy(V: int, tiny: bool, small: bool, device: str, dtype: torch.dtype) -> Problem:
    import cross_entropy

    from kernels.cross_entropy import linear_cross_entropy

    M, C = (32, 32) if tiny else (2048, 128) if small else (8192, 128)  # the row kernel alone is tuned: a thin GEMM will do
    x = torch.randn(M, C, device=device, dtype=dtype).requires_grad_()
    weight = (torch.randn(V, C, device=device) * C**-0.5).requires_grad_()
    return Problem(linear_cross_entropy, [x, weight, torch.randint(V, (M,), device=device)], cross_entropy.solve)


def _embedding(C: int, tiny: bool, small: bool, device: str, dtype: torch.dtype) -> Problem:
    import embedding

    from kernels.embedding import embedding as ours

    B, T, V = (2, 16, 64) if tiny else (4, 512, 50304) if small else (64, 1024, 50304)
    idx = torch.randint(V, (B, T), device=device)
    tables = [torch.randn(n, C, device=device).requires_grad_() for n in (V, T)]
    return Problem(lambda *a: ours(*a, dtype), [idx, *tables], embedding.solver(dtype))


def _decode(D: int, tiny: bool, small: bool, device: str, dtype: torch.dtype) -> Problem:
    from kernels.decode import decode_attention, decode_attention_ref

    B, T, H = (1, 32, 2) if tiny else (2, 512, 4) if small else (16, 1024, 768 // D)
    q = torch.randn(B, H * D, device=device, dtype=dtype)
    caches = [torch.randn(B, H, T, D, device=device, dtype=dtype) for _ in range(2)]
    lengths = torch.full((B,), T - 1, dtype=torch.int32, device=device)
    return Problem(decode_attention, [q, *caches, lengths], _reference(decode_attention_ref))


CASES = {
    "attention-d64": (_attention, 64),
    "attention-d128": (_attention, 128),
    "decode-d64": (_decode, 64),
    "layernorm-768": (_layer_norm, 768),
    "layernorm-384": (_layer_norm, 384),
    "layernorm-1600": (_layer_norm, 1600),
    "mlp-768": (_mlp, 768),
    "cross-entropy-50304": (_cross_entropy, 50304),
    "cross-entropy-256": (_cross_entropy, 256),
    "embedding-768": (_embedding, 768),
    "embedding-1600": (_embedding, 1600),
}


def _reference(function: Callable) -> Callable:
    return lambda inputs, dy: evaluate(function, inputs, dy)


def evaluate(function: Callable, inputs: list[torch.Tensor], dy: list[torch.Tensor]) -> list[torch.Tensor]:
    """Outputs, and gradients where an input asks for one."""
    return common.evaluate(function, inputs, dy, any(x.requires_grad for x in inputs))


def problem(case: str, tiny: bool, small: bool, device: str, dtype: torch.dtype) -> tuple[Problem, list[torch.Tensor]]:
    """The inputs of a case and the gradient of its outputs, the same in every process."""
    torch.manual_seed(1337)
    make, size = CASES[case]
    p = make(size, tiny, small, device, dtype)
    with torch.no_grad():
        return p, [torch.randn_like(y) for y in common.outputs(p.function(*p.inputs))]


class Hook:
    """Stands in for `configs.select`: `visit(op, bucket, candidates, launch)` sees each choice and may make it."""

    def __init__(self, visit: Callable):
        self.visit, self.select = visit, configs.select

    def __enter__(self):
        configs.select = lambda *choice: dict(self.visit(*choice) or self.select(*choice))

    def __exit__(self, *_):
        configs.select = self.select


_expected: dict[tuple, tuple] = {}  # of this worker


def check(job: Job, tiny: bool, device: str, dtype: torch.dtype) -> str:
    """In a worker: "ok", or why this candidate cannot be used."""
    key = job.case, tiny, device, dtype
    if key not in _expected:
        _expected.clear()
        p, dy = problem(*key[:2], True, *key[2:])
        wide = torch.float64 if dtype == torch.float32 else torch.float32
        exact = p.solve([common.widened(x, wide) for x in p.inputs], [g.to(wide) for g in dy])
        allowed = [common.error_of(a, b) for a, b in zip(p.solve(p.inputs, dy), exact)]
        _expected[key] = p, dy, exact, allowed
    p, dy, exact, allowed = _expected[key]
    with Hook(lambda op, bucket, *_: job.config if (op, bucket) == (job.op, job.bucket) else None):
        try:
            return common.verdict(evaluate(p.function, p.inputs, dy), exact, allowed)[0]
        except Exception as error:  # too large for the GPU, or the compiler refuses it: in whatever way
            return common.failure(error)


def discover(p: Problem, dy: list[torch.Tensor], case: str, ops: list[str] | None) -> list[Job]:
    """Every candidate of every op that a case chooses a configuration for."""
    jobs: list[Job] = []

    def visit(op, bucket, candidates, launch):
        if (ops is None or op in ops) and not any((j.op, j.bucket) == (op, bucket) for j in jobs):
            present = configs.lookup(op, bucket, configs.arch())
            others = [c for c in candidates(configs.arch()) if c != present]
            jobs.extend(Job(case, op, bucket, c) for c in [present, *others])

    with Hook(visit):
        evaluate(p.function, p.inputs, dy)
    return jobs


def time_jobs(jobs: list[Job], p: Problem, dy: list[torch.Tensor], device: str, budget_ms: float) -> dict[int, common.Stats]:
    """Index of a job -> its time, the whole op around it as usual; all jobs are of one (op, bucket)."""
    times: dict[int, common.Stats] = {}

    def visit(op, bucket, candidates, launch):
        if (op, bucket) == (jobs[0].op, jobs[0].bucket) and not times:
            calls = {i: (lambda j=j: launch(dict(j.config))) for i, j in enumerate(jobs)}
            times.update(common.interleaved(calls, device, budget_ms))

    with Hook(visit):
        evaluate(p.function, p.inputs, dy)
    return times


def check_all(jobs: list[Job], args: argparse.Namespace, dtype: torch.dtype) -> list[str]:
    """Statuses of the jobs. A worker that dies takes the pool along: its remaining jobs run one by one in fresh processes."""
    if args.workers == 0:
        return [check(job, args.tiny, args.device, dtype) for job in jobs]
    context = multiprocessing.get_context("spawn")
    statuses: list[str | None] = [None] * len(jobs)
    for workers in (args.workers, 1):
        open_jobs = [i for i, status in enumerate(statuses) if status is None]
        batches = [open_jobs] if workers > 1 else [[i] for i in open_jobs]
        for batch in batches:
            with ProcessPoolExecutor(min(workers, len(batch) or 1), mp_context=context) as pool:
                futures = {i: pool.submit(check, jobs[i], args.tiny, args.device, dtype) for i in batch}
                for i, future in futures.items():
                    try:
                        statuses[i] = future.result()
                    except BrokenProcessPool:
                        if workers == 1:
                            statuses[i] = "failed: its process died"
    return [status or "" for status in statuses]


def write(path: Path, arch: int, op: str, bucket: str, config: dict[str, int]) -> None:
    source = path if path.exists() else configs.TABLE
    table = json.loads(source.read_text())
    table.setdefault(f"sm_{arch}", {}).setdefault(op, {})[bucket] = config
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(table, indent=2) + "\n")
    scratch.replace(path)


def tune(case: str, args: argparse.Namespace, dtype: torch.dtype) -> None:
    p, dy = problem(case, args.tiny, False, args.device, dtype)
    jobs = discover(p, dy, case, args.ops)
    if not jobs:
        print(f"{case}: no op here chooses from the table", flush=True)
        return
    statuses = check_all(jobs, args, dtype)
    for op, bucket in dict.fromkeys((j.op, j.bucket) for j in jobs):
        mine = [(j, s) for j, s in zip(jobs, statuses) if (j.op, j.bucket) == (op, bucket)]
        bad = [(j.config, s) for j, s in mine if s != "ok"]
        good = [j for j, s in mine if s == "ok"]
        print(f"{op}/{bucket} ({case}): {len(good)} of {len(mine)} candidates pass", flush=True)
        for config, status in bad:
            if status.startswith("wrong") or args.verbose:
                print(f"    {config}: {status}", flush=True)
        if not good:
            continue
        times = time_jobs(good, p, dy, args.device, 30.0)
        ranked = sorted(times, key=lambda i: times[i].median)
        final = [good[i] for i in dict.fromkeys([*ranked[:FINALISTS], 0])]  # 0: the present entry, if it passed
        times = time_jobs(final, p, dy, args.device, 200.0)
        order = sorted(times, key=lambda i: times[i].median)
        for i in order:
            stats, mark = times[i], " (present)" if final[i].config == mine[0][0].config else ""
            print(f"    {stats.median:.4f} ms ({stats.p20:.4f} to {stats.p80:.4f}) {final[i].config}{mark}", flush=True)
        write(args.out, configs.arch(), op, bucket, final[order[0]].config)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", type=lambda s: s.split(","), help="names in the table, separated by commas; default: all")
    parser.add_argument("--cases", type=lambda s: s.split(","), default=list(CASES), help=f"default: {','.join(CASES)}")
    parser.add_argument("--out", type=Path, default=configs.TABLE, help="the table to write; default: kernels/configs.json")
    parser.add_argument("--workers", type=int, default=min(12, os.cpu_count() or 1), help="0: check in this process")
    parser.add_argument("--verbose", action="store_true", help="also show why candidates do not run")
    parser.add_argument("--tiny", action="store_true", help="the smallest shapes, for tests under Triton's interpreter")
    args = parser.parse_args(argv)
    ops = sorted({op for entries in configs._table().values() for op in entries})
    for flag, given, known in (("--cases", args.cases, CASES), ("--ops", args.ops or [], ops)):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"{flag} {','.join(unknown)}: expected some of {', '.join(known)}")
    args.device = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU to tune for")
    dtype = torch.float16 if args.device == "cpu" else torch.bfloat16
    for case in args.cases:
        tune(case, args, dtype)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
