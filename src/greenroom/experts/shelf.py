"""Packed experts that outlive the model they were loaded for. Packing and pinning are most of
loading, and a sweep over budgets loads one file many times. Knows slabs and names, not placement.
"""

from pathlib import Path
from typing import Any

from greenroom.experts.cpu import Biases, CpuExperts
from greenroom.experts.slabs import RawMatrices


class Shelf:
    """The experts of one file's layers; only one model at a time may use them."""

    def __init__(self) -> None:
        self._file: tuple[Path, int, int] | None = None
        self._layers: dict[str, CpuExperts] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of RAM they take."""
        return sum(experts.nbytes for experts in self._layers.values())

    def open(self, path: Path) -> None:
        """The next model is of this file; forgets the experts of another one."""
        found = path.stat()
        file = path.resolve(), found.st_size, found.st_mtime_ns
        if file != self._file:
            self._layers.clear()
            self._file = file

    def take(
        self,
        pool: Any,
        matrices: tuple[RawMatrices, RawMatrices, RawMatrices],
        biases: Biases | None,
        activation: str,
    ) -> CpuExperts:
        """The layer's experts, packed unless they are there; arguments as of `CpuExperts`."""
        name = matrices[0].name
        if name not in self._layers:
            self._layers[name] = CpuExperts(pool, matrices, biases, activation)
        experts = self._layers[name]
        experts.pool, experts.meter = pool, None
        return experts
