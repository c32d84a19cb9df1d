import json

import pytest

from kernels import configs, dispatch


def test_table_is_sound():
    table = json.loads(configs.TABLE.read_text())
    assert set(table) <= {f"sm_{a}" for a in configs.ARCHS}
    for arch, ops in table.items():
        for op, buckets in ops.items():
            for bucket, config in buckets.items():
                assert config, f"{arch} {op} {bucket} is empty"


def test_an_architecture_without_an_entry_takes_the_next_older(monkeypatch):
    monkeypatch.setattr(configs, "_table", lambda: {"sm_80": {"op": {"d64": {"BLOCK_M": 64}}}, "sm_90": {"op": {"d128": {}}}})
    assert configs.lookup("op", "d64", 90) == {"BLOCK_M": 64}
    with pytest.raises(KeyError, match="op/d128 at sm_86"):
        configs.lookup("op", "d128", 86)


def test_lookup_gives_a_copy(monkeypatch):
    monkeypatch.setattr(configs, "_table", lambda: {"sm_80": {"op": {"d64": {"BLOCK_M": 64}}}})
    configs.lookup("op", "d64", 80).clear()
    assert configs.lookup("op", "d64", 80) == {"BLOCK_M": 64}


def test_measuring_repeats_a_launch_that_takes_its_configuration_apart(monkeypatch):
    testing = pytest.importorskip("triton.testing")
    monkeypatch.setattr(testing, "do_bench", lambda call, **_: [call() for _ in range(3)][-1])
    candidates = [{"rows": 3, "ms": 2.0}, {"rows": 1, "ms": 1.0}]
    assert list(configs.measure(candidates, lambda config: config.pop("ms"))) == [(2.0, candidates[0]), (1.0, candidates[1])]
    assert candidates == [{"rows": 3, "ms": 2.0}, {"rows": 1, "ms": 1.0}]


@pytest.mark.parametrize(
    ("capability", "arch"), [((8, 0), 80), ((8, 7), 86), ((8, 9), 89), ((9, 0), 90), ((10, 0), 90), ((12, 0), 89)]
)
def test_a_gpu_takes_the_newest_architecture_that_it_runs(monkeypatch, capability, arch):
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    with dispatch.assuming(capability):
        assert configs.arch() == arch
