"""``python -m nanogpt.serve``"""

import sys
from pathlib import Path

from nanogpt.config import fail, parse
from nanogpt.sample import load
from nanogpt.serve import ServeConfig


def read_key(path: str) -> bytes:
    """The API key in a file; empty for no path.

    Raises:
        ValueError: for a file that cannot be read or holds no key of printable ASCII characters.
    """
    if not path:
        return b""
    try:
        found = Path(path).read_bytes().strip()
    except OSError as error:
        raise ValueError(f"api_key_file={path}: {error.strerror}") from error
    if not found or not all(33 <= byte <= 126 for byte in found):
        raise ValueError(f"api_key_file={path}: expected one key of printable ASCII characters")
    return found


def main(argv: list[str]) -> None:
    config = parse(ServeConfig, argv, presets=None, prog="serve")
    try:
        from nanogpt.serve import api, guard
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn", "h11"):
            raise
        fail(ValueError(f'{error.name} is missing; install it with: pip install -e ".[serve]"'), "serve")
    try:
        secret = read_key(config.api_key_file)
        listener = guard.listen(config)
        model, encoder = load(config)
        encoder.decode_bytes([0])  # reads its table, which may have to be fetched: now, not at the first request
        api.serve(config, model, encoder, secret, listener)
    except (ValueError, OSError) as error:
        fail(error, "serve")


if __name__ == "__main__":
    main(sys.argv[1:])
