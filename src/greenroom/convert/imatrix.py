"""Reads importance matrices: how much each input column of a matrix mattered on a sample text.

Two spellings: GGUF files as llama.cpp writes them today (`NAME.in_sum2`, `NAME.counts`) and its
older binary files. Knows no types.
"""

import struct
from pathlib import Path

import numpy as np

from greenroom.convert.values import Floats
from greenroom.errors import ModelFileError
from greenroom.gguf import GGUFFile

_SUMS, _COUNTS = ".in_sum2", ".counts"


def read_imatrix(path: Path) -> dict[str, Floats]:
    """Mean squared activation by tensor: (columns,) or (experts, columns) float32.

    Raises:
        ModelFileError: the file is none of the two, or damaged.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read: {error.strerror}") from None
    return _read_gguf(path) if magic == b"GGUF" else _read_binary(path)


def _read_gguf(path: Path) -> dict[str, Floats]:
    found: dict[str, Floats] = {}
    with GGUFFile(path) as file:
        for name, tensor in file.tensors.items():
            if not name.endswith(_SUMS):
                continue
            base = name.removesuffix(_SUMS)
            if base + _COUNTS not in file.tensors:
                raise ModelFileError(f"{path}: {base}{_COUNTS} is missing")
            sums = tensor.dequantize().reshape(-1, tensor.ne[0])
            counts = file.tensors[base + _COUNTS].dequantize().reshape(-1, 1)
            means = np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0)
            found[base] = means[0] if len(means) == 1 else means
    if not found:
        raise ModelFileError(f"{path}: this GGUF file is no importance matrix")
    return found


def _read_binary(path: Path) -> dict[str, Floats]:
    """Entries of (name, calls, values): int32 lengths, little-endian; values are sums."""
    raw, found, at = path.read_bytes(), {}, 4
    try:
        (entries,) = struct.unpack_from("<i", raw)
        for _ in range(entries):
            (length,) = struct.unpack_from("<i", raw, at)
            name = raw[at + 4 : at + 4 + length].decode()
            calls, count = struct.unpack_from("<2i", raw, at + 4 + length)
            at += 12 + length
            values = np.frombuffer(raw, "<f4", count, at)
            found[name] = (values / max(calls, 1)).astype(np.float32)
            at += 4 * count
    except (struct.error, ValueError):
        raise ModelFileError(f"{path}: this is no importance matrix, or it is damaged") from None
    return found
