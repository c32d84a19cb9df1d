"""nanogpt.checkpoint: every byte of a checkpoint is believed only after it is verified, and no failure harms an earlier one."""

import io
import json
import logging
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nanogpt import checkpoint, saver
from nanogpt.checkpoint import FILES, MANIFEST, MODEL, OPTIM, STATE
from nanogpt.optim import AdamW, LossScale


def tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"wte.weight": (13, 8), "h.0.weight": (8, 8), "ln_f.weight": (8,), "step": ()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def save(out_dir, step, val_loss=None, final=False):
    return checkpoint.save(
        out_dir, step, tensors(step), tensors(step + 1000), {"iter": step, "val_loss": val_loss, "final": final}
    )


def flip_bit(path, position):
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1 << random.randrange(8)]))


def test_r01_layout_and_content(tmp_path):
    path = save(tmp_path, 7)
    assert path == tmp_path / "step-7"
    assert {p.name for p in path.iterdir()} == {"model.safetensors", "optim.safetensors", "state.json", "manifest.json"}
    assert [p.name for p in tmp_path.iterdir()] == ["step-7"]
    checkpoint.verify(path)
    for name, expected in ((MODEL, tensors(7)), (OPTIM, tensors(1007))):
        loaded = load_file(path / name)  # the safetensors library reads what we write
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[key], expected[key]) and loaded[key].shape == expected[key].shape for key in expected)
    manifest = json.loads((path / MANIFEST).read_text())
    for name in FILES:
        assert manifest["files"][name]["size"] == (path / name).stat().st_size
        digest = subprocess.run(["sha256sum", path / name], capture_output=True, text=True, check=True).stdout.split()[0]
        assert manifest["files"][name]["sha256"] == digest


def test_r02_manifest_comes_last_and_everything_is_synced_before_the_rename(tmp_path, monkeypatch):
    from nanogpt.checkpoint import os

    events = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}").split("/")[-1]), fsync(fd)))
    monkeypatch.setattr(os, "rename", lambda a, b, **kw: (events.append("rename"), rename(a, b, **kw)))
    save(tmp_path, 1)
    assert events == [MODEL, OPTIM, STATE, MANIFEST, ".partial-step-1", "rename", tmp_path.name]


@pytest.mark.parametrize("name", [MODEL, OPTIM, STATE, MANIFEST])
def test_r04_every_flipped_byte_is_noticed(tmp_path, name):
    path = save(tmp_path, 5)
    whole = (path / name).read_bytes()
    # Every byte of the small files; of the manifest those that mean something, which its white space does not
    for position in range(0, len(whole), 1 if name in (STATE, MANIFEST) else 17):
        if name == MANIFEST and chr(whole[position]) in " \n":
            continue
        flip_bit(path / name, position)
        with pytest.raises(ValueError, match=f"^{path}/"):
            checkpoint.verify(path)
        (path / name).write_bytes(whole)
    checkpoint.verify(path)


def test_r04_message_names_the_tensor(tmp_path):
    path = save(tmp_path, 5)
    size = (path / MODEL).stat().st_size
    flip_bit(path / MODEL, size - 20)  # the last 36 bytes are ln_f.weight and step
    with pytest.raises(ValueError, match=r"model.safetensors: tensor ln_f.weight was altered"):
        checkpoint.verify(path)
    flip_bit(path / OPTIM, 12)
    flip_bit(path / MODEL, 12)
    with pytest.raises(ValueError, match=r"model.safetensors: its header was altered"):
        checkpoint.verify(path)


def damage_truncate(path):
    with open(path / OPTIM, "r+b") as file:
        file.truncate(100)


def damage_missing(path):
    (path / MODEL).unlink()


def damage_no_manifest(path):
    (path / MANIFEST).unlink()


def damage_garbage_manifest(path):
    (path / MANIFEST).write_text("[1, 2")


def damage_foreign_manifest(path):
    (path / MANIFEST).write_text('{"format": 1, "step": 9, "files": {}}')


def damage_renamed(path):
    content = (path.parent / "step-5" / MANIFEST).read_bytes()
    (path / MANIFEST).write_bytes(content)


DAMAGES = {
    damage_truncate: "optim.safetensors: 100 bytes, .* were written",
    damage_missing: "model.safetensors: missing",
    damage_no_manifest: "manifest.json: missing",
    damage_garbage_manifest: "manifest.json: Expecting",
    damage_foreign_manifest: "manifest.json: its content was altered",
    damage_renamed: "manifest.json: of step 5",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_r04_damaged_newest_is_passed_over_with_a_warning(tmp_path, caplog, damage):
    save(tmp_path, 5)
    damage(save(tmp_path, 9))
    with caplog.at_level(logging.WARNING):
        assert checkpoint.find(tmp_path).name == "step-5"
    assert "passing over step-9" in caplog.text
    with pytest.raises(ValueError, match=f"step-9/{DAMAGES[damage]}"):  # asked for by number: an error
        checkpoint.find(tmp_path, step=9)


def test_r04_nothing_readable_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint in it"):
        checkpoint.find(tmp_path)
    with pytest.raises(ValueError, match="no checkpoint in it"):
        checkpoint.find(tmp_path / "nowhere")
    damage_truncate(save(tmp_path, 5))
    with pytest.raises(ValueError, match="none of its 1 checkpoints can be read"):
        checkpoint.find(tmp_path)
    with pytest.raises(ValueError, match="no checkpoint step-4; it has steps 5"):
        checkpoint.find(tmp_path, step=4)


def test_r05_keeps_the_newest_the_best_and_the_final(tmp_path):
    for step, val_loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 2.5), (6, None), (7, 2.2)):
        save(tmp_path, step, val_loss, final=step == 3)
        saver.prune(tmp_path, keep=2)
    assert checkpoint.steps(tmp_path) == [2, 3, 6, 7]
    assert checkpoint.find(tmp_path).name == "step-7"
    assert checkpoint.find(tmp_path, best=True).name == "step-2"


def test_r05_a_damaged_checkpoint_does_not_count(tmp_path, caplog):
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    damage_truncate(tmp_path / "step-4")
    damage_missing(tmp_path / "step-3")
    saver.prune(tmp_path, keep=2)
    assert checkpoint.steps(tmp_path) == [1, 2, 3, 4]
    assert "step-4/optim.safetensors: 100 bytes" in caplog.text


def test_r05_a_failed_delete_only_warns(tmp_path, caplog, monkeypatch):
    save(tmp_path, 1)

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(saver.shutil, "rmtree", refuse)
    saver.remove(tmp_path, 1)
    assert "not removed: Permission denied" in caplog.text
    assert checkpoint.steps(tmp_path) == []


def test_replaces_an_unreadable_one_of_the_same_step(tmp_path):
    damage_truncate(save(tmp_path, 5))
    save(tmp_path, 5)
    checkpoint.verify(tmp_path / "step-5")
    assert [p.name for p in tmp_path.iterdir()] == ["step-5"]


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt])
def test_r03_cut_off_while_it_replaces_one_of_the_same_step(tmp_path, monkeypatch, failure):
    save(tmp_path, 5, val_loss=1.0)
    rename = os.rename

    def failing(old, new, **keys):
        if "partial" in str(old):
            raise failure
        rename(old, new, **keys)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", failing)
        with pytest.raises(type(failure) if isinstance(failure, OSError) else failure):
            save(tmp_path, 5, val_loss=2.0)
    if failure is KeyboardInterrupt:  # as a killed program's successor does
        checkpoint.recover(tmp_path)
        checkpoint.tidy(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-5"]
    assert checkpoint.read_state(checkpoint.find(tmp_path))["val_loss"] == 1.0


def test_r04_a_file_that_the_disk_does_not_give_back_is_passed_over(tmp_path, monkeypatch, caplog):
    save(tmp_path, 5)
    save(tmp_path, 9)

    class Failing(io.FileIO):
        def read(self, size=-1):
            if "step-9/optim" in self.name:
                raise OSError(5, "Input/output error")
            return super().read(size)

    monkeypatch.setattr(checkpoint, "open", lambda path, mode: Failing(os.fspath(path)), raising=False)
    assert checkpoint.find(tmp_path).name == "step-5"
    assert "step-9/optim.safetensors: Input/output error; passing over step-9" in caplog.text


def test_r06_a_failed_write_leaves_the_earlier_one(tmp_path):
    """The kernel itself refuses: the process may write no file over 20,000 bytes."""
    code = """
import resource, signal, sys, torch
from pathlib import Path
from nanogpt import checkpoint, saver
checkpoint.save(Path(sys.argv[1]), 1, {"w": torch.zeros(100)}, {"m": torch.zeros(100)}, {})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    checkpoint.save(Path(sys.argv[1]), 2, {"w": torch.zeros(10_000)}, {"m": torch.zeros(10_000)}, {})
except OSError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert "File too large; the checkpoint needs 80,000 bytes, " in done.stdout
    assert done.stdout.rstrip().endswith(f"are free: '{tmp_path}/step-2'")
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]
    checkpoint.verify(tmp_path / "step-1")


class Net(torch.nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.fc = torch.nn.Linear(3, width)
        self.out = torch.nn.Linear(width, 2, bias=False)


def trained(steps=0, loss_scale=False, width=4):
    net = Net(width)
    optimizer = AdamW(([net.fc.weight, net.out.weight], [net.fc.bias]), lr=0.1)
    scale = LossScale(torch.device("cpu"), initial=8.0) if loss_scale else None
    for _ in range(steps):
        loss = net.out(net.fc(torch.randn(5, 3))).square().sum()
        (loss if scale is None else loss * scale.value).backward()
        optimizer.step(1.0, scale)
    return net, optimizer, scale


@pytest.mark.parametrize("loss_scale", [False, True])
def test_model_and_optimizer_come_back(tmp_path, loss_scale):
    net, optimizer, scale = trained(3, loss_scale)
    path = checkpoint.save(
        tmp_path, 3, checkpoint.model_tensors(net), checkpoint.optim_tensors(net, optimizer, scale), {"iter": 3}
    )
    other, other_optimizer, other_scale = trained(0, loss_scale)
    checkpoint.restore_model(other, checkpoint.load_tensors(path / MODEL), path / MODEL)
    checkpoint.restore_optim(other, other_optimizer, other_scale, checkpoint.load_tensors(path / OPTIM), path / OPTIM)
    batch = torch.randn(5, 3)
    for n, o, s in ((net, optimizer, scale), (other, other_optimizer, other_scale)):
        (n.out(n.fc(batch)).square().sum() * (1.0 if s is None else s.value)).backward()
        o.step(1.0, s)
    assert other_optimizer.completed.item() == 4
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))
    if loss_scale:
        assert (other_scale.value.item(), other_scale.good_steps.item()) == (8.0, 4.0)


def test_another_dtype_starts_with_a_fresh_loss_scale(tmp_path):
    net, optimizer, _ = trained(2)
    saved = checkpoint.optim_tensors(net, optimizer, None)
    other, other_optimizer, scale = trained(0, loss_scale=True)
    checkpoint.restore_optim(other, other_optimizer, scale, saved, tmp_path)
    assert other_optimizer.completed.item() == 2
    assert scale.value.item() == 8.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("fc.bias"), "tensor fc.bias is missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "tensor extra is none of this model"),
        (lambda t: t.update({"fc.bias": torch.zeros(3)}), r"tensor fc.bias has shape \(3,\), the model \(4,\)"),
    ],
)
def test_tensors_of_another_model_are_refused(tmp_path, change, message):
    saved = {name: t.clone() for name, t in checkpoint.model_tensors(Net()).items()}
    change(saved)
    with pytest.raises(ValueError, match=f"{tmp_path}: {message}"):
        checkpoint.restore_model(Net(), saved, tmp_path)


def test_no_pickle_is_read(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"\x80\x04cos\nsystem\n(S'touch MARK'\ntR.")
    with pytest.raises(ValueError, match=r"x.safetensors: "):
        checkpoint.load_tensors(tmp_path / "x.safetensors")


def test_load_model_takes_the_best_of_a_run_or_the_one_named(tmp_path):
    from nanogpt.config import GPTConfig
    from nanogpt.model import GPT

    config = GPTConfig(block_size=8, vocab_size=16, n_layer=1, n_head=2, n_embd=8)
    models = {}
    for step, val_loss in ((1, 1.0), (2, 2.0)):
        models[step] = model = GPT(config, torch.float32)
        state = {"iter": step, "val_loss": val_loss, "model": vars(config)}
        checkpoint.save(tmp_path, step, checkpoint.model_tensors(model), {}, state)
    for path, step in ((tmp_path, 1), (tmp_path / "step-2", 2), (str(tmp_path), 1)):
        model, state = checkpoint.load_model(path, "cpu", torch.float32)
        assert state["iter"] == step
        assert not model.training
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), models[step].parameters(), strict=True))
        assert model.lm_head.weight is model.transformer.wte.weight
    flip_bit(tmp_path / "step-2" / MODEL, 1000)
    with pytest.raises(ValueError, match="was altered"):
        checkpoint.load_model(tmp_path / "step-2", "cpu", torch.float32)
    with pytest.raises(ValueError, match="no checkpoint in it"):
        checkpoint.load_model(tmp_path / "step-3", "cpu", torch.float32)


def test_arrays_of_every_layout_are_written(tmp_path):
    t = torch.arange(12.0).view(3, 4)
    path = checkpoint.save(tmp_path, 1, {"t": t.t(), "b": t.bfloat16()}, {"i": torch.arange(3)}, {})
    checkpoint.verify(path)
    assert torch.equal(checkpoint.load_tensors(path / MODEL)["t"], t.t())
    assert torch.equal(checkpoint.load_tensors(path / MODEL)["b"], t.bfloat16())
    assert np.array_equal(checkpoint.load_tensors(path / OPTIM)["i"].numpy(), np.arange(3))
