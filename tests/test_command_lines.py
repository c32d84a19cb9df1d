"""The paths that the command-line tools take: each is used, or refused in one line with exit code 2."""

import io
import os
import shutil
import sys

import pytest

from nanogpt import config, evaluate, export, sample, train
from nanogpt.config import TrainConfig, parse
from nanogpt.data import __main__ as data_main
from nanogpt.data import find, prepare
from nanogpt.serve.__main__ import read_key
from tests.runs import arguments, run

ODD = [
    "",
    "x" * 300,
    "x/" * 100 + "x",
    "\0",
    "file",
    "file/",
    "directory",
    "directory/",
    "~",
    "a directory",
    " ",
    "\n",
    "\udcff",
]
ODD += ["\udcff/x", "/dev/null/x", "/proc/none/x", "loop", "nowhere", "*", "-", "a=b"]
MODEL = ["--out_dir=run", "--device=cpu"]
TINY = {"max_iters": 1, "eval_interval": 1, "lr_decay_iters": 1, "warmup_iters": 1}


def trained(*options):
    found = parse(TrainConfig, [*arguments("text", "other", **TINY), *options], prog="train")
    config.check_data(found)
    return train.main(found)


TOOLS = {
    "train CONFIG": lambda path: trained(path),
    "train --dataset": lambda path: trained(f"--dataset={path}"),
    "train --out_dir": lambda path: trained(f"--out_dir={path}"),
    "train --init_from=resume": lambda path: trained(f"--out_dir={path}", "--init_from=resume"),
    "train --init_from": lambda path: trained(f"--init_from={path}"),
    "train --hellaswag": lambda path: trained(f"--hellaswag={path}", "--eval_hellaswag_interval=1"),
    "sample --out_dir": lambda path: sample.main(["--device=cpu", f"--out_dir={path}"]),
    "sample --init_from": lambda path: sample.main(["--device=cpu", f"--init_from={path}"]),
    "sample --start": lambda path: sample.main([*MODEL, "--max_new_tokens=1", "--num_samples=1", f"--start=FILE:{path}"]),
    "evaluate DIR": lambda path: evaluate.main(evaluate.command_line([path, "--device=cpu"])),
    "evaluate --init_from": lambda path: evaluate.main(evaluate.command_line(["--device=cpu", f"--init_from={path}"])),
    "evaluate --data": lambda path: evaluate.main(evaluate.command_line([*MODEL, f"--data={path}"])),
    "evaluate --hellaswag": lambda path: evaluate.main(evaluate.command_line([*MODEL, f"--hellaswag={path}"])),
    "export --out_dir": lambda path: export.main([f"--out_dir={path}", "--to=exported"]),
    "export --to": lambda path: export.main(["--out_dir=run", f"--to={path}"]),
    "prepare NAME": lambda path: prepare.main([path, "--tokenizer=char"]),
    "prepare --input": lambda path: prepare.main(["mine", f"--input={path}", "--tokenizer=char"]),
    "prepare --out": lambda path: prepare.main(["text.txt", f"--out={path}"]),
    "prepare --tokenizer": lambda path: prepare.main(["text.txt", "--out=again", f"--tokenizer={path}"]),
    "data check": lambda path: data_main.main(["check", path]),
    "data info": lambda path: data_main.main(["info", path]),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A text, its dataset, a run on it, and what is none of these."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "text.txt").write_text("abcdefghijklmnop\n" * 300)
    (folder / "directory").mkdir()
    (folder / "a directory").mkdir()
    (folder / "file").write_text("x")
    (folder / "loop").symlink_to("loop")
    (folder / "nowhere").symlink_to("gone")
    prepare.main([str(folder / "text.txt"), f"--out={folder / 'text'}"])
    run(folder / "text", folder / "run", **TINY)
    return folder


@pytest.mark.parametrize("tool", TOOLS)
def test_any_path(made, tool, tmp_path, monkeypatch):
    failed = []
    for i, path in enumerate(ODD):
        here = shutil.copytree(made, tmp_path / str(i), symlinks=True)
        monkeypatch.chdir(here)
        out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", errors) for errors in ("strict", "backslashreplace"))
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", err)
            try:
                code = TOOLS[tool](path) or 0
            except SystemExit as stop:
                code = stop.code
            except Exception as error:
                code = repr(error)[:200]
            out.flush()
            err.flush()
        said = err.buffer.getvalue()
        if not (code == 0 or (code == 2 and said.count(b"\n") == 1)):
            failed.append((path[:20], code, said))
    assert not failed


def test_key_files(made, monkeypatch):
    monkeypatch.chdir(made)
    for path in ODD[1:]:
        if path not in ("file", "file/"):
            with pytest.raises((ValueError, OSError)):
                read_key(path)


def test_what_the_system_does_not_let_one_read(made, monkeypatch, capsys):
    def refuse(*_):
        raise PermissionError(13, "Permission denied", "text")

    monkeypatch.chdir(made)
    monkeypatch.setattr(os, "listdir", refuse)
    monkeypatch.setattr(os, "scandir", refuse)
    (made / "text" / "dataset.json").rename(made / "text" / "aside")
    with pytest.raises(SystemExit) as stop:
        trained()
    (made / "text" / "aside").rename(made / "text" / "dataset.json")
    assert (stop.value.code, capsys.readouterr().err) == (2, "train: [Errno 13] Permission denied: 'text'\n")


def test_names_are_not_taken_for_paths_too_long():
    with pytest.raises(ValueError, match=r"^dataset=x{300}: "):
        find("x" * 300)
