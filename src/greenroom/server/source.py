"""What a model on this machine is called, where it is, how large; needs nothing of the server."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model that can be loaded."""

    name: str
    path: Path | None  # None: it was given to us loaded
    size: int = 0  # bytes on disk, all parts
    modified: float = 0.0  # seconds since the epoch
    origin: str = "given"  # which store it was found in
