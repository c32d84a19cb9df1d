"""python -m nanogpt.data prepare NAME ... | check DIR | info DIR; DIR may be a name under ./data/."""

import sys

from nanogpt import config
from nanogpt.data import check, find, prepare

COMMANDS = ("prepare", "check", "info")


def main(argv: list[str]) -> None:
    config.escape_output()
    command = argv[0] if argv else ""
    if command in ("-h", "--help"):
        config.print_help(__doc__)
        return
    if command == "prepare":
        prepare.main(argv[1:])
        return
    try:
        if command not in COMMANDS:
            raise ValueError(f"{command or 'which command?'}: expected one of {', '.join(COMMANDS)}")
        if len(argv) != 2:
            raise ValueError(f"{command} takes one directory: python -m nanogpt.data {command} DIR")
        path = find(argv[1])
        if command == "info":
            print(check.describe(path))
            return
        faults = list(check.problems(path))
    except (ValueError, OSError) as error:
        config.fail(error, "data")
    for fault in faults:
        print(f"data: {fault}", file=sys.stderr)
    if faults:
        raise SystemExit(2)
    print(f"{path}: whole")


if __name__ == "__main__":
    main(sys.argv[1:])
