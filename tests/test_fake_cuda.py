"""The trainer on a GPU that is not there (see fake_cuda.py): what would fail on a real one, and where the host would wait."""

import pytest
import torch

from kernels import dispatch, extension
from nanogpt import resume, train
from nanogpt.data import loader
from tests import runs
from tests.fake_cuda import FakeGPU, build_guard


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.walk(tmp_path_factory.mktemp("walk"))


@pytest.fixture(scope="module")
def guard(tmp_path_factory):
    if why := extension.unavailable("adamw", "cpp"):  # it holds the schemas
        pytest.skip(why)
    if why := build_guard(tmp_path_factory.mktemp("guard")):
        pytest.skip(why)


@pytest.fixture
def gpu(monkeypatch, guard):
    """Its context; the CUDA extension's ops are there as schemas and fakes."""
    found = extension.unavailable
    monkeypatch.setattr(extension, "unavailable", lambda op, backend: "" if backend == "cuda" else found(op, backend))
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    dispatch.use("auto")
    gpu = FakeGPU(monkeypatch)
    monkeypatch.setattr(loader, "_fill", gpu.fill)
    yield gpu
    dispatch.use("auto")


def trained(gpu, monkeypatch, data, out_dir, **keys):
    """A run of six updates on the fake GPU, which notes what happens from the first one on."""
    begin, model = train.train, train.GPT

    def counted(*args):
        gpu.syncs.clear()
        gpu.waits.clear()
        return begin(*args)

    def on_device(*args):  # fake parameters cannot move in place
        with torch.device("cuda", 0):
            made = model(*args)
        made.to = lambda device: made
        return made

    monkeypatch.setattr(train, "train", counted)
    monkeypatch.setattr(train, "GPT", on_device)
    for name, result in (("unsound", ""), ("save", True)):
        monkeypatch.setattr(resume, name, lambda *args, result=result: result)
    with gpu:
        assert runs.run(data, out_dir, device="cuda", max_iters=6, timeout=0, **keys) == 0


@pytest.mark.parametrize(
    "keys",
    [
        {"dtype": "bfloat16", "dropout": 0.1, "bias": True},
        {"dtype": "float16", "spike_guard": True, "layer_lr_decay": 0.9},
        {"dtype": "float32", "grad_clip": 0.0, "gelu": "tanh"},
        {"recompute": True, "dropout": 0.1, "checkpoint_minutes": 1e-9},
        {"freeze": 1, "dtype": "float16"},
        {"kernels": "torch", "dropout": 0.1},
    ],
    ids=lambda keys: "-".join(f"{key}={value}" for key, value in keys.items()),
)
def test_the_host_waits_for_evaluations_and_for_the_step_before(gpu, monkeypatch, data, tmp_path, keys):
    trained(gpu, monkeypatch, data, tmp_path, **keys)
    assert dict(gpu.syncs) == {"train.evaluate": 3}
    reads = 6 + 3 * (2 * 3 - 1)  # of each update; of all batches but the last of three evaluations of two splits
    assert gpu.waits["distributed.Readback._arrived"] == reads
