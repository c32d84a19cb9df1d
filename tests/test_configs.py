import json

import pytest

from kernels import configs


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
