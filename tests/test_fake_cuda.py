"""The trainer on a GPU that is not there (see fake_cuda.py): what would fail on a real one, and where the host would wait."""

import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("triton")
from torch.testing._internal.distributed.fake_pg import FakeStore

from kernels import dispatch, extension
from nanogpt import distributed, generate, resume, train
from nanogpt.config import GPTConfig
from nanogpt.data import loader
from nanogpt.model import GPT
from nanogpt.saver import Saver
from tests import runs
from tests.fake_cuda import FakeGPU, build_guard
from tests.helpers import INTERPRET

pytestmark = [
    pytest.mark.skipif(INTERPRET, reason="the interpreter replaces the compiler"),
    pytest.mark.filterwarnings("error:TRITON", "ignore:Accessing the data pointer of FakeTensor"),
]


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
def fake(monkeypatch, guard):
    """Makes a fake GPU; the CUDA extension's ops are there as schemas and fakes, if it is built."""
    dispatch._capability.cache_clear()

    def make(built=True, **options):
        found = extension.unavailable
        monkeypatch.setattr(
            extension, "unavailable", lambda op, b: found(op, b) if b != "cuda" else "" if built else "not built"
        )
        gpu = FakeGPU(monkeypatch, **options)
        monkeypatch.setattr(loader, "_fill", gpu.fill)
        return gpu

    yield make
    monkeypatch.undo()
    dispatch._capability.cache_clear()


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
        assert runs.run(data, out_dir, **({"device": "cuda", "max_iters": 6, "timeout": 0} | keys)) == 0


@pytest.mark.parametrize(
    "keys",
    [
        {"dtype": "bfloat16", "dropout": 0.1, "bias": True},
        {"dtype": "float16", "spike_guard": True, "layer_lr_decay": 0.9},
        {"dtype": "float32", "grad_clip": 0.0, "gelu": "tanh"},
        {"recompute": True, "dropout": 0.1, "checkpoint_minutes": 1e-9},
        {"freeze": 1, "dtype": "float16"},
        {"kernels": "torch", "dropout": 0.1},
        {"built": False, "bias": True},
        {"built": False, "capability": (7, 5)},
        {"deterministic": True, "spike_guard": True, "dropout": 0.1},
        {"deterministic": True, "spike_guard": True, "dropout": 0.1, "kernels": "torch"},
    ],
    ids=lambda keys: "-".join(f"{key}={value}" for key, value in keys.items()),
)
def test_the_host_waits_for_evaluations_and_for_the_step_before(fake, monkeypatch, data, tmp_path, keys):
    keys = dict(keys)
    gpu = fake(built=keys.pop("built", True), capability=keys.pop("capability", (9, 0)))
    trained(gpu, monkeypatch, data, tmp_path, **keys)
    assert dict(gpu.syncs) == {"train.evaluate": 3}
    reads = 6 + 3 * (2 * 3 - 1)  # of each update; of all batches but the last of three evaluations of two splits
    assert gpu.waits["distributed.Readback._arrived"] == reads


def test_with_several_ranks_too(fake, monkeypatch, data, tmp_path):
    """On PyTorch's process group that does nothing; DDP, which wants autograd's engine, is left out."""
    gpu, begin = fake(), distributed.init

    def init(config):
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
        return replace(begin(config), size=2)

    def leave(code):
        raise AssertionError(f"exit code {code}")

    for name, function in (("init", init), ("wrap", lambda model, *_: model), ("_exit", leave)):
        monkeypatch.setattr(distributed, name, function)
    monkeypatch.setattr(distributed, "gather", lambda value, world: [value] * world.size)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # PyTorch puts its own there
    try:
        trained(gpu, monkeypatch, data, tmp_path, spike_guard=True)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    assert dict(gpu.syncs) == {"train.evaluate": 3}


# What one program may have, bytes of shared memory: A100, RTX 30 and 40, H100, B200, RTX 50.
SHARED = {(8, 0): 166_912, (8, 6): 101_376, (9, 0): 232_448, (10, 0): 232_448, (12, 0): 101_376}


@pytest.mark.aot
@pytest.mark.parametrize("capability", SHARED, ids=lambda c: f"sm_{c[0]}{c[1]}")
def test_the_step_of_gpt2_compiles_and_fits(fake, monkeypatch, data, tmp_path, capability):
    gpu = fake(built=False, capability=capability, compiles=True)
    sizes = {"n_layer": 1, "n_head": 12, "n_embd": 768, "block_size": 1024, "batch_size": 12, "max_iters": 2, "eval_iters": 1}
    trained(gpu, monkeypatch, data, tmp_path, **sizes)
    module = "attention_hopper" if capability == (9, 0) else "attention"
    expected = {f"{module}.{name}" for name in ("_fwd_kernel", "_dq_kernel", "_dkdv_kernel")}
    expected |= {f"embedding._embedding_{name}_kernel" for name in ("fwd", "dwpe", "dwte", "runs")}
    expected |= {"layernorm._layer_norm_fwd_kernel", "layernorm._layer_norm_bwd_kernel", "mlp._fwd_kernel", "mlp._bwd_kernel"}
    assert set(gpu.shared_memory) == expected | {"cross_entropy._cross_entropy_kernel"}
    assert {name: size for name, size in gpu.shared_memory.items() if size > SHARED[capability]} == {}


def test_a_save_waits_once_for_all_of_its_copies(fake, monkeypatch, tmp_path):
    gpu, saver, written = fake(), Saver(tmp_path, keep=2), []
    monkeypatch.setattr(saver, "_write", lambda step, model, optim, state: written.append(model | optim))
    with gpu:
        model, optim = ({name: torch.ones(3, 5, device="cuda") for name in names} for names in ("wb", "mv"))
        for step in (1, 2):
            assert saver.save(step, model, optim, {})
        saver.close()
        assert dict(gpu.syncs) == {"saver.Saver.save": 2}
        assert [t.tolist() for t in written[0].values()] == [[[0] * 5] * 3] * 4  # refused where they have not arrived


def test_the_host_need_not_wait_for_a_token(fake):
    gpu = fake()
    with gpu:
        with torch.device("cuda", 0):
            model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=128, block_size=16, vocab_size=96), torch.bfloat16)
            idx = torch.zeros(3, 5, dtype=torch.int64)
        gpu.syncs.clear()
        out = generate.generate(model, idx, 14, temperature=0.8, top_k=20, top_p=0.9, vocab_size=90)
    assert (out.shape, out.device.type, dict(gpu.syncs)) == ((3, 19), "cuda", {})
    # The prompt, eleven tokens behind it, then two whole windows; the last token is read by none
    assert (gpu.launches["attention._fwd_kernel"], gpu.launches["decode._decode_kernel"]) == (2 * 3, 2 * 11)
