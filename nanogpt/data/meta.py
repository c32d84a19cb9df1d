"""nanoGPT's ``meta.pkl`` read without unpickling: an interpreter of the few opcodes that dicts, strings and integers need.

Opcodes that name, call or build anything are refused at their offset, so a hostile file can do no more than be refused.
"""

import pickletools
from pathlib import Path

LIMIT = 64 << 20  # bytes; nanoGPT's has under a kilobyte
_VALUES = {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1"}
_MARK = object()


def read_meta(path: Path) -> dict:
    """{vocab_size: int, itos: {int: str}, stoi: {str: int}}.

    Raises:
        ValueError: for a pickle that holds anything else, naming the file, and the offset where there is one.
    """
    if path.stat().st_size > LIMIT:
        raise ValueError(f"{path}: {path.stat().st_size} bytes is too large for a table of characters")
    try:
        meta = _plain(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if type(meta) is not dict or type(meta.get("vocab_size")) is not int:
        raise ValueError(f"{path}: no integer vocab_size in it")
    for key, kinds in (("itos", (int, str)), ("stoi", (str, int))):
        table = meta.get(key)
        if type(table) is not dict or any((type(k), type(v)) != kinds for k, v in table.items()):
            raise ValueError(f"{path}: {key} is not a dict of {kinds[0].__name__} to {kinds[1].__name__}")
    if len(meta["itos"]) != meta["vocab_size"] or sorted(meta["itos"]) != list(range(len(meta["itos"]))):
        raise ValueError(f"{path}: itos does not name the tokens 0..vocab_size-1")
    return {key: meta[key] for key in ("vocab_size", "itos", "stoi")}


def _plain(data: bytes) -> object:
    """What a pickle of dicts, strings and integers holds; ValueError naming the offset for every other pickle."""
    stack: list = []
    memo: dict = {}
    for opcode, argument, offset in pickletools.genops(data):
        name = opcode.name
        try:
            if name in _VALUES:
                stack.append(argument)
            elif name == "EMPTY_DICT":
                stack.append({})
            elif name == "MARK":
                stack.append(_MARK)
            elif name in ("SETITEM", "SETITEMS"):
                start = len(stack) - 2 if name == "SETITEM" else len(stack) - 1 - stack[::-1].index(_MARK)
                items = stack[start + (name == "SETITEMS") :]
                del stack[start:]
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
                memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
            elif name in ("GET", "BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name == "STOP":
                return stack.pop()
            elif name not in ("PROTO", "FRAME"):
                raise ValueError(f"opcode {name}: only dicts, strings and integers are read")
        except (IndexError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"offset {offset}: {error}") from error
    raise AssertionError("genops ends with STOP or raises")
