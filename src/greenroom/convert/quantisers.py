"""Float32 to block formats on all threads: the native quantisers, or NumPy's for other types.

Knows types and importance of columns; not files.
"""

from typing import Any

from greenroom.convert.encoding import Encode
from greenroom.convert.values import Bytes, Floats
from greenroom.gguf import GGMLType, quantize


class Quantisers:
    """Encoders that share a thread pool.

    Args:
        threads: None for as many as suit the machine.
    """

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads
        self.pool: Any = None

    def encoder(self, name: str) -> Encode:
        """The encoder of one tensor."""

        def encode(type: GGMLType, values: Floats) -> Bytes:
            return quantize(type, values)

        return encode
