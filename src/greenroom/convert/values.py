"""A tensor that is not read yet: its shape, and a function that reads a part of it as float32.

Views (halves, transposes, stacks of experts) are made without reading anything, so that a
model of any size passes through a small memory. Knows nothing of names or files.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from greenroom.gguf import GGMLType

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

# Float32 bytes that are in memory at once; an outermost entry (an expert) is not divided.
PIECE_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class Values:
    """A tensor to come.

    Attributes:
        shape: NumPy order.
        load: gives entries `[start, stop)` of the first dimension, float32; or, where `encoded`
            is set, their blocks `(..., row_bytes)` uint8. The result may be changed.
        source: the type the numbers have in the checkpoint.
        encoded: the block format `load` gives, or None for float32.
    """

    shape: tuple[int, ...]
    load: Callable[[int, int], npt.NDArray[np.generic]]
    source: GGMLType = GGMLType.F32
    encoded: GGMLType | None = None

    @staticmethod
    def of(array: npt.ArrayLike) -> "Values":
        """Numbers that are there already."""
        values = np.asarray(array, np.float32)
        return Values(values.shape, lambda start, stop: values[start:stop])

    def all(self) -> npt.NDArray[np.generic]:
        """The whole tensor."""
        return self.load(0, self.shape[0])

    def map(self, inner: tuple[int, ...], change: Callable[[Floats], Floats]) -> "Values":
        """`change` applied to runs of entries: `(n, *shape[1:])` to `(n, *inner)`."""

        def load(start: int, stop: int) -> Floats:
            return change(np.asarray(self.load(start, stop), np.float32))

        return Values((self.shape[0], *inner), load, self.source)

    def part(self, start: int, stop: int) -> "Values":
        """Entries `[start, stop)` of the first dimension."""

        def load(first: int, last: int) -> npt.NDArray[np.generic]:
            return self.load(start + first, start + last)

        return Values((stop - start, *self.shape[1:]), load, self.source, self.encoded)

    def permuted(self, heads: int) -> "Values":
        """Rows of each head from halves to adjacent pairs, as llama's q and k are stored.

        Row 2i + s of a head is the source's row s * (rows / 2) + i.
        """
        rows = self.shape[0] // heads

        def load(start: int, stop: int) -> Floats:
            first, last = start // rows, -(-stop // rows)
            whole = np.asarray(self.load(first * rows, last * rows), np.float32)
            pairs = whole.reshape(last - first, 2, rows // 2, *whole.shape[1:]).swapaxes(1, 2)
            flat = np.ascontiguousarray(pairs).reshape(whole.shape)
            return flat[start - first * rows : stop - first * rows]

        return Values(self.shape, load, self.source)

    def transposed(self) -> "Values":
        """(n, a, b) to (n, b, a)."""
        _, rows, cols = self.shape
        return self.map((cols, rows), lambda x: x.swapaxes(1, 2))

    def rows(self, start: int, stop: int | None = None, step: int = 1) -> "Values":
        """A slice of the second dimension."""
        count = len(range(self.shape[1])[start:stop:step])
        return self.map((count, *self.shape[2:]), lambda x: x[:, start:stop:step])

    def pieces(self, piece_bytes: int = PIECE_BYTES) -> Iterator[npt.NDArray[np.generic]]:
        """The entries in runs of about `piece_bytes`."""
        entry = 4 * int(np.prod(self.shape[1:], dtype=np.int64))
        step = max(1, piece_bytes // max(entry, 1))
        for start in range(0, self.shape[0], step):
            yield self.load(start, min(start + step, self.shape[0]))


def stack(parts: Sequence[Values]) -> Values:
    """Tensors of one shape as one with a new first dimension."""

    def load(start: int, stop: int) -> npt.NDArray[np.generic]:
        return np.stack([part.all() for part in parts[start:stop]])

    first = parts[0]
    return Values((len(parts), *first.shape), load, first.source, first.encoded)
