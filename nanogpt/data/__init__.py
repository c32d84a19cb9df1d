"""Text to shards of tokens (``prepare``), shards to batches (``loader``), and the checks in between (``check``)."""

import os
from pathlib import Path

ROOT = Path("data")
RECIPES = {  # what `prepare` knows by name -> (its text, its tokenizer)
    "shakespeare_char": ("tinyshakespeare", "char"),
    "shakespeare": ("tinyshakespeare", "gpt2"),
    "plays_char": ("plays", "char"),
    "plays": ("plays", "gpt2"),
    "openwebtext": ("hub", "gpt2"),
    "fineweb": ("hub", "gpt2"),
    "fineweb_edu": ("hub", "gpt2"),
}


def find(dataset: str | Path) -> Path:
    """The directory of a prepared dataset.

    Args:
        dataset: the path of a directory, or a name: a directory under ``./data/``.

    Raises:
        ValueError: where there is no such directory; the message says what makes it.
    """
    path = Path(dataset)
    named = len(path.parts) == 1 and path.name not in (".", "..")
    for candidate in [ROOT / path, path] if named else [path]:
        if os.path.isdir(candidate) and str(dataset):  # Path.is_dir raises for a name too long for the system
            return candidate
    if not named:
        raise ValueError(f"dataset={dataset}: no such directory")
    command = f"python -m nanogpt.data.prepare {dataset}" + (
        "" if dataset in RECIPES else " --input FILE --tokenizer=char|gpt2"
    )
    raise ValueError(f"dataset={dataset}: {(ROOT / path).absolute()} is not there; make it with: {command}")
