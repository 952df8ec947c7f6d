"""Reads a checkpoint in safetensors: one file or many, mapped, never loaded as a whole.

The headers are checked before anything is read. Knows names, shapes and number formats, not
what a tensor is for.
"""

import json
import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from greenroom.convert.values import Floats, Values
from greenroom.errors import ModelFileError, UnsupportedModelError
from greenroom.gguf import GGMLType

MAX_HEADER = 100 << 20  # the format's own limit

_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "BOOL": np.dtype("u1"),
    "F8_E4M3": np.dtype("u1"),
    "F8_E5M2": np.dtype("u1"),
}
_DAMAGED = ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError
_SOURCES = {"F32": GGMLType.F32, "F64": GGMLType.F32, "F16": GGMLType.F16, "BF16": GGMLType.BF16}


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor lies: number format, shape, file and byte range in it."""

    dtype: str
    shape: tuple[int, ...]
    file: int
    start: int
    stop: int


class Checkpoint:
    """The tensors of a folder.

    Args:
        folder: with `*.safetensors` and perhaps `model.safetensors.index.json`.

    Raises:
        ModelFileError: no checkpoint is there, or a file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._maps: list[mmap.mmap] = []
        self._entries: dict[str, Entry] = {}
        self.paths = _files(folder)
        for path in self.paths:
            self._open(path)

    def _open(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ModelFileError(f"{path}: cannot be opened: {error}") from None
        number = len(self._maps)
        self._maps.append(mapped)
        for name, entry in _header(path, mapped, number).items():
            if name in self._entries:
                raise ModelFileError(f"{path}: tensor {name} is in another file too")
            self._entries[name] = entry

    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor of this name."""
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self._entries)

    def entry(self, name: str) -> Entry:
        """Where a tensor is; ModelFileError if there is none."""
        if name not in self._entries:
            raise ModelFileError(
                f"{self.folder}: tensor {name} is missing; the checkpoint is incomplete or not "
                "of the class its config.json names"
            )
        return self._entries[name]

    def array(self, name: str) -> npt.NDArray[Any]:
        """The numbers as stored (BF16 as uint16), a view of the map."""
        entry = self.entry(name)
        dtype = _DTYPES[entry.dtype]
        count = (entry.stop - entry.start) // dtype.itemsize
        return np.frombuffer(self._maps[entry.file], dtype, count, entry.start).reshape(entry.shape)

    def values(self, name: str) -> Values:
        """The tensor as float32, read when asked for; UnsupportedModelError for integers."""
        entry = self.entry(name)
        if entry.dtype not in _SOURCES:
            raise UnsupportedModelError(
                f"{self.folder}: tensor {name} has type {entry.dtype}; supported: "
                f"{', '.join(_SOURCES)}, and gpt-oss's MXFP4 blocks"
            )

        def load(start: int, stop: int) -> Floats:
            return _float32(entry.dtype, self.array(name)[start:stop])

        return Values(entry.shape, load, _SOURCES[entry.dtype])

    def release(self) -> None:
        """Lets the system have back the pages that were read."""
        for mapped in self._maps:
            mapped.madvise(mmap.MADV_DONTNEED)


def _float32(dtype: str, stored: npt.NDArray[Any]) -> Floats:
    """Numbers as stored to float32, exactly (but for F64), in memory of their own."""
    if dtype == "BF16":
        wide = stored.astype(np.uint32)
        wide <<= np.uint32(16)
        return wide.view(np.float32)
    return stored.astype(np.float32)


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
            if any(Path(name).name != name for name in names):
                raise ValueError("a shard in another folder")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ModelFileError(f"{index}: this is no index of a checkpoint") from None
        missing = sorted(name for name in names if not (folder / name).is_file())
        if missing:
            raise ModelFileError(f"{folder}: {missing[0]} is missing; download it again")
        return sorted(folder / name for name in names)
    found = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    if not found:
        raise ModelFileError(
            f"{folder}: no *.safetensors here; give a folder with a checkpoint in HF's layout"
        )
    return found


def _header(path: Path, mapped: mmap.mmap, number: int) -> dict[str, Entry]:
    """The tensors of one file; ModelFileError if the header and the file do not agree."""
    if len(mapped) < 8:
        raise ModelFileError(f"{path}: too short for safetensors; download it again")
    (length,) = struct.unpack_from("<Q", mapped)
    if length > min(MAX_HEADER, len(mapped) - 8):
        raise ModelFileError(f"{path}: the header does not fit the file; download it again")
    try:
        found = json.loads(mapped[8 : 8 + length])
        return {
            name: _entry(item, number, 8 + length, len(mapped))
            for name, item in found.items()
            if name != "__metadata__"
        }
    except _DAMAGED as error:
        raise ModelFileError(f"{path}: damaged header ({error}); download it again") from None


def _entry(item: dict[str, Any], number: int, base: int, size: int) -> Entry:
    shape = tuple(int(n) for n in item["shape"])
    start, stop = (base + int(n) for n in item["data_offsets"])
    dtype = str(item["dtype"])
    if dtype not in _DTYPES:
        raise ValueError(f"numbers of type {dtype} are not known")
    count = math.prod(shape)
    if min(shape, default=1) < 0 or not base <= start <= stop <= size:
        raise ValueError("a tensor lies outside the file")
    if count * _DTYPES[dtype].itemsize != stop - start:
        raise ValueError("a tensor's bytes do not fit its shape")
    return Entry(dtype, shape, number, start, stop)
