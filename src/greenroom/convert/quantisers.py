"""Float32 to block formats on all threads: the native quantisers, or NumPy's for float types.

Knows types and the importance of columns; not files.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from greenroom import native
from greenroom.convert.encoding import Encode
from greenroom.convert.values import Bytes, Floats
from greenroom.gguf import GGMLType, quantize


@cache
def native_types() -> frozenset[int]:
    """Numbers of the types with a native quantiser."""
    return frozenset(native.lib().quantisable_types())


class Quantisers:
    """Encoders that share a thread pool.

    Args:
        threads: None for as many as suit the machine.
        importance: by tensor, the weight of each column's squared error: (columns,) float32, or
            (experts, columns) where experts were measured one by one.
    """

    def __init__(
        self, threads: int | None = None, importance: Mapping[str, Floats] | None = None
    ) -> None:
        self._threads = threads
        self._importance = importance or {}
        self._pool: Any = None

    def encoder(self, name: str, members: Sequence[int] | Any = None) -> Encode:
        """The encoder of one tensor, called with its entries in order.

        Args:
            name: of the tensor.
            members: (n,) the experts that will come, or None for all.
        """
        weights = self._importance.get(name)
        if members is not None and weights is not None and weights.ndim == 2:
            weights = weights[members]
        done = 0

        def encode(type: GGMLType, values: Floats) -> Bytes:
            nonlocal done
            start, done = done, done + len(values)
            if weights is None or weights.ndim == 1:
                return self.quantise(type, values, weights)
            parts = [
                self.quantise(type, one, weights[(start + i) % len(weights)])
                for i, one in enumerate(values)
            ]
            return np.stack(parts)

        return encode

    def weights(self, name: str) -> Floats:
        """Weights of the columns' squared errors, (experts or 1, 1, columns or 1); ones where
        nothing was measured."""
        measured = self._importance.get(name)
        if measured is None:
            return np.ones((1, 1, 1), np.float32)
        known = [
            np.ones_like(row) if (w := usable(row)) is None else w
            for row in np.atleast_2d(measured)
        ]
        return np.stack(known)[:, None]

    def quantise(self, type: GGMLType, values: Floats, weights: Floats | None = None) -> Bytes:
        """Encodes (..., columns) float32 as (..., row_bytes) uint8.

        Raises:
            ValueError: infinite or NaN values, or rows that are no whole blocks.
            UnsupportedModelError: the type can be read but not written.
        """
        if int(type) not in native_types():
            return quantize(type, values)
        if not np.isfinite(values).all():
            raise ValueError(f"infinite or NaN values cannot be stored as {type.name}")
        columns = values.shape[-1]
        rows = values.size // columns
        out = np.empty((*values.shape[:-1], type.row_bytes(columns)), np.uint8)
        source = np.ascontiguousarray(values, np.float32).reshape(-1)
        native.lib().quantise(
            self._workers(), int(type), rows, columns, source, out.reshape(-1), usable(weights)
        )
        return out

    def _workers(self) -> Any:
        if self._pool is None:
            lib = native.lib()
            self._pool = lib.Pool(self._threads or lib.default_threads()["threads"])
        return self._pool


def usable(weights: Floats | None) -> Floats | None:
    """Weights that are finite and positive; None where nothing was measured."""
    if weights is None:
        return None
    clean = np.nan_to_num(np.asarray(weights, np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    mean = float(clean.mean())
    if mean <= 0:
        return None
    # A column that was never active in the sample is not worthless.
    return np.ascontiguousarray(np.maximum(clean / mean, 1e-3), np.float32)
