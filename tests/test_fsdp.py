"""--fsdp: two processes share out one model (gloo), beside DDP and one process; and the kernels on 16-bit parameters."""

import json
import threading

import pytest
import torch

from kernels import dispatch, extension
from nanogpt import anomaly, checkpoint, saver, sharding
from nanogpt.config import GPTConfig, TrainConfig, load
from nanogpt.distributed import World
from nanogpt.model import GPT
from tests.helpers import DEVICE, assert_as_accurate
from tests.runs import KILLED, TORCHRUN, arguments, losses, records, run, start, status
from tests.test_evaluate import data, items  # noqa: F401

KEYS = {"fsdp": True, "gradient_accumulation_steps": 4, "dropout": 0.1, "max_iters": 10, "n_embd": 32}
FILES = (checkpoint.MODEL, checkpoint.OPTIM)

# A run that tells how many bytes of weights and moments and how many elements of gradients this rank has at each update, which
# micro-steps exchanged gradients, whether embeddings and a block are shared out when backward begins, and whether all that is
# saved is
MEASURED = """
import os, sys
import torch
from torch.distributed.fsdp import FSDPModule
from nanogpt import checkpoint, config, optim, sharding, train
held, grads, exchanges, between, saved = set(), set(), "", set(), set()
shard, backward, tensors = sharding.shard, torch.Tensor.backward, checkpoint.model_tensors
def watched(model, *args):
    shard(model, *args)
    def noted_backward(loss):
        t = model.transformer
        between.add(tuple(sharding.is_sharded(m.weight) for m in (t.wte, t.h[0].ln_1)))
        backward(loss)
    torch.Tensor.backward = noted_backward
sharding.shard = watched
def noted_tensors(model):
    saved.update(map(sharding.is_sharded, tensors(model).values()))
    return tensors(model)
checkpoint.model_tensors = noted_tensors
step, sync = optim.AdamW.step, FSDPModule.set_requires_gradient_sync
def noted(self, wanted):
    global exchanges
    exchanges += "-x"[wanted]
    sync(self, wanted)
FSDPModule.set_requires_gradient_sync = noted
def measured(self, *args):
    grads.add(sum(sharding.local(p.grad).numel() for p in self.parameters()))
    norm = step(self, *args)
    state = [t for p in self.parameters() for t in (p, self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"])]
    held.add(tuple(sum(sharding.local(t).untyped_storage().nbytes() for t in state[i::3]) for i in range(3)))
    return norm
optim.AdamW.step = measured
code = train.main(config.load(config.TrainConfig, sys.argv[1:]))
os.write(1, f"held: {held} {grads} {exchanges} {between} {saved}\\n".encode())  # whole, beside the other rank
sys.exit(code)
"""


def torchrun(*command, **environment):
    code, out, err = start([*TORCHRUN, *command], **environment)
    assert (code, "Warning" in err) == (0, False), err
    return out


def tensors(out_dir, step):
    return {name: t for file in FILES for name, t in checkpoint.load_tensors(out_dir / f"step-{step}" / file).items()}


def val_losses(out_dir):
    return [(r["iter"], r["val_loss"]) for r in records(out_dir, "eval")]


@pytest.fixture(scope="module")
def sharded(data, tmp_path_factory):  # noqa: F811
    """(directory, output) of a run of 10 updates, in whose evaluations the second rank is left without a last batch."""
    path = tmp_path_factory.mktemp("sharded")
    script = path / "measured.py"
    script.write_text(MEASURED)
    return path / "out", torchrun(script, *arguments(data, path / "out", **KEYS))


def test_losses_are_those_of_ddp(sharded, data, tmp_path):  # noqa: F811
    out_dir, out = sharded
    assert "device: cpu, float32, 2 processes, sharded, " in out
    torchrun("-m", "nanogpt.train", *arguments(data, tmp_path, **KEYS | {"fsdp": False}))
    assert len(losses(out_dir)) == 10
    for found, expected in ((losses(out_dir), losses(tmp_path)), (val_losses(out_dir), val_losses(tmp_path))):
        assert [it for it, _ in found] == [it for it, _ in expected]
        assert [x for _, x in found] == pytest.approx([x for _, x in expected], rel=2e-6)
    ours, theirs = tensors(out_dir, 10), tensors(tmp_path, 10)
    assert ours.keys() == theirs.keys()
    for name, t in ours.items():
        assert t.shape == theirs[name].shape, name
        torch.testing.assert_close(t, theirs[name], rtol=1e-4, atol=1e-6)


def test_a_rank_holds_half_and_gradients_are_exchanged_once_an_update(sharded):
    """The embeddings stay gathered from forward to backward, and are not after an evaluation, when they are saved."""
    out_dir, out = sharded
    elements = sum(t.numel() for t in checkpoint.load_tensors(out_dir / "step-10" / checkpoint.MODEL).values())
    half = elements // 2  # every parameter has an even number of rows, so there is no padding
    held = ", ".join([str(4 * half)] * 3)
    assert out.count(f"held: {{({held})}} {{{half}}} {'-x' * 10} {{(False, True)}} {{True}}\n") == 2, out


def test_stopped_and_resumed_it_is_bitwise_the_same(sharded, data, tmp_path):  # noqa: F811
    """SIGTERM to the second rank; resumed with the blocks recomputed in backward, which changes no bit either."""
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    out = tmp_path / "out"
    torchrun(script, "SIGTERM", 1, 4, *arguments(data, out, **KEYS))
    stopped = status(out)["iter"]
    assert (status(out)["state"], stopped in (5, 6)) == ("preempted", True)
    said = torchrun("-m", "nanogpt.train", *arguments(data, out, **KEYS, init_from="resume", recompute=True))
    assert f"resuming from {out}/step-{stopped}; changed: recompute False -> True\n" in said
    assert losses(out) == losses(sharded[0])
    assert val_losses(out) == val_losses(sharded[0])
    for file in FILES:
        assert (out / "step-10" / file).read_bytes() == (sharded[0] / "step-10" / file).read_bytes()


def test_checkpoints_are_interchangeable(data, items, tmp_path):  # noqa: F811
    """One process, then two with shards, then one: as one alone. HellaSwag's nine batches leave the second rank without one."""
    keys = {"eval_interval": 4, "freeze": 0, "layer_lr_decay": 0.8, "hellaswag": items, "eval_hellaswag_interval": 4}
    keys = KEYS | keys | {"fsdp": False, "dropout": 0.0}
    assert run(data, tmp_path / "alone", **keys) == 0
    assert run(data, tmp_path / "mixed", **keys | {"max_iters": 4}) == 0
    keys["init_from"] = "resume"
    shards = {"max_iters": 8, "fsdp": True, "async_save": False}
    torchrun("-m", "nanogpt.train", *arguments(data, tmp_path / "mixed", **keys | shards))
    assert checkpoint.read_state(tmp_path / "mixed" / "step-8")["config"]["fsdp"]
    assert run(data, tmp_path / "mixed", **keys) == 0
    for kind, values in (("train", ("loss", "grad_norm")), ("eval", ("val_loss", "hellaswag_acc", "hellaswag_acc_norm"))):
        theirs = {r["iter"]: r for r in records(tmp_path / "alone", kind)}
        ours = records(tmp_path / "mixed", kind)
        assert {r["iter"] for r in ours} == theirs.keys()
        for r in ours:
            for value in values:
                assert r.get(value) == pytest.approx(theirs[r["iter"]].get(value), rel=2e-6), (r["iter"], value)
    ours, theirs = tensors(tmp_path / "mixed", 10), tensors(tmp_path / "alone", 10)
    assert ours.keys() == theirs.keys()
    for name, t in ours.items():
        torch.testing.assert_close(t, theirs[name], rtol=1e-4, atol=1e-6)


def test_both_ranks_skip_what_is_not_finite_on_one(data, tmp_path, monkeypatch):  # noqa: F811
    """In fp16: a NaN loss, gradients that are NaN on the second rank's side alone, which lower the loss scale, and training
    goes on as in one process; then the guard ends the run, and every rank writes what it saw."""
    keys = KEYS | {"dropout": 0.0, "bias": True, "dtype": "float16", "gradient_accumulation_steps": 2, "eval_interval": 6}
    keys |= {"spike_guard": True, "max_bad_steps": 3, "anomaly_dump": "true", "allow_fault_injection": True}
    command = ["-m", "nanogpt.train", *arguments(data, tmp_path, **keys)]
    monkeypatch.setenv("NANOGPT_FAULT", "nan@2,nangrad@4")
    assert run(data, tmp_path / "one", **keys | {"fsdp": False, "max_iters": 7}) == 0
    code, _, err = start([*TORCHRUN, *command], NANOGPT_FAULT="nan@2:rank1,nangrad@4:rank1,nan@7-9:rank1")
    assert code == 1, err
    found = {r["iter"]: r.get("skipped") for r in records(tmp_path, "train")}
    assert found == dict.fromkeys((0, 1, 3, 5, 6)) | {2: "not finite", 4: "overflow, loss scale halved"} | dict.fromkeys(
        (7, 8, 9), "not finite"
    )
    assert "3 updates in a row were skipped, the first was 7" in err
    alone, ours = (dict(losses(out_dir)) for out_dir in (tmp_path / "one", tmp_path))
    for it in (0, 1, 3, 4, 5, 6):
        assert ours[it] == pytest.approx(alone[it], rel=2e-4)
    assert ours[6] < ours[0] - 0.2
    held = tensors(tmp_path, 6)
    assert held["step"] == 4  # of the six
    assert held["loss_scale"] == 2.0**15  # halved by both
    assert all(t.isfinite().all() for t in held.values())
    for rank in range(2):
        assert f"step-7-rank-{rank}.json: done again, it is finite" in err
        record = json.loads((tmp_path / "anomaly" / f"step-7-rank-{rank}.json").read_text())
        assert record["weights"].keys() == record["weight gradients"].keys()
        weight = record["weights"]["transformer.wte.weight"]
        assert weight["max"] == pytest.approx(held["transformer.wte.weight"].abs().max().item(), rel=0.5)


@pytest.mark.parametrize(
    ("processes", "keys", "message"),
    [
        (1, {}, "fsdp=True: needs several processes"),
        (2, {"compile": True}, "fsdp=True: not with compile=True"),
    ],
)
def test_refusals(monkeypatch, processes, keys, message):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(ValueError, match=message):
        load(TrainConfig, arguments("data", "out", fsdp=True, **keys))


def test_one_process_is_refused_in_one_line(data, tmp_path):  # noqa: F811
    code, _, err = start(["-m", "nanogpt.train", *arguments(data, tmp_path, fsdp=True)])
    assert (code, err) == (2, "train: fsdp=True: needs several processes: torchrun --nproc_per_node=N\n")


@pytest.mark.parametrize(("rows", "size", "fits"), [(4, 2, True), (3, 2, True), (4, 3, False), (5, 4, False), (7, 4, True)])
def test_every_rank_must_have_a_row(monkeypatch, rows, size, fits):
    """The last of the ranks has what is left of ceil(rows / ranks) each."""
    model = GPT(GPTConfig(rows, 64, 1, 1, 64), torch.float32)

    class AcceptedError(Exception):
        pass

    def broadcast(*_):
        raise AcceptedError

    monkeypatch.setattr(sharding.dist, "broadcast", broadcast)
    refusal = rf"fsdp=True: transformer\.wpe\.weight of shape \({rows}, 64\) cannot be shared out over {size} processes"
    with pytest.raises(AcceptedError if fits else ValueError, match=None if fits else refusal):
        sharding.shard(model, World(0, 0, size, torch.device("cpu")), torch.float32)


def test_gathering_for_a_save_is_progress(tmp_path, monkeypatch):
    """Each tensor is, as the one before the next, which the ranks put together."""
    seen = []
    monkeypatch.setattr(saver, "whole", lambda t: seen.append("tensor") or t)
    writer = saver.Saver(tmp_path, keep=2)
    writer.progress = lambda: seen.append("progress") if threading.current_thread() is threading.main_thread() else None
    assert writer.save(1, {"a": torch.ones(2), "b": torch.ones(3)}, {"c": torch.ones(1)}, {})
    assert seen == ["tensor", "progress"] * 3
    writer.close()


def test_what_is_not_sharded_is_left_alone():
    t = torch.randn(3, 2)
    assert sharding.local(t) is sharding.whole(t) is t
    assert not sharding.is_sharded(t)
    sharding.assign(t, torch.ones(3, 2))
    assert torch.equal(t, torch.ones(3, 2))


@pytest.mark.parametrize(("processes", "keys", "advised"), [(2, {}, True), (1, {}, False), (2, {"fsdp": True}, False)])
def test_it_is_advised_where_memory_ends_under_ddp(monkeypatch, processes, keys, advised):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    config = TrainConfig(batch_size=1, **keys)
    advice = anomaly.memory_advice(config, torch.device("cpu"), MemoryError("no memory"))
    assert ("--fsdp=true" in advice) == advised


@pytest.mark.parametrize("backend", ["cpp", pytest.param("triton", marks=pytest.mark.triton)])
def test_kernels_take_16_bit_parameters(monkeypatch, backend):
    """As FSDP2's mixed precision hands them over: every op of the model, forward and backward."""
    if backend == "cpp" and (why := extension.unavailable("layer_norm", "cpp") if DEVICE == "cpu" else "kernels of the CPU"):
        pytest.skip(why)
    shape = GPTConfig(16, 64, 2, 2, 32, bias=True, gelu="tanh", real_vocab_size=61)
    exact = GPT(shape, torch.float32)
    torch.nn.init.normal_(exact.transformer.h[0].ln_1.bias)
    with torch.no_grad():
        for p in exact.parameters():
            p.copy_(p.half())
    tokens = torch.randint(61, (2, 3, 16), device=DEVICE)

    def gradients(model, kernels):
        monkeypatch.setattr(dispatch, "_requested", kernels)
        _, loss = model(*tokens)
        (loss * 1024).backward()  # none underflows
        return {"loss": loss.detach()} | {name: p.grad / 1024 for name, p in model.named_parameters()}

    def half():
        model = GPT(shape, torch.float16).half().to(DEVICE)
        model.load_state_dict(exact.state_dict())
        return model

    expected = gradients(exact.to(DEVICE), "torch")
    reference, ours = gradients(half(), "torch"), gradients(half(), backend)
    for name, value in ours.items():
        assert name == "loss" or value.dtype == torch.float16
        assert_as_accurate(value, reference[name], expected[name], factor=3, atol=1e-5)
