"""Where Greenroom keeps what it built or measured on this machine. Knows no file in it."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """GREENROOM_HOME, or a folder in the user's cache; it need not exist yet."""
    home = os.environ.get("GREENROOM_HOME")
    if home:
        return Path(home)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "greenroom"
