"""Turns values that are read piece by piece into tensors of a file that are written so.

Knows the quantisers; which type a tensor gets is decided in `mixture`.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from greenroom.convert.values import Bytes, Floats, Values
from greenroom.gguf import GGMLType, TensorSpec, dequantize, quantize

Encode = Callable[[GGMLType, Floats], Bytes]


def tensor_spec(
    name: str,
    type: GGMLType,
    values: Values,
    encode: Encode = quantize,
    done: Callable[[], None] | None = None,
) -> TensorSpec:
    """A tensor that is read, encoded and written in pieces.

    Args:
        name: in the file.
        type: of the result.
        values: what to write.
        encode: (type, float32 (..., columns)) to (..., row_bytes) uint8.
        done: called behind every piece, to give memory back.
    """

    def pieces() -> Iterator[Bytes]:
        for piece in values.pieces():
            yield encoded(type, piece, values.encoded, encode)
            if done is not None:
                done()

    return TensorSpec(name, type, values.shape, pieces)


def encoded(type: GGMLType, piece: Any, stored: GGMLType | None, encode: Encode) -> Bytes:
    """A piece as `type`; `stored` is the block format it is in, None for float32."""
    if stored == type:
        return np.asarray(piece, np.uint8)
    values = piece if stored is None else dequantize(stored, np.asarray(piece, np.uint8))
    return encode(type, np.ascontiguousarray(values, np.float32))
