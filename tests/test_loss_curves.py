"""Curves of the loss: two backends from the same weights and another seed, what is written of them, and the verdict."""

import csv
import sys
from pathlib import Path

import pytest

from tests.runs import walk

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "scripts")]  # scripts, not packages

import loss_curves  # noqa: E402
import report  # noqa: E402

CPU = ["--device", "cpu", "--size", "tiny", "--steps", "12"]


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "walk"
    folder.mkdir()
    return walk(folder)


def run(data, out, *more):
    return loss_curves.main([*CPU, "--data", str(data), "--out", str(out), *more])


def test_curves_and_verdict(data, tmp_path):
    bench = run(data, tmp_path, "--batch", "3", "--length", "16")
    case = "tiny-B3-T16-N12"
    assert [(r["case"], r["provider"], r["pass"], r["status"]) for r in bench.rows] == [
        (case, "ours-auto", "seed 1337", "ok"),
        (case, "torch", "seed 1337", "ok"),
        (case, "torch", "seed 1338", "ok"),
        (case, "ours-auto", "verdict", "ok"),
    ]
    with (tmp_path / "curves" / f"{case}.csv").open() as file:
        rows = list(csv.DictReader(file))
    curves = [[float(r["loss"]) for r in rows if (r["provider"], r["seed"]) == c[:2]] for c in
              (("ours-auto", "1337"), ("torch", "1337"), ("torch", "1338"))]  # fmt: skip
    assert [len(c) for c in curves] == [12, 12, 12]
    assert all(c[0] - c[-1] > 0.01 for c in curves)  # it learns
    ours, reference, other = curves
    assert 0 < max(abs(a - b) for a, b in zip(ours, reference)) < 1e-4 < loss_curves.distance(other, reference)
    assert float(bench.rows[-1]["error"]) == pytest.approx(
        loss_curves.distance(ours, reference) / loss_curves.distance(other, reference), rel=1e-3
    )
    assert float(bench.rows[0]["loss"]) == pytest.approx(ours[-1], rel=1e-4)
    assert {r["op"] for r in report.read(tmp_path)} == {"loss_curves"}


def test_the_backend_asked_for_runs_and_is_put_back(data, tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr(loss_curves.dispatch, "use", lambda name, use=loss_curves.dispatch.use: (used.append(name), use(name)))
    before = loss_curves.dispatch.requested()
    bench = run(data, tmp_path, "--kernels", "torch", "--dtype", "bf16")
    assert used[1:-1] == ["torch"] * 3
    assert loss_curves.dispatch.requested() == before
    assert bench.rows[-1]["error"] == "0"  # the same backend gives the same curve


def test_in_both_dtypes_and_drawn(data, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    bench = run(data, tmp_path / "results.csv", "--dtype", "bf16", "--plot")
    assert {r["dtype"] for r in bench.rows} == {"bf16"}
    assert (tmp_path / "curves" / "tiny-B4-T32-N12.png").read_bytes()[:4] == b"\x89PNG"


def test_verdict():
    reference, other = [3.0, 2.0, 1.0], [3.1, 1.9, 1.1]
    assert loss_curves.verdict([3.05, 2.05, 0.95], reference, other) == ("ok", pytest.approx(0.05), pytest.approx(0.1))
    assert loss_curves.verdict([3.0, 2.0, 1.2], reference, other)[0] == "wrong: 0.1155 from the reference, the seeds 0.1"
    assert loss_curves.verdict([3.0, float("nan"), 1.0], reference, other)[0].startswith("wrong: nan")


def test_no_further_curve_after_the_seconds(data, tmp_path):
    rows = run(data, tmp_path, "--seconds", "1e-9").rows
    assert [r["status"] for r in rows] == ["skipped: 1e-09 seconds had passed"] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "no-such"], "dataset=no-such: "),
        (["--length", "1000000"], "needs 1000001 tokens in a row"),
        (["--dtype", "fp16"], "--dtype fp16: needs a loss scale"),
        (["--kernels", "cuda"], "kernels=cuda: "),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes(data, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        run(data, tmp_path / "out", *options)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("loss_curves: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
