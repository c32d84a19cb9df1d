"""Results folders -> tables and plots: every number from a row, every row with its device, versions, commit and command.

python scripts/report.py DIR...              # Markdown on the terminal
python scripts/report.py --write             # benchmarks/results/* -> docs/performance.md and docs/plots/*.png
"""

import argparse
import csv
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REQUIRED = ("op", "case", "provider", "pass", "dtype", "status", "device", "torch", "commit", "date", "command")
UNITS = {"tflops": "TFLOP/s", "gbps": "GB/s", "tokens_per_s": "tokens/s", "ms": "ms"}
ORDER = (
    "train_step",
    "loss_curves",
    "attention",
    "cross_entropy",
    "mlp",
    "layernorm",
    "optimizer",
    "embedding",
    "memory",
    "generate",
    "dataloader",
    "prepare",
    "ceilings",
)

Row = dict[str, str]


def read(folder: Path) -> list[Row]:
    """All rows of a folder's CSV files; of repeated measurements the last.

    Raises:
        ValueError: naming file and line, for a row that does not say where its numbers come from, or no rows at all.
    """
    rows: dict[tuple, Row] = {}
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="") as file:
            for line, row in enumerate(csv.DictReader(file), start=2):
                missing = [column for column in REQUIRED if not row.get(column)]
                if missing:
                    raise ValueError(f"{path}:{line}: no {', '.join(missing)}: a number without its origin is not reported")
                rows[tuple(row[c] for c in ("op", "case", "provider", "pass", "dtype"))] = row
    if not rows:
        raise ValueError(f"{folder}: no result rows (*.csv)")
    return list(rows.values())


def table(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *lines]) + "\n"


def distinct(rows: list[Row], column: str) -> list[str]:
    return list(dict.fromkeys(row[column] for row in rows))


def number(text: str, digits: int = 3) -> str:
    """A rate or time as read from a row, to a few significant digits, with thousands separated."""
    value = float(text)
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}" if value < 10 ** (digits - 1) else f"{value:.0f}"


def best(values: dict[str, float], lowest: bool) -> str:
    return (min if lowest else max)(values, key=values.__getitem__) if values else ""


def to_the_best_peer(found: dict[str, Row], unit: str) -> str:
    """How much faster the fastest of ours is than the fastest of the others; ours on PyTorch's references is neither."""
    costs = {n: float(r["ms"]) if unit == "ms" else 1 / float(r[unit]) for n, r in found.items() if n != "ours-torch"}
    ours = min((cost for name, cost in costs.items() if name.startswith("ours")), default=0.0)
    peer = min((cost for name, cost in costs.items() if not name.startswith("ours")), default=0.0)
    return f"{peer / ours:.2f}x" if ours and peer else ""


def op_tables(rows: list[Row]) -> str:
    """For each pass: a line per case, a column per provider, the fastest in bold, ours against the best peer."""
    text = ""
    for pass_ in distinct(rows, "pass"):
        timed = [r for r in rows if r["pass"] == pass_ and r["ms"] and r["status"] == "ok"]
        if not timed:
            continue
        unit = next((u for u in ("tokens_per_s", "tflops", "gbps") if all(r[u] for r in timed)), "ms")
        names = distinct(timed, "provider")
        lines = []
        for case, dtype in dict.fromkeys((r["case"], r["dtype"]) for r in timed):
            found = {r["provider"]: r for r in timed if (r["case"], r["dtype"]) == (case, dtype)}
            fastest = best({n: float(r[unit]) for n, r in found.items()}, unit == "ms")
            cells = [f"{case} {dtype}"]
            for name in names:
                row = found.get(name)
                value = number(row[unit]) + (f" ({number(row['percent'])}%)" if row["percent"] else "") if row else ""
                if row and row["peak_mib"] and pass_ == "both":
                    value += f", {number(row['peak_mib'])} MiB"
                cells.append(f"**{value}**" if name == fastest and len(found) > 1 else value)
            lines.append([*cells, to_the_best_peer(found, unit)])
        ceiling = " (percent of the measured ceiling)" if any(r["percent"] for r in timed) else ""
        header = ["case", *names, "ours to the best peer"]
        if not any(line[-1] for line in lines):
            header, lines = header[:-1], [line[:-1] for line in lines]
        text += f"{pass_}, {UNITS[unit]}{ceiling}\n\n" + table(header, lines) + "\n"
    return text


def step_tables(rows: list[Row]) -> str:
    """The training step: one line per provider, the breakdown, the time to the first step."""
    steps = [r for r in rows if r["pass"] == "step" and r["status"] == "ok"]
    text = ""
    for case, dtype in dict.fromkeys((r["case"], r["dtype"]) for r in steps):
        chosen = [r for r in steps if (r["case"], r["dtype"]) == (case, dtype)]
        peers = [float(r["tokens_per_s"]) for r in chosen if not r["provider"].startswith("ours")]
        lines = []
        for r in sorted(chosen, key=lambda r: -float(r["tokens_per_s"])):
            against = f"{float(r['tokens_per_s']) / max(peers):.2f}x" if peers else ""
            mfu = f"{float(r['mfu']):.1f}% / {float(r['mfu_causal']):.1f}%" if r["mfu"] else ""
            memory = f"{float(r['peak_mib']) / 1024:.1f} GiB" if r["peak_mib"] else ""
            spread = f"{number(r['ms'], 4)} ({number(r['p20'], 4)} to {number(r['p80'], 4)})"
            lines.append([r["provider"], number(r["tokens_per_s"]), against, spread, mfu, memory])
        header = ["provider", "tokens/s", "to the best peer", "ms a step (p20 to p80)", "mfu / mfu_causal", "peak memory"]
        text += f"{case}, {dtype}\n\n" + table(header, lines) + "\n"
        parts = [r for r in rows if r["pass"].startswith("part ") and (r["case"], r["dtype"]) == (case, dtype)]
        if parts:
            names = distinct(parts, "provider")
            value = {(r["provider"], r["pass"]): f"{float(r['ms']):.2f}" for r in parts}
            lines = [[p.removeprefix("part "), *(value.get((n, p), "") for n in names)] for p in distinct(parts, "pass")]
            text += f"{case}, {dtype}: device ms a step by component\n\n" + table(["component", *names], lines) + "\n"
    starts = [r for r in rows if r["pass"].startswith("start ") and r["status"] == "ok"]
    if starts:
        lines = [[r["case"], r["provider"], r["pass"].removeprefix("start "), f"{float(r['ms']) / 1e3:.1f} s"] for r in starts]
        text += (
            "From process start to the end of the first step\n\n" + table(["case", "provider", "caches", "time"], lines) + "\n"
        )
    return text


YARDSTICKS = {"verdict rounding": "what rounding does (at most 3)", "verdict seeds": "the distance of two seeds (at most 1)"}


def curve_tables(rows: list[Row]) -> str:
    """Curves of the loss: where each ends, and how far the kernels' is from the reference's."""
    lines = []
    for r in rows:
        if r["status"] == "ok":
            ratio = f"{float(r['error']):.2g} of {YARDSTICKS[r['pass']]}" if r["pass"] in YARDSTICKS else ""
            lines.append(
                [f"{r['case']} {r['dtype']}", r["provider"], r["pass"], number(r["loss"], 4) if r["loss"] else "", ratio]
            )
    header = ["case", "provider", "weights", "loss, mean of the last tenth", "distance from torch"]
    return table(header, lines) + "\n" if lines else ""


def memory_table(rows: list[Row]) -> str:
    """A line per case: the peak as calculated and as measured."""
    lines = []
    for case, dtype in dict.fromkeys((r["case"], r["dtype"]) for r in rows):
        peak = {r["provider"]: r["peak_mib"] for r in rows if (r["case"], r["dtype"]) == (case, dtype)}
        lines.append([f"{case} {dtype}", *(number(peak[name], 4) for name in ("calculated", "measured"))])
    return "peak, MiB\n\n" + table(["case", "calculated", "measured"], lines) + "\n"


TABLES = {"train_step": step_tables, "loss_curves": curve_tables, "memory": memory_table}


def section(folder: Path, linked: bool = False) -> str:
    """A folder as Markdown; ``linked`` to the plots that :func:`draw` makes."""
    rows = read(folder)
    facts = {c: ", ".join(v for v in distinct(rows, c) if v) for c in ("device", "driver", "torch", "triton", "commit", "date")}
    loads = [float(r["load"]) for r in rows if r.get("load")]
    if loads:
        facts["load average"] = f"{min(loads):.1f} to {max(loads):.1f}"
    text = f"## {facts['device']}, {facts['date']}\n\n" + ", ".join(f"{c} {v}" for c, v in facts.items() if v and c != "device")
    text += f". Rows: `{folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder.name}`.\n\n"
    for op in sorted(distinct(rows, "op"), key=lambda op: ORDER.index(op) if op in ORDER else len(ORDER)):
        chosen = [r for r in rows if r["op"] == op]
        text += f"### {op}\n\n" + "".join(f"`{command}`\n" for command in distinct(chosen, "command")) + "\n"
        text += TABLES.get(op, op_tables)(chosen)
        for r in chosen:
            if r["status"] != "ok":
                text += f"- {r['case']} {r['pass']}, {r['provider']}: {r['status']}\n"
        if linked:
            text += "".join(f"\n![{op}](plots/{name})\n" for name in plots(folder, op, chosen))
        text += "\n"
    return text


def plots(folder: Path, op: str, rows: list[Row]) -> dict[str, list[Row] | Path]:
    """File name of each plot of an op -> what it shows: bars of rows, or a file of curves."""
    if op == "loss_curves":
        return {f"{folder.name}-{path.stem}.png": path for path in sorted((folder / "curves").glob("*.csv"))}
    shown = [r for r in rows if r["ms"] and r["status"] == "ok" and not r["pass"].startswith(("part", "start"))]
    return {f"{folder.name}-{op}.png": shown} if shown else {}


def draw(folder: Path, target: Path) -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import common
    import loss_curves

    target.mkdir(parents=True, exist_ok=True)
    rows = read(folder)
    for op in distinct(rows, "op"):
        for name, shown in plots(folder, op, [r for r in rows if r["op"] == op]).items():
            (loss_curves.plot if isinstance(shown, Path) else common.plot)(shown, target / name)


def page(folders: list[Path]) -> str:
    """docs/performance.md."""
    head = (
        "# Performance\n\nWritten by `python scripts/report.py --write` from the rows in `benchmarks/results`; do not edit.\n"
        "How things are measured: `benchmarks/common.py`.\n\n"
    )
    return head + "".join(section(folder, linked=True) for folder in folders)


def result_folders() -> list[Path]:
    return sorted(p for p in (ROOT / "benchmarks" / "results").iterdir() if p.is_dir())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, help="default: every folder of benchmarks/results")
    parser.add_argument("--write", action="store_true", help="write docs/performance.md and docs/plots/")
    args = parser.parse_args()
    folders = args.folders or result_folders()
    docs = ROOT / "docs"
    try:
        text = page(folders) if args.write else "".join(section(folder) for folder in folders)
    except ValueError as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2
    if not args.write:
        print(text)
        return 0
    for folder in folders:
        draw(folder, docs / "plots")
    (docs / "performance.md").write_text(text)
    print(f"{docs / 'performance.md'}: {len(folders)} folders")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
