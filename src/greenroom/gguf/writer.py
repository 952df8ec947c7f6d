"""Writes a GGUF file tensor by tensor, so that models far larger than the RAM can be made.

The header is written first from what the tensors promise; then each tensor's bytes are asked
for in turn. The file appears under its name only when it is whole. Knows no architecture.
"""

import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from greenroom.gguf.header import MAX_ALIGNMENT, MAX_NAME_BYTES
from greenroom.gguf.metadata import RawValue
from greenroom.gguf.partial import Layout, replacing
from greenroom.gguf.quantizers import quantize
from greenroom.gguf.reader import TensorInfo
from greenroom.gguf.types import (
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_DIMS,
    SCALAR_DTYPES,
    GGMLType,
    ValueType,
)

Array = npt.NDArray[Any]
Data = Array | Callable[[], Array | Iterable[Array]]


@dataclass(frozen=True, slots=True)
class Typed:
    """A metadata value, or an array's elements, in a type other than the default one."""

    type: ValueType
    value: Any


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to write.

    Attributes:
        name: at most 63 bytes, or llama.cpp will not read the file.
        type: how the bytes are encoded.
        shape: NumPy order, the contiguous dimension last.
        data: the encoded bytes: an array, or a function that returns one or yields them in
            pieces. It is called once, when the tensor's turn comes.
    """

    name: str
    type: GGMLType
    shape: tuple[int, ...]
    data: Data

    @classmethod
    def of(cls, name: str, type: GGMLType, values: npt.NDArray[np.floating]) -> "TensorSpec":
        """A tensor of `values`, encoded as `type` when its turn comes."""
        return cls(name, type, values.shape, lambda: quantize(type, values))

    @classmethod
    def copy(cls, info: TensorInfo, name: str | None = None) -> "TensorSpec":
        """The tensor of an open file, unchanged but perhaps for its name."""
        return cls(name or info.name, info.type, info.shape, info.data)

    @property
    def nbytes(self) -> int:
        """Bytes it will take; ValueError if its rows are not whole blocks."""
        nbytes = self.type.row_bytes(self.shape[-1])
        for dimension in self.shape[:-1]:
            nbytes *= dimension
        return nbytes


def write_gguf(
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any],
    tensors: Sequence[TensorSpec],
    progress: Callable[[int, int], None] | None = None,
    source: str | None = None,
) -> int:
    """Writes a GGUF file (version 3); an existing one is replaced when the new one is whole.

    Args:
        path: the file.
        metadata: bool, int (u32, or i32, u64, i64 where needed), float (f32), str, list or
            NumPy array of these; `Typed` for another type, `RawValue` for bytes copied from
            a file. `general.alignment` is obeyed; keys under `split.` are left out, because
            the result is one file.
        tensors: in the order they are written.
        progress: called with (bytes of tensors written, bytes of all tensors).
        source: a description of all that decides the tensors' bytes. With it a run that was
            stopped, in whatever way, goes on where it was; with another it starts anew.

    Returns:
        Bytes of tensors that an earlier run had written.

    Raises:
        ValueError: names, shapes or values that the format cannot hold, or a tensor whose
            data are of another size than its shape promises.
        ModelFileError: the disk is full, the path cannot be written, or another process is
            writing it.
    """
    target = Path(path)
    kept = {key: value for key, value in metadata.items() if not key.startswith("split.")}
    alignment = _alignment(kept)
    header = _header(kept, tensors, alignment)
    sizes = [tensor.nbytes for tensor in tensors]
    total = sum(sizes)
    with replacing(target, Layout(header, sizes, alignment, source)) as partial:
        found = written = sum(sizes[: partial.complete])
        for tensor in tensors[partial.complete :]:
            for piece in _pieces(tensor):
                partial.write(piece)
                written += len(piece)
                if progress is not None:
                    progress(written, total)
            partial.end_part()
    return found


def write_header(
    path: str | os.PathLike[str], metadata: Mapping[str, Any], tensors: Sequence[TensorSpec]
) -> None:
    """Writes the header alone: the file has its full size, but its tensors are a hole.

    Arguments as for `write_gguf`; no data is asked for.
    """
    alignment = _alignment(metadata)
    header = _header(metadata, tensors, alignment)
    size = len(header) + sum(-(-t.nbytes // alignment) * alignment for t in tensors)
    with Path(path).open("wb") as file:
        file.write(header)
        file.truncate(size)


def _pieces(tensor: TensorSpec) -> Iterator[memoryview]:
    """The tensor's bytes; ValueError when there are too many or too few."""
    data = tensor.data() if callable(tensor.data) else tensor.data
    left = tensor.nbytes
    for array in [data] if isinstance(data, np.ndarray) else data:
        piece = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        left -= len(piece)
        if left < 0:
            break
        yield piece
    if left:
        more = "more" if left < 0 else f"{left} bytes fewer"
        raise ValueError(f"tensor {tensor.name!r}: its data are {more} than {tensor.nbytes} bytes")


def _alignment(metadata: Mapping[str, Any]) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if isinstance(value, RawValue):
        value = int.from_bytes(value.payload, "little")
    if isinstance(value, Typed):
        value = value.value
    if not 0 < value <= MAX_ALIGNMENT or value & (value - 1):
        raise ValueError(f"general.alignment must be a power of two, not {value}")
    return int(value)


def _header(metadata: Mapping[str, Any], tensors: Sequence[TensorSpec], alignment: int) -> bytes:
    """Everything before the first tensor, with the padding."""
    parts = [MAGIC, struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        raw = encode_value(value)
        parts += [_string(key), struct.pack("<I", raw.type), raw.payload]
    offset = 0
    names: set[str] = set()
    for tensor in tensors:
        if tensor.name in names:
            raise ValueError(f"tensor {tensor.name!r} is there twice")
        names.add(tensor.name)
        parts.append(_tensor_line(tensor, offset))
        offset += -(-tensor.nbytes // alignment) * alignment
    header = b"".join(parts)
    return header + bytes(-len(header) % alignment)


def _tensor_line(tensor: TensorSpec, offset: int) -> bytes:
    ne = tensor.shape[::-1]
    if not 1 <= len(ne) <= MAX_DIMS or min(ne) < 1:
        raise ValueError(f"tensor {tensor.name!r}: the shape {tensor.shape} cannot be stored")
    name = _string(tensor.name)
    if not 8 < len(name) <= 8 + MAX_NAME_BYTES:
        raise ValueError(f"tensor {tensor.name!r}: names have 1 to {MAX_NAME_BYTES} bytes")
    return name + struct.pack(f"<I{len(ne)}QIQ", len(ne), *ne, tensor.type, offset)


def _string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def encode_value(value: Any) -> RawValue:
    """A metadata value as the format stores it; ValueError if it cannot be."""
    if isinstance(value, RawValue):
        return value
    type = None
    if isinstance(value, Typed):
        type, value = value.type, value.value
    if isinstance(value, list | tuple | np.ndarray):
        return RawValue(ValueType.ARRAY, _encode_array(type, value))
    if isinstance(value, str):
        return RawValue(ValueType.STRING, _string(value))
    type = type if type is not None else _scalar_type(value)
    return RawValue(type, _encode_numbers(type, [value]))


def _scalar_type(value: Any) -> ValueType:
    if isinstance(value, np.generic):
        return _array_type(np.asarray(value))
    if isinstance(value, bool):
        return ValueType.BOOL
    if isinstance(value, float):
        return ValueType.F32
    if isinstance(value, int):
        if value < 0:
            return ValueType.I32 if value >= -(1 << 31) else ValueType.I64
        return ValueType.U32 if value < 1 << 32 else ValueType.U64
    raise ValueError(f"metadata of type {type(value).__name__} cannot be stored")


def _array_type(array: Array) -> ValueType:
    if array.dtype == np.bool_:
        return ValueType.BOOL
    for type, dtype in SCALAR_DTYPES.items():
        if dtype == array.dtype and type != ValueType.BOOL:
            return type
    raise ValueError(f"metadata arrays of {array.dtype} cannot be stored")


def _encode_array(type: ValueType | None, values: Sequence[Any] | Array) -> bytes:
    if not isinstance(values, np.ndarray) and len(values) and isinstance(values[0], str):
        head = struct.pack("<IQ", ValueType.STRING, len(values))
        return head + b"".join([_string(value) for value in values])
    if type is None:
        if isinstance(values, np.ndarray):
            type = _array_type(values)
        elif len(values) and isinstance(values[0], int) and not isinstance(values[0], bool):
            # What converters write for lists of numbers, and llama.cpp expects.
            type = ValueType.I32
        else:
            type = _scalar_type(values[0]) if len(values) else ValueType.STRING
    payload = b"" if not len(values) else _encode_numbers(type, values)
    return struct.pack("<IQ", type, len(values)) + payload


def _encode_numbers(type: ValueType, values: Sequence[Any] | Array) -> bytes:
    if type not in SCALAR_DTYPES:
        raise ValueError(f"{type.name} is no type of numbers; metadata of it cannot be stored")
    dtype = SCALAR_DTYPES[type]
    array = np.asarray(values)
    if array.dtype.kind in "biu" and dtype.kind in "iu":
        signed = dtype.kind == "i"
        top = 1 << (8 * dtype.itemsize - signed)
        fits = not array.size or (int(array.min()) >= -top * signed and int(array.max()) < top)
    else:
        fits = array.dtype.kind in "biuf" and dtype.kind == "f"
    if not fits:
        raise ValueError(f"metadata {str(values)[:60]} does not fit {type.name}")
    return array.astype(dtype).tobytes()
