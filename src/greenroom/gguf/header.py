"""Walks the header of one GGUF file in a memory map and checks every size in it.

What it returns are positions: no value is decoded and nothing is allocated whose size the
file merely claims. It knows nothing of split sets or of what the keys mean, except
`general.alignment`, which decides where the tensors lie.
"""

import struct
from dataclasses import dataclass
from itertools import pairwise
from mmap import mmap

from greenroom.errors import ModelFileError
from greenroom.gguf.types import (
    DEFAULT_ALIGNMENT,
    INTEGERS,
    MAGIC,
    MAX_DIMS,
    REMOVED_TYPES,
    SCALAR_DTYPES,
    GGMLType,
    ValueType,
)

# Far above anything published (the largest vocabularies have about 0.8 million strings and
# 20 MB, the largest models some 20,000 tensors); they bound the time and the memory that a
# hostile header can take.
MAX_HEADER_BYTES = 1 << 28
MAX_KEYS = 1 << 14
MAX_TENSORS = 1 << 16
MAX_NAME_BYTES = 1 << 10
MAX_STRING_BYTES = 1 << 26
MAX_ITEMS = 1 << 22
MAX_ARRAY_DEPTH = 4
# An empty array inside an array takes as long to check as this many strings.
_ARRAY_COST = 16
MAX_ALIGNMENT = 1 << 20

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one metadata value lies: `start` is its first byte after the value type."""

    type: ValueType
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One line of the tensor table; `offset` counts from the start of the file."""

    name: str
    type: GGMLType
    ne: tuple[int, ...]  # contiguous dimension first
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """All that one file's header says, checked."""

    version: int
    entries: dict[str, Entry]
    tensors: tuple[TensorEntry, ...]
    alignment: int
    data_start: int


class Walker:
    """A position in a mapped header that never leaves the file.

    Args:
        buffer: the mapped file.
        label: the file's name, the start of every message.
        position: the first byte to read.
    """

    def __init__(self, buffer: mmap | bytes, label: str, position: int = 0) -> None:
        self.buffer = buffer
        self.label = label
        self.position = position
        self.size = min(len(buffer), MAX_HEADER_BYTES)
        self.items_left = MAX_ITEMS

    def fail(self, message: str) -> ModelFileError:
        """An error that names the file; the caller raises it."""
        return ModelFileError(f"{self.label}: {message}")

    def need(self, count: int, what: str) -> None:
        """Raises ModelFileError unless `count` more bytes are in the file."""
        left = self.size - self.position
        if count > left:
            whose = "a header could have" if self.size < len(self.buffer) else "the file has"
            raise self.fail(
                f"{what} needs {count} bytes, but {whose} only {left} left; "
                "it is truncated or damaged, download it again"
            )

    def u32(self, what: str) -> int:
        """Reads an unsigned 32-bit number."""
        self.need(4, what)
        (value,) = _U32.unpack_from(self.buffer, self.position)
        self.position += 4
        return int(value)

    def u64(self, what: str) -> int:
        """Reads an unsigned 64-bit number."""
        self.need(8, what)
        (value,) = _U64.unpack_from(self.buffer, self.position)
        self.position += 8
        return int(value)

    def count(self, what: str, limit: int, smallest: int) -> int:
        """Reads how many entries follow.

        Args:
            what: their name in messages.
            limit: the most that is accepted.
            smallest: bytes the smallest possible entry takes.
        """
        count = self.u64(f"the number of {what}")
        if count > limit:
            raise self.fail(f"it claims {count} {what}; at most {limit} are accepted")
        self.need(count * smallest, f"a list of {count} {what}")
        return count

    def skip(self, count: int, what: str) -> None:
        """Moves over `count` bytes."""
        self.need(count, what)
        self.position += count

    def name(self, what: str) -> str:
        """Reads a short UTF-8 string, as keys and tensor names are."""
        length = self.u64(f"the length of {what}")
        if not 0 < length <= MAX_NAME_BYTES:
            raise self.fail(f"{what} has {length} bytes; 1 to {MAX_NAME_BYTES} are accepted")
        self.need(length, what)
        raw = self.buffer[self.position : self.position + length]
        self.position += length
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.fail(f"{what} is not UTF-8: {raw[:40]!r}") from None

    def value_type(self, what: str) -> ValueType:
        """Reads the type of a metadata value or of an array's elements."""
        number = self.u32(f"the type of {what}")
        try:
            return ValueType(number)
        except ValueError:
            raise self.fail(
                f"{what} has the unknown value type {number}; the format has 0 to 12"
            ) from None

    def skip_value(self, type: ValueType, what: str, depth: int = 0) -> None:
        """Checks and moves over one value of `type`."""
        if type == ValueType.STRING:
            length = self.u64(f"the length of {what}")
            if length > MAX_STRING_BYTES:
                raise self.fail(
                    f"{what} is a string of {length} bytes; at most {MAX_STRING_BYTES} are accepted"
                )
            self.skip(length, what)
        elif type == ValueType.ARRAY:
            self._skip_array(what, depth + 1)
        else:
            self.skip(SCALAR_DTYPES[type].itemsize, what)

    def _skip_array(self, what: str, depth: int) -> None:
        if depth > MAX_ARRAY_DEPTH:
            raise self.fail(f"{what} nests arrays deeper than {MAX_ARRAY_DEPTH}")
        type = self.value_type(f"the elements of {what}")
        count = self.u64(f"the length of {what}")
        if type in SCALAR_DTYPES:
            self.skip(count * SCALAR_DTYPES[type].itemsize, f"{what} with {count} elements")
            return
        self.need(count * (8 if type == ValueType.STRING else 12), f"{what} of {count} elements")
        self.items_left -= count if type == ValueType.STRING else count * _ARRAY_COST
        if self.items_left < 0:
            raise self.fail(f"{what} brings the strings in arrays to more than {MAX_ITEMS}")
        if type == ValueType.STRING:
            self._skip_strings(count, what)
            return
        for _ in range(count):
            self._skip_array(what, depth + 1)

    def _skip_strings(self, count: int, what: str) -> None:
        # The one long loop of a header (over 600,000 strings for gpt-oss), hence plain.
        read, buffer, position = _U64.unpack_from, self.buffer, self.position
        last = self.size - 8
        for _ in range(count):
            if position > last:
                break
            position += 8 + read(buffer, position)[0]
        else:
            if position <= self.size:
                self.position = position
                return
        raise self.fail(f"a string in {what} passes the end of the file; download it again")


def read_header(buffer: mmap | bytes, label: str) -> Header:
    """Reads and checks the header of the GGUF file in `buffer`.

    Raises:
        ModelFileError: it is not GGUF, or anything in it is impossible; `label` starts the
            message.
    """
    walker = Walker(buffer, label)
    version = _read_version(walker)
    n_tensors = walker.count("tensors", MAX_TENSORS, smallest=8 + 1 + 4 + 4 + 8)
    n_keys = walker.count("metadata keys", MAX_KEYS, smallest=8 + 1 + 4 + 1)
    entries: dict[str, Entry] = {}
    for _ in range(n_keys):
        key = walker.name("a metadata key")
        what = f"metadata {_quote(key)}"
        if key in entries:
            raise walker.fail(f"{what} is there twice")
        type = walker.value_type(what)
        start = walker.position
        walker.skip_value(type, what)
        entries[key] = Entry(type, start, walker.position)
    alignment = _read_alignment(walker, entries)
    rows = [_read_tensor(walker) for _ in range(n_tensors)]
    data_start = -(-walker.position // alignment) * alignment
    tensors = _place(walker, rows, data_start, alignment)
    return Header(version, entries, tensors, alignment, data_start)


def _quote(name: str) -> str:
    """A key or a name for a message: one line, not long, nothing unprintable."""
    return ascii(name if len(name) <= 80 else name[:77] + "...")


def _read_version(walker: Walker) -> int:
    magic = bytes(walker.buffer[:4])
    if magic == b"vers":
        raise walker.fail("this is a Git LFS pointer, not the model; fetch it with 'git lfs pull'")
    if magic != MAGIC:
        raise walker.fail(f"this is not a GGUF file: it starts with {magic!r}, not {MAGIC!r}")
    walker.position = 4
    version = walker.u32("the version")
    if version in (2, 3):
        return version
    if version in (2 << 24, 3 << 24):
        raise walker.fail("this is a big-endian GGUF file; only little-endian ones can be read")
    raise walker.fail(f"GGUF version {version} cannot be read; versions 2 and 3 can")


def _read_alignment(walker: Walker, entries: dict[str, Entry]) -> int:
    entry = entries.get("general.alignment")
    if entry is None:
        return DEFAULT_ALIGNMENT
    if entry.type not in INTEGERS:
        raise walker.fail(f"general.alignment is of type {entry.type.name}, not a number")
    raw = walker.buffer[entry.start : entry.end]
    value = int.from_bytes(raw, "little", signed=SCALAR_DTYPES[entry.type].kind == "i")
    if not 0 < value <= MAX_ALIGNMENT or value & (value - 1):
        raise walker.fail(
            f"general.alignment is {value}; a power of two of at most {MAX_ALIGNMENT} is needed"
        )
    return value


def _read_tensor(walker: Walker) -> tuple[str, GGMLType, tuple[int, ...], int]:
    name = walker.name("a tensor's name")
    what = f"tensor {_quote(name)}"
    n_dims = walker.u32(f"the number of dimensions of {what}")
    if n_dims > MAX_DIMS:
        raise walker.fail(f"{what} has {n_dims} dimensions; at most {MAX_DIMS} are possible")
    ne = tuple(walker.u64(f"a dimension of {what}") for _ in range(n_dims)) or (1,)
    number = walker.u32(f"the type of {what}")
    offset = walker.u64(f"the offset of {what}")
    try:
        type = GGMLType(number)
    except ValueError:
        removed = REMOVED_TYPES.get(number)
        why = f"the removed type {removed}" if removed else f"the unknown type number {number}"
        raise walker.fail(f"{what} has {why}; get the model in a current type") from None
    if 0 in ne:
        raise walker.fail(f"{what} has a dimension of 0: {list(ne)}")
    if ne[0] % type.block_size:
        raise walker.fail(
            f"{what} has rows of {ne[0]} elements, not a multiple of {type.name}'s block of "
            f"{type.block_size}"
        )
    return name, type, ne, offset


def _place(
    walker: Walker,
    rows: list[tuple[str, GGMLType, tuple[int, ...], int]],
    data_start: int,
    alignment: int,
) -> tuple[TensorEntry, ...]:
    """Turns offsets into positions in the file; nothing may stick out or overlap."""
    size = len(walker.buffer)
    tensors: dict[str, TensorEntry] = {}
    for name, type, ne, relative in rows:
        if name in tensors:
            raise walker.fail(f"tensor {_quote(name)} is there twice")
        if relative % alignment:
            raise walker.fail(
                f"tensor {_quote(name)} lies at {relative}, not at a multiple of {alignment}"
            )
        nbytes = type.row_bytes(ne[0])
        for n in ne[1:]:
            nbytes *= n
        offset = data_start + relative
        if offset + nbytes > size:
            raise walker.fail(
                f"tensor {_quote(name)} ends at byte {offset + nbytes}, but the file has "
                f"{size}; it is truncated or damaged, download it again"
            )
        tensors[name] = TensorEntry(name, type, ne, offset, nbytes)
    ordered = sorted(tensors.values(), key=lambda tensor: tensor.offset)
    for before, after in pairwise(ordered):
        if before.offset + before.nbytes > after.offset:
            raise walker.fail(f"tensors {_quote(before.name)} and {_quote(after.name)} overlap")
    return tuple(tensors.values())
