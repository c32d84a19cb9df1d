"""Every shipped kernel variant compiles for every supported GPU, within its limits, with that GPU's fast instructions."""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
import triton

from kernels import configs, dispatch, report
from kernels.layernorm import layer_norm
from tests.helpers import INTERPRET

pytestmark = [pytest.mark.aot, pytest.mark.skipif(INTERPRET, reason="the interpreter replaces the compiler")]

# Kernels made of matrix products, and what their PTX must hold on an architecture.
MATMUL = ("attention.", "attention_hopper.", "mlp.")
EXPECTED = {80: {"cp.async", "mma"}, 86: {"cp.async", "mma"}, 90: {"wgmma"}}


def _variants():
    for arch in EXPECTED:  # sm_89 has sm_86's code and limits
        for variant in report.variants(arch):
            yield pytest.param(variant, id=f"sm_{arch}-{variant.name}")


@pytest.mark.parametrize("variant", [] if INTERPRET else list(_variants()))
def test_compiles_within_limits(variant):
    row = report.compiled(variant)
    assert row.problems == []
    if variant.name.startswith(MATMUL) and "fp32" not in variant.name:  # which takes no tensor cores
        assert EXPECTED[variant.arch] <= set(row.instructions)


def test_every_kernel_is_looked_at():
    """The report's calls reach every function named as a kernel, on some architecture."""
    launched = {(v.kernel.__module__, v.kernel.__name__) for arch in EXPECTED for v in report.variants(arch)}
    files = (Path(report.__file__).parent).glob("*.py")
    named = {
        (f"kernels.{file.stem}", name) for file in files for name in re.findall(r"^def (_\w*_kernel)\(", file.read_text(), re.M)
    }
    assert len(named) > 10
    assert named == launched


def test_every_configuration_is_looked_at(monkeypatch):
    table, lookup, used = configs._table(), configs.lookup, set()

    def note(op, bucket, arch):
        used.add((max(a for a in configs.ARCHS if a <= arch and bucket in table.get(f"sm_{a}", {}).get(op, {})), op, bucket))
        return lookup(op, bucket, arch)

    monkeypatch.setattr(configs, "lookup", note)
    for arch in configs.ARCHS:
        report.variants(arch)
    assert {(int(arch[3:]), op, bucket) for arch, ops in table.items() for op in ops for bucket in ops[op]} == used


@pytest.mark.parametrize("arch", [80, 90])
def test_layer_norm_prefetches_where_a_configuration_says_so(arch, monkeypatch):
    def backward():
        x, weight = torch.empty(64, 768, dtype=torch.bfloat16, requires_grad=True), torch.empty(768)
        layer_norm(x, weight).sum().backward()

    table = configs.lookup
    for stages, wanted in ((1, False), (2, True), (3, True)):

        def lookup(op, *rest, stages=stages):
            return table(op, *rest) | ({"STAGES": stages} if op == "layer_norm_bwd" else {})

        monkeypatch.setattr(configs, "lookup", lookup)
        row = report.compiled(report.launches(arch, backward, "C768")[-1])
        assert row.name == "layernorm.layer_norm_bwd/C768"
        assert ("cp.async" in row.instructions, row.problems) == (wanted, [])


def test_launches_leave_the_gpu_s_driver_and_the_backends_alone():
    before = triton.runtime.driver._active, dispatch.choose("layer_norm", "meta")
    report.launches(90, lambda: layer_norm(torch.empty(8, 64), torch.empty(64)), "x")
    assert (triton.runtime.driver._active, dispatch.choose("layer_norm", "meta")) == before
    assert before[1] == "torch"


def test_report_of_no_such_kernel(monkeypatch, capsys):
    monkeypatch.setattr(report, "variants", lambda arch: [report.Variant(name="x", arch=arch, kernel=None, data="")])
    monkeypatch.setattr("sys.argv", ["report", "--arch", "90", "--only", "y"])
    assert report.main() == 2
    assert capsys.readouterr().err == "report: --only y: no variant's name contains it\n"


def test_report_counts_what_is_over_the_limits():
    row = report.Row("x", 80, registers=255, stack=48, shared=200_000, instructions=())
    assert len(row.problems) == 2
