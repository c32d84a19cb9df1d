"""Every shipped kernel variant compiles for every supported GPU, within its limits, with that GPU's fast instructions."""

import pytest

pytest.importorskip("triton")
from kernels import report
from tests.helpers import INTERPRET

pytestmark = [pytest.mark.aot, pytest.mark.skipif(INTERPRET, reason="the interpreter replaces the compiler")]

# Ops made of matrix products, and what their PTX must hold on an architecture.
MATMUL = ("attention_fwd", "attention_dq", "attention_dkdv", "gelu_mlp")
EXPECTED = {80: {"cp.async", "mma"}, 86: {"cp.async", "mma"}, 89: {"cp.async", "mma"}, 90: {"wgmma"}}


def _cases():
    for arch in (80, 86, 90):  # sm_89 has sm_86's code and limits
        for case in report.cases(arch):
            yield pytest.param(case, arch, id=f"sm_{arch}-{case.name}")


@pytest.mark.parametrize(("case", "arch"), list(_cases()) if not INTERPRET else [])
def test_compiles_within_limits(case, arch):
    row = report.compile_case(case, arch)
    assert row.problems == []
    if case.name.startswith(MATMUL):
        assert EXPECTED[arch] <= set(row.instructions)


@pytest.mark.parametrize("arch", [80, 90])
def test_layer_norm_prefetches_where_a_configuration_says_so(arch):
    case = next(case for case in report.cases(arch) if case.name == "layer_norm_bwd/C768")
    for stages, wanted in ((1, False), (2, True), (3, True)):
        row = report.compile_case(case._replace(constants=case.constants | {"STAGES": stages}), arch)
        assert ("cp.async" in row.instructions, row.problems) == (wanted, [])


def test_report_counts_what_is_over_the_limits():
    row = report.Row("x", 80, registers=255, stack=48, shared=200_000, instructions=())
    assert len(row.problems) == 2
