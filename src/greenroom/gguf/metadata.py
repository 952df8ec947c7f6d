"""Metadata of a GGUF file as a mapping that decodes a value when it is asked for.

A vocabulary is hundreds of thousands of strings; who only looks at the shapes never pays
for them. Knows how values are stored, not what any key means.
"""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from mmap import mmap
from typing import Any

import numpy as np

from greenroom.errors import ModelFileError
from greenroom.gguf.header import Entry
from greenroom.gguf.types import SCALAR_DTYPES, ValueType

_U64 = struct.Struct("<Q")
_TYPE_AND_COUNT = struct.Struct("<IQ")


@dataclass(frozen=True, slots=True)
class RawValue:
    """A metadata value as it is stored: its type and its bytes, to copy it unchanged."""

    type: ValueType
    payload: bytes


class Metadata(Mapping[str, Any]):
    """Key to value: int, float, bool, str; list[str] or a NumPy array for arrays.

    Strings that are not UTF-8 are decoded with replacement characters. Arrays of arrays
    become lists. A decoded value is kept, so asking again costs nothing; arrays are
    read-only.

    Args:
        buffer: the mapped file; it must stay open for values not asked for yet.
        entries: where each value lies, checked by `read_header`.
    """

    def __init__(self, buffer: mmap | bytes, entries: dict[str, Entry]) -> None:
        self._buffer = buffer
        self._entries = entries
        self._values: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        """The value of `key`, decoded now if it was not yet."""
        if key not in self._values:
            entry = self._entries[key]
            self._values[key], _ = _decode(self._open(), entry.type, entry.start)
        return self._values[key]

    def __contains__(self, key: object) -> bool:
        """Whether the key is there; decodes nothing."""
        return key in self._entries

    def __iter__(self) -> Iterator[str]:
        """The keys in the order of the file."""
        return iter(self._entries)

    def __len__(self) -> int:
        """The number of keys."""
        return len(self._entries)

    def type(self, key: str) -> ValueType:
        """The type a value is stored in."""
        return self._entries[key].type

    def array_length(self, key: str) -> int | None:
        """Elements of an array, without decoding it; None if the value is not an array."""
        entry = self._entries[key]
        if entry.type != ValueType.ARRAY:
            return None
        return int(_TYPE_AND_COUNT.unpack_from(self._open(), entry.start)[1])

    def raw_values(self) -> dict[str, RawValue]:
        """All values as `raw` gives them."""
        return {key: self.raw(key) for key in self}

    def raw(self, key: str) -> RawValue:
        """The stored bytes of a value, for a writer that copies it unchanged."""
        entry = self._entries[key]
        return RawValue(entry.type, bytes(self._open()[entry.start : entry.end]))

    def _open(self) -> mmap | bytes:
        if isinstance(self._buffer, mmap) and self._buffer.closed:
            raise ModelFileError("metadata was asked for after its file was closed")
        return self._buffer


def _decode(buffer: mmap | bytes, type: ValueType, position: int) -> tuple[Any, int]:
    """Decodes the value at `position`; returns it and the position after it."""
    if type == ValueType.STRING:
        (length,) = _U64.unpack_from(buffer, position)
        end = position + 8 + length
        return buffer[position + 8 : end].decode(errors="replace"), end
    if type == ValueType.ARRAY:
        return _decode_array(buffer, position)
    dtype = SCALAR_DTYPES[type]
    value = np.frombuffer(buffer, dtype, 1, position)[0].item()
    return (bool(value) if type == ValueType.BOOL else value), position + dtype.itemsize


def _decode_array(buffer: mmap | bytes, position: int) -> tuple[Any, int]:
    number, count = _TYPE_AND_COUNT.unpack_from(buffer, position)
    type = ValueType(number)
    position += _TYPE_AND_COUNT.size
    if type == ValueType.STRING:
        return _decode_strings(buffer, position, count)
    if type == ValueType.ARRAY:
        values = []
        for _ in range(count):
            value, position = _decode_array(buffer, position)
            values.append(value)
        return values, position
    dtype = SCALAR_DTYPES[type]
    stored = np.frombuffer(buffer, dtype, count, position)
    # A copy: it is aligned, and it outlives the map.
    array = stored != 0 if type == ValueType.BOOL else stored.astype(dtype.newbyteorder("="))
    array.flags.writeable = False
    return array, position + count * dtype.itemsize


def _decode_strings(buffer: mmap | bytes, position: int, count: int) -> tuple[list[str], int]:
    read = _U64.unpack_from
    values = []
    for _ in range(count):
        start = position + 8
        position = start + read(buffer, position)[0]
        values.append(buffer[start:position].decode(errors="replace"))
    return values, position
