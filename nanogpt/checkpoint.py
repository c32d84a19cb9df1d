"""Checkpoints that are written whole or not at all, and verified before they are believed.

``OUT/step-N`` holds the state after N updates: model.safetensors, optim.safetensors, state.json, and manifest.json with size
and sha256 of each of them and of each tensor. It is written under a temporary name, every file and the directory forced to
disk, the manifest last, and then renamed: a directory called step-N is complete unless its storage damaged it later, which the
manifest reveals. No pickle anywhere. When a run saves, and what it keeps, is in ``saver``.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nanogpt.config import GPTConfig
from nanogpt.optim import AdamW, LossScale
from nanogpt.sharding import assign

log = logging.getLogger(__name__)

FORMAT = 1
MODEL, OPTIM, STATE, MANIFEST = "model.safetensors", "optim.safetensors", "state.json", "manifest.json"
FILES = (MODEL, OPTIM, STATE)
PIECE = 64 << 20  # bytes that are hashed and written, and then forced to disk, at a time
READ = 1 << 20  # bytes that are read at a time
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64", torch.uint8: "U8"}


# Writing


def save(
    out_dir: Path,
    step: int,
    model: dict[str, Tensor],
    optim: dict[str, Tensor],
    state: dict[str, Any],
    progress: Callable[[], None] = lambda: None,
) -> Path:
    """Writes OUT/step-N, replacing one of that name.

    Args:
        out_dir: directory, made if missing.
        step: N, completed updates.
        model, optim: tensors by name, on any device.
        state: what JSON can hold.
        progress: called as writing gets on.

    Returns:
        The path of OUT/step-N.

    Raises:
        OSError: naming the path, the bytes needed and the bytes free; earlier checkpoints are as they were.
    """
    final = out_dir / f"step-{step}"
    partial = out_dir / f".partial-step-{step}"
    manifest: dict[str, Any] = {"format": FORMAT, "step": step, "files": {}, "tensors": {}}
    try:
        make_directory(out_dir)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for name, tensors in ((MODEL, model), (OPTIM, optim)):
            manifest["files"][name], manifest["tensors"][name] = _write_tensors(partial / name, tensors, progress)
        manifest["files"][STATE] = _write(partial / STATE, [json.dumps(state, allow_nan=False).encode()], progress)
        manifest["sha256"] = digest(manifest)
        _write(partial / MANIFEST, [json.dumps(manifest, indent=1).encode()], progress)
        _sync(partial)
        if final.exists():
            replaced = out_dir / f".replaced-step-{step}"
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        partial.rename(final)
        _sync(out_dir)
    except OSError as error:
        recover(out_dir)
        shutil.rmtree(partial, ignore_errors=True)
        needed = sum(t.numel() * t.element_size() for tensors in (model, optim) for t in tensors.values())
        free = shutil.disk_usage(out_dir).free if out_dir.is_dir() else 0
        message = f"{error.strerror}; the checkpoint needs {needed:,} bytes, {free:,} are free"
        raise OSError(error.errno, message, str(final)) from error
    tidy(out_dir)
    return final


def _write_tensors(path: Path, tensors: dict[str, Tensor], progress: Callable[[], None]) -> tuple[dict, dict]:
    """Writes safetensors' format: length of the header (8 bytes), header (JSON), data. One pass writes and hashes, which the
    library's writer cannot do. Returns the entries for the manifest."""
    header, entries, offset = {}, {}, 0
    for name, t in tensors.items():
        end = offset + t.numel() * t.element_size()
        header[name] = {"dtype": DTYPES[t.dtype], "shape": list(t.shape), "data_offsets": [offset, end]}
        offset = end
    head = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
    head += b" " * (-len(head) % 8)

    def chunks() -> Iterable[memoryview | bytes]:
        yield len(head).to_bytes(8, "little") + head
        for name, t in tensors.items():
            data, digest = _bytes(t), hashlib.sha256()
            for start in range(0, len(data), PIECE):
                piece = data[start : start + PIECE]
                digest.update(piece)
                yield piece
            entries[name] = {"dtype": DTYPES[t.dtype], "shape": list(t.shape), "sha256": digest.hexdigest()}

    return _write(path, chunks(), progress), entries


def _bytes(t: Tensor) -> memoryview:
    return memoryview(t.detach().cpu().reshape(-1).view(torch.uint8).numpy())


def _write(path: Path, chunks: Iterable[memoryview | bytes], progress: Callable[[], None]) -> dict:
    digest, size, synced = hashlib.sha256(), 0, 0
    with open(path, "wb") as file:

        def sync() -> None:
            file.flush()
            os.fsync(file.fileno())
            progress()

        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
            progress()
            if size - synced >= PIECE:  # all at the end may take long, and would show no progress
                sync()
                synced = size
        sync()
    return {"size": size, "sha256": digest.hexdigest()}


def make_directory(path: Path) -> None:
    """Makes a directory and those above it, each entered in its parent on the disk."""
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
        _sync(path.parent)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def recover(out_dir: Path) -> None:
    """Puts back a checkpoint that a save had moved aside when it ended before the new one took its name."""
    for replaced in out_dir.glob(".replaced-step-*"):
        final = out_dir / replaced.name.removeprefix(".replaced-")
        if not final.exists():
            replaced.rename(final)


def tidy(out_dir: Path) -> None:
    """Removes what an interrupted save or removal left behind; what cannot be removed is left with a warning."""
    for pattern in (".partial-step-*", ".replaced-step-*", ".discarded-step-*"):
        for path in out_dir.glob(pattern):
            discard(path)


def discard(path: Path) -> None:
    """Removes a directory, or warns that it cannot."""
    try:
        shutil.rmtree(path)
    except OSError as error:
        log.warning("%s: not removed: %s", path, error.strerror)


def by_loss(states: dict[int, dict]) -> list[int]:
    """Steps that were evaluated, and on the data of the newest, lowest validation loss first."""

    def data(state: dict) -> Any:
        return state["loader"].get("fingerprint") if isinstance(state.get("loader"), dict) else None

    compare = {step: state for step, state in states.items() if data(state) == data(states[max(states)])}
    known = {step: loss for step, state in compare.items() if isinstance(loss := state.get("val_loss"), float)}
    return sorted(known, key=lambda step: (known[step], -step))


# Reading


def steps(out_dir: Path) -> list[int]:
    """The N of all OUT/step-N, ascending."""
    names = (re.fullmatch(r"step-(\d+)", path.name) for path in out_dir.iterdir()) if out_dir.is_dir() else ()
    return sorted(int(match[1]) for match in names if match)


def verify(path: Path, progress: Callable[[], None] = lambda: None) -> None:
    """Compares every byte of a checkpoint with its manifest.

    Args:
        path: OUT/step-N.
        progress: called as reading gets on.

    Raises:
        ValueError: naming the file, and the tensor, that is missing, cut short, altered or unreadable.
    """
    manifest = check_sizes(path)
    for name in FILES:
        digest = hashlib.sha256()
        try:
            with open(path / name, "rb") as file:
                while piece := file.read(READ):
                    digest.update(piece)
                    progress()
        except OSError as error:
            raise ValueError(f"{path / name}: {error.strerror}") from error
        if digest.hexdigest() != manifest["files"][name]["sha256"]:
            raise ValueError(f"{path / name}: {_altered(path / name, manifest['tensors'].get(name, {}), progress)}")


def check_sizes(path: Path) -> dict:
    """The manifest of a checkpoint whose files are all there in their sizes; ValueError naming what is not."""
    if path.is_symlink() and path.resolve().parent != path.parent.resolve():
        raise ValueError(f"{path}: a link that leads out of {path.parent}")
    manifest = _read_json(path / MANIFEST)
    if manifest.get("format", FORMAT) != FORMAT:
        raise ValueError(f"{path / MANIFEST}: format {manifest['format']}, this release reads {FORMAT}")
    if manifest.pop("sha256", None) != digest(manifest):
        raise ValueError(f"{path / MANIFEST}: its content was altered")
    if f"step-{manifest.get('step')}" != path.name:
        raise ValueError(f"{path / MANIFEST}: of step {manifest.get('step')}")
    files, tensors = manifest.get("files"), manifest.get("tensors")
    if not isinstance(files, dict) or files.keys() != set(FILES):  # no other name, so none that leads elsewhere
        raise ValueError(f"{path / MANIFEST}: its files are {list(files or ())!s:.200}, not {', '.join(FILES)}")
    if not isinstance(tensors, dict) or not all(isinstance(entries, dict) for entries in tensors.values()):
        raise ValueError(f"{path / MANIFEST}: its tensors are not listed by file and name")
    for entry in [*files.values(), *(entry for entries in tensors.values() for entry in entries.values())]:
        if not isinstance(entry, dict) or not isinstance(entry.get("sha256"), str):
            raise ValueError(f"{path / MANIFEST}: an entry without sha256: {entry!r:.200}")
    for name in FILES:
        file, size = path / name, files[name].get("size")
        if file.is_symlink() or not file.is_file():
            raise ValueError(f"{file}: {'a link, not a file' if file.is_symlink() else 'missing'}")
        if file.stat().st_size != size:
            raise ValueError(f"{file}: {file.stat().st_size} bytes, {size} were written")
    return manifest


def digest(manifest: dict) -> str:
    """What the manifest says of itself, so that its own damage is never taken for that of a file."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _altered(path: Path, entries: dict, progress: Callable[[], None]) -> str:
    """Which part of a file whose hash is wrong differs."""
    if path.suffix == ".safetensors":
        try:
            tensors = load_tensors(path)
        except ValueError:
            return "its header was altered"
        for name, entry in entries.items():
            if name in tensors and hashlib.sha256(_bytes(tensors[name])).hexdigest() != entry["sha256"]:
                return f"tensor {name} was altered"
            progress()
        return "its header was altered"
    return "its content was altered"


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU; ValueError naming the file where it is none."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: {error}") from error


def read_state(path: Path) -> dict[str, Any]:
    """The state.json of a checkpoint."""
    return _read_json(path / STATE)


COUNTS = dict.fromkeys(("iter", "tokens", "evaluated", "stale"), int)
LOSSES = dict.fromkeys(("val_loss", "best_val_loss"), float | None)
RUN_STATE = COUNTS | LOSSES | {"final": bool, "rng": list} | dict.fromkeys(("config", "loader", "dataset", "guard"), dict)


def run_state(path: Path) -> dict[str, Any]:
    """The state.json of a checkpoint that a run can continue from; ValueError naming what it lacks."""
    state = read_state(path)
    for key, kind in RUN_STATE.items():
        if key not in state or not isinstance(state[key], kind) or (type(state[key]) is bool) != (kind is bool):
            found = f"{state[key]!r:.200}" if key in state else "missing"
            raise ValueError(f"{path / STATE}: {key} is {found}, not of type {getattr(kind, '__name__', kind)}")
    return state


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path}: missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object")
    return content


def find(out_dir: Path, step: int = 0, best: bool = False) -> Path:
    """The checkpoint to load: verified, and the newest of those that are. Each one passed over is logged as a warning.

    Args:
        out_dir: where the OUT/step-N are.
        step: only this one; 0: any.
        best: prefer the one with the lowest validation loss.

    Raises:
        ValueError: where there is none, or none that verifies.
    """
    found = steps(out_dir)
    if not found:
        raise ValueError(f"{out_dir}: no checkpoint in it")
    if step and step not in found:
        raise ValueError(f"{out_dir}: no checkpoint step-{step}; it has steps {', '.join(map(str, found))}")
    if step:
        verify(out_dir / f"step-{step}")
        return out_dir / f"step-{step}"
    order = found[::-1]
    if best:
        order = list(dict.fromkeys(by_loss({n: s for n in found if (s := _state_or_none(out_dir / f"step-{n}"))}) + order))
    for candidate in order:
        path = out_dir / f"step-{candidate}"
        try:
            verify(path)
            return path
        except ValueError as error:
            log.warning("%s; passing over step-%d", error, candidate)
    raise ValueError(f"{out_dir}: none of its {len(found)} checkpoints can be read")


def _state_or_none(path: Path) -> dict[str, Any] | None:
    """For ranking only: what cannot be read is reported when it is verified."""
    try:
        return read_state(path)
    except ValueError:
        return None


# What a checkpoint of a training run holds


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters by nanoGPT's names; the tied lm_head.weight is transformer.wte.weight."""
    return {name: p.detach() for name, p in model.named_parameters()}


def restore_model(model: nn.Module, tensors: dict[str, Tensor], source: Path) -> None:
    """Copies tensors into a model; ValueError naming those that do not fit it."""
    _restore(model_tensors(model), tensors, source)


def optim_tensors(model: nn.Module, optimizer: AdamW, loss_scale: LossScale | None) -> dict[str, Tensor]:
    """The optimizer's state by ``exp_avg.NAME`` and so on, live tensors; frozen parameters have none."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    named = {f"{key}.{name}": optimizer.state[p][key] for key in ("exp_avg", "exp_avg_sq") for name, p in trained.items()}
    named["step"] = optimizer.completed
    if loss_scale is not None:
        named |= {"loss_scale": loss_scale.value, "loss_scale.good_steps": loss_scale.good_steps}
    return named


def restore_optim(
    model: nn.Module, optimizer: AdamW, loss_scale: LossScale | None, tensors: dict[str, Tensor], source: Path
) -> None:
    """Copies tensors into the optimizer; the loss scale starts anew where another dtype was used before."""
    wanted = optim_tensors(model, optimizer, loss_scale)
    scale = {name for name in wanted | tensors if name.startswith("loss_scale")}
    if not scale <= wanted.keys() & tensors.keys():
        wanted, tensors = ({n: t for n, t in d.items() if n not in scale} for d in (wanted, tensors))
    _restore(wanted, tensors, source)


def _restore(into: dict[str, Tensor], tensors: dict[str, Tensor], source: Path) -> None:
    differ = [f"tensor {name} is missing" for name in into if name not in tensors]
    differ += [f"tensor {name} is none of this model" for name in tensors if name not in into]
    for name in into.keys() & tensors.keys():
        shape, wanted = tuple(tensors[name].shape), tuple(into[name].shape)
        if shape != wanted:
            differ.append(f"tensor {name} has shape {shape}, the model {wanted}")
    if differ:
        rest = f"; and {len(differ) - 8} more" if len(differ) > 8 else ""
        raise ValueError(f"{source}: {'; '.join(sorted(differ)[:8])}{rest}")
    for name, t in into.items():
        assign(t, tensors[name])


def differences(before: dict[str, Any], now: dict[str, Any], ignore: Collection[str] = ()) -> list[str]:
    """``KEY was A and is B`` for every field in which two descriptions differ; fields that only one has are named as well."""
    fields = [key for key in before | now if key not in ignore and before.get(key) != now.get(key)]
    return [f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in fields]


def model_config(state: dict[str, Any], source: Path) -> GPTConfig:
    """The shape of the network from a checkpoint's state.json; ValueError naming what it lacks or has too much."""
    shape = state.get("model")
    names = {f.name for f in fields(GPTConfig)}
    if not isinstance(shape, dict) or not shape.keys() <= names:
        raise ValueError(f"{source / STATE}: model is {shape!r:.300}, not values of {', '.join(sorted(names))}")
    try:
        return GPTConfig(**shape)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source / STATE}: model: {error}") from error


def load_model(path: Path | str, device: torch.device | str, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Any]]:
    """A trained model for sampling or evaluation.

    Args:
        path: a checkpoint, OUT/step-N, or an output directory, of which the checkpoint with the lowest validation loss is
            taken, the newest where none was evaluated.
        device, dtype: where the model computes, and in what.

    Returns:
        (GPT in evaluation mode, the checkpoint's state.json).

    Raises:
        ValueError: where no checkpoint can be read.
    """
    from nanogpt.model import GPT

    path = Path(path)
    if (path / MANIFEST).exists():
        verify(path)
    else:
        path = find(path, best=True)
    state = read_state(path)
    model = GPT(model_config(state, path), dtype).to(device)
    restore_model(model, load_tensors(path / MODEL), path / MODEL)
    return model.eval(), state
