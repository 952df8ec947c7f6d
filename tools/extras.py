"""Print what extras of pyproject.toml need, one requirement a line.

    python tools/extras.py test lint > needed.txt && pip install -r needed.txt

`pip install '.[test]'` would compile the native extensions once more.
"""

import re
import sys
import tomllib
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def requirements(extra: str, extras: dict[str, list[str]]) -> list[str]:
    """Those of an extra, with those of the extras it names in place of itself."""
    found = []
    for line in extras[extra]:
        own = re.fullmatch(r"greenroom\[(.+)\]", line)
        inner = own[1].split(",") if own else []
        found += [r for name in inner for r in requirements(name, extras)] or [line]
    return found


def main() -> None:
    extras = tomllib.loads(PROJECT.read_text())["project"]["optional-dependencies"]
    for extra in sys.argv[1:]:
        print("\n".join(requirements(extra, extras)))


if __name__ == "__main__":
    main()
