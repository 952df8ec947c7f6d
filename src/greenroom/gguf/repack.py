"""Changes of byte order between two spellings of one block format, without any rounding.

Knows blocks only; who stores which spelling is the business of a model's loader.
"""

import numpy as np
import numpy.typing as npt


def repack_pairs(raw: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Turns MXFP4 blocks with neighbours in one byte (`MXFP4_PAIRS`) into ggml's MXFP4.

    A block is an exponent byte and 16 bytes of codes. In the source byte i has elements 2i
    (low nibble) and 2i+1; in the result it has elements i and i+16.

    Args:
        raw: `(..., n * 17)` uint8.

    Returns:
        An array of the same shape.
    """
    blocks = raw.reshape(-1, 17)
    out = np.empty_like(blocks)
    out[:, 0] = blocks[:, 0]
    first, second = blocks[:, 1:9], blocks[:, 9:17]
    out[:, 1::2] = (first & 15) | (second << 4)
    out[:, 2::2] = (first >> 4) | (second & 0xF0)
    return out.reshape(raw.shape)
