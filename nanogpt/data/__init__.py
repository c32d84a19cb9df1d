"""Text to shards of tokens (``prepare``), shards to batches (``loader``), and the checks in between (``check``)."""

from pathlib import Path

ROOT = Path("data")


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
        if candidate.is_dir():
            return candidate
    if not named:
        raise ValueError(f"dataset={dataset}: no such directory")
    missing = f"dataset={dataset}: neither {(ROOT / path).absolute()} nor {path.absolute()} is a directory"
    raise ValueError(f"{missing}; make it with: python -m nanogpt.data.prepare {dataset} (a text of yours: add --input FILE)")
