"""What a folder of wheels needs, and which of them this machine lacks: for ``bare_machine.sh``.

``python wheels.py needed FOLDER`` names the packages that the wheels require and that are none of them: they have to be
on the other machine. ``python wheels.py missing FOLDER`` prints the wheels of packages that are not installed here.
"""

from __future__ import annotations

import re
import sys
import zipfile
from email.parser import Parser
from importlib import metadata
from pathlib import Path

__all__ = ["missing", "needed"]

NOT_HERE = re.compile(r"extra ==|python_version *<")  # requirements of extras, and of older Pythons


def _plain(name: str) -> str:
    """A package's name as all its spellings are compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _read(wheel: Path) -> tuple[str, list[str]]:
    """(name, names that it requires without extras)."""
    with zipfile.ZipFile(wheel) as content:
        (file,) = (name for name in content.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
        fields = Parser().parsestr(content.read(file).decode())
    required = [text for text in fields.get_all("Requires-Dist", []) if not NOT_HERE.search(text)]
    return _plain(fields["Name"]), [_plain(re.split(r"[^\w.-]", text, maxsplit=1)[0]) for text in required]


def needed(folder: Path) -> list[str]:
    """Names that the wheels of a folder require beyond each other."""
    read = [_read(wheel) for wheel in sorted(folder.glob("*.whl"))]
    return sorted({name for _, required in read for name in required} - {name for name, _ in read})


def missing(folder: Path) -> list[Path]:
    """The wheels whose package is not installed, in any version: what is there is left as it is."""
    found = []
    for wheel in sorted(folder.glob("*.whl")):
        try:
            metadata.version(_read(wheel)[0])
        except metadata.PackageNotFoundError:
            found.append(wheel)
    return found


if __name__ == "__main__":
    what, folder = sys.argv[1], Path(sys.argv[2])
    if what == "missing":
        print(*missing(folder), sep="\n", end="\n" if missing(folder) else "")
    else:
        print(f"the other machine must have: {', '.join(needed(folder)) or 'nothing more'}")
