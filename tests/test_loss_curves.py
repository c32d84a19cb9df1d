"""Curves of the loss: two backends, rounding and another seed; what is written of them; verdicts that see wrong gradients."""

import csv
import sys
from pathlib import Path

import pytest
import torch

from kernels import dispatch
from nanogpt import model
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
        (case, "torch-perturbed", "seed 1337", "ok"),
        (case, "torch", "seed 1338", "ok"),
        (case, "ours-auto", "verdict rounding", "ok"),
        (case, "ours-auto", "verdict seeds", "ok"),
    ]
    with (tmp_path / "curves" / f"{case}.csv").open() as file:
        rows = list(csv.DictReader(file))
    curves = [[float(r["loss"]) for r in rows if (r["provider"], r["seed"]) == c[:2]] for c in
              (("ours-auto", "1337"), ("torch", "1337"), ("torch", "1338"))]  # fmt: skip
    assert [len(c) for c in curves] == [12, 12, 12]
    assert all(c[0] - c[-1] > 0.01 for c in curves)  # it learns
    ours, reference, other = curves
    apart = max(abs(a - b) for a, b in zip(ours, reference))
    assert apart < 1e-4 < loss_curves.distance(other, reference)
    assert (apart > 0) == (loss_curves.dispatch.choose("layer_norm", "cpu") != "torch")
    assert float(bench.rows[-1]["error"]) == pytest.approx(
        loss_curves.distance(ours, reference) / loss_curves.distance(other, reference), rel=1e-3
    )
    perturbed = [float(r["loss"]) for r in rows if r["provider"] == "torch-perturbed"]
    rounding = max(loss_curves.distance(perturbed, reference), 2**-23 * reference[0])
    assert float(bench.rows[-2]["error"]) == pytest.approx(loss_curves.distance(ours, reference) / rounding, rel=1e-3)
    assert float(bench.rows[0]["loss"]) == pytest.approx(ours[-1], rel=1e-4)
    assert {r["op"] for r in report.read(tmp_path)} == {"loss_curves"}


def test_the_backend_asked_for_runs_and_is_put_back(data, tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr(loss_curves.dispatch, "use", lambda name, use=loss_curves.dispatch.use: (used.append(name), use(name)))
    before = loss_curves.dispatch.requested()
    bench = run(data, tmp_path, "--kernels", "torch", "--dtype", "bf16")
    assert used[1:-1] == ["torch"] * 4
    assert loss_curves.dispatch.requested() == before
    assert [r["error"] for r in bench.rows[-2:]] == ["0", "0"]  # the same backend gives the same curve


def test_in_both_dtypes_and_drawn(data, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    bench = run(data, tmp_path / "results.csv", "--dtype", "bf16", "--plot")
    assert {r["dtype"] for r in bench.rows} == {"bf16"}
    assert (tmp_path / "curves" / "tiny-B4-T32-N12.png").read_bytes()[:4] == b"\x89PNG"


def test_verdict():
    reference, other = [3.0, 2.0, 1.0], [3.1, 1.9, 1.1]
    curves = reference, [3.02, 2.02, 0.98], other
    near = loss_curves.verdict([3.05, 2.05, 0.95], *curves)
    assert near == {
        "rounding": ("ok", pytest.approx(0.05), pytest.approx(0.02)),
        "seeds": ("ok", pytest.approx(0.05), pytest.approx(0.1)),
    }
    between = loss_curves.verdict([3.07, 2.07, 0.93], *curves)
    assert (between["rounding"][0], between["seeds"][0]) == ("wrong: 0.07 from the reference, rounding 0.02", "ok")
    far = loss_curves.verdict([3.0, 2.0, 1.2], *curves)
    assert far["seeds"][0] == "wrong: 0.1155 from the reference, seeds 0.1"
    broken = loss_curves.verdict([3.0, float("nan"), 1.0], *curves)
    assert all(status.startswith("wrong: nan") for status, _, _ in broken.values())
    assert loss_curves.verdict(reference, reference, reference, other)["rounding"] == ("ok", 0.0, 3 * 2**-23)


def halved_dq(monkeypatch):
    def halve(dqkv):
        return torch.cat([dqkv[..., : dqkv.shape[-1] // 3] / 2, dqkv[..., dqkv.shape[-1] // 3 :]], -1)

    def causal_attention(qkv, *rest, right=model.causal_attention):
        if dispatch.requested() != "torch":
            qkv.register_hook(halve)
        return right(qkv, *rest)

    monkeypatch.setattr(model, "causal_attention", causal_attention)


def no_dweight(monkeypatch):
    def broken(right, before):  # the weight follows that many other tensors
        def layer_norm(*args, **keys):
            args = list(args)
            if dispatch.requested() != "torch":
                args[before] = args[before].view_as(args[before])
                args[before].register_hook(torch.zeros_like)
            return right(*args, **keys)

        return layer_norm

    monkeypatch.setattr(model, "layer_norm", broken(model.layer_norm, 1))
    monkeypatch.setattr(model, "layer_norm_residual", broken(model.layer_norm_residual, 2))


@pytest.mark.parametrize(
    ("dtype", "mutation"),
    [("fp32", None), ("fp32", halved_dq), ("fp32", no_dweight), ("bf16", None), ("bf16", no_dweight)],
    ids=["right-fp32", "dq-halved-fp32", "dweight-zero-fp32", "right-bf16", "dweight-zero-bf16"],
)
def test_wrong_gradients_are_seen(data, tmp_path, monkeypatch, mutation, dtype):
    """The spread of two seeds lets them pass. In bf16 and at this size, rounding is more than half of dq."""
    if mutation:
        mutation(monkeypatch)
    rows = run(data, tmp_path, "--dtype", dtype, *(["--steps", "50"] if dtype == "bf16" else [])).rows
    rounding, seeds = rows[-2:]
    assert (rounding["pass"], seeds["pass"]) == ("verdict rounding", "verdict seeds")
    assert rounding["status"].startswith("wrong" if mutation else "ok"), rounding
    assert seeds["status"] == "ok"


@pytest.mark.parametrize(("dtype", "least", "most"), [(torch.float32, 2**-24, 2**-22), (torch.bfloat16, 2**-12, 2**-10)])
def test_a_perturbation_is_of_the_size_of_rounding(dtype, least, most):
    torch.manual_seed(0)
    net = model.GPT(model.GPTConfig(8, 32, 1, 1, 16), dtype)
    before = [p.detach().clone() for p in net.parameters()]
    loss_curves.perturb(net, dtype)
    for p, old in zip(net.parameters(), before):
        changed = (p.detach() - old)[old != 0] / old[old != 0]
        assert ((changed.abs() >= least) & (changed.abs() <= most)).all()
        assert changed.numel() == 0 or {True, False} == set((changed > 0).tolist())  # biases are 0 and stay so


def test_no_further_curve_after_the_seconds(data, tmp_path):
    rows = run(data, tmp_path, "--seconds", "1e-9").rows
    assert [r["status"] for r in rows] == ["skipped: 1e-09 seconds had passed"] * 4


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
