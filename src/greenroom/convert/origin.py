"""What a file is made from, as text: only a run of which this is the same may go on where another
stopped. Knows files by name, size and time, not what is in them.
"""

from collections.abc import Iterable
from pathlib import Path

from greenroom import __version__


def origin(files: Iterable[Path], *options: object) -> str:
    """A description of the sources and of the options that are not seen in a file's header.

    Args:
        files: all that is read; each must be there.
        options: anything with a stable `repr`, but nothing that leaves the bytes as they are.
    """
    lines = [f"greenroom {__version__}", repr(options)]
    for path in files:
        stat = path.stat()
        lines.append(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}")
    return "\n".join(lines)
