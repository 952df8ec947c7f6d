"""Opens GGUF files: one file or the first of a split set, mapped into memory.

Opening checks every size in the headers and reads no tensor; `TensorInfo.data()` is a view
into the map. Knows nothing of architectures: what the metadata means is decided in `models`.
"""

import contextlib
import mmap
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, TracebackType

import numpy as np
import numpy.typing as npt

from greenroom.errors import ModelFileError
from greenroom.gguf.formats import dequantize
from greenroom.gguf.header import Header, TensorEntry, read_header
from greenroom.gguf.metadata import Metadata
from greenroom.gguf.types import INTEGERS, GGMLType

Bytes = npt.NDArray[np.uint8]

_SPLIT_NAME = re.compile(r"^(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")


class Shard:
    """One mapped file. The map is freed when it is closed and the last view is gone.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map: mmap.mmap | None = _map_file(path)
        try:
            self.header: Header = read_header(self._map, path.name)
        except BaseException:
            self.close()
            raise

    @property
    def buffer(self) -> mmap.mmap:
        """The map; ModelFileError after `close`."""
        if self._map is None:
            raise ModelFileError(f"{self.path.name}: the file was closed")
        return self._map

    def close(self) -> None:
        """Unmaps the file, or leaves that to the garbage collector while views exist."""
        opened, self._map = self._map, None
        if opened is not None:
            with contextlib.suppress(BufferError):
                opened.close()


def _map_file(path: Path) -> mmap.mmap:
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ModelFileError(f"{path}: this is not a regular file; give a .gguf file")
            if status.st_size < 24:
                raise ModelFileError(
                    f"{path.name}: {status.st_size} bytes are too few for a GGUF file; "
                    "download it again"
                )
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except IsADirectoryError:
        raise ModelFileError(f"{path}: this is a directory; give a .gguf file in it") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ModelFileError(f"{path}: cannot be opened: {reason}") from None


def _open_without_waiting(name: str, flags: int) -> int:
    # Opening a named pipe would wait for a writer.
    return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor of an open file: what it is, and views of its bytes.

    Attributes:
        name: its name in the file.
        type: the element type.
        ne: dimensions in the order of the file, `ne[0]` contiguous.
        nbytes: bytes it takes in the file.
        offset: its first byte in the file `path`.
    """

    name: str
    type: GGMLType
    ne: tuple[int, ...]
    nbytes: int
    offset: int
    _shard: Shard = field(repr=False, compare=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions in NumPy's order, the contiguous one last."""
        return self.ne[::-1]

    @property
    def path(self) -> Path:
        """The file the bytes are in, one of a split set's."""
        return self._shard.path

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of `ne[0]` elements."""
        return self.type.row_bytes(self.ne[0])

    def data(self) -> Bytes:
        """The stored bytes, `(nbytes,)` uint8, a read-only view of the map."""
        return np.frombuffer(self._shard.buffer, np.uint8, self.nbytes, self.offset)

    def rows(self) -> Bytes:
        """The stored bytes row by row: `(*shape[:-1], row_bytes)` uint8, read-only."""
        return self.data().reshape(*self.shape[:-1], self.row_bytes)

    def expert(self, index: int) -> Bytes:
        """Slice `index` of the outermost dimension: `(*shape[1:-1], row_bytes)` uint8."""
        return np.asarray(self.rows()[index])

    def dequantize(self) -> npt.NDArray[np.float32]:
        """The values, `shape` float32; UnsupportedModelError if the type cannot be decoded."""
        return dequantize(self.type, self.rows())


class GGUFFile:
    """A GGUF model, open for reading; a context manager.

    Args:
        path: a `.gguf` file, or the first file `NAME-00001-of-0000N.gguf` of a split set,
            whose other files are beside it.

    Attributes:
        path: as given.
        paths: all files of the set.
        metadata: key to value, decoded when asked for; see `Metadata`.
        tensors: name to TensorInfo, in the order of the files.
        alignment: of the tensors in the first file, bytes.

    Raises:
        ModelFileError: a file is missing, truncated, damaged or inconsistent; one line.
    """

    path: Path
    metadata: Metadata
    tensors: Mapping[str, TensorInfo]
    alignment: int

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._shards = [Shard(self.path)]
        try:
            first = self._shards[0]
            self.metadata = Metadata(first.buffer, first.header.entries)
            self.alignment = first.header.alignment
            for other in _other_paths(self.path, self.metadata):
                self._shards.append(_open_other(other, self.path, len(self._shards)))
            self.tensors = MappingProxyType(self._collect())
            self._check_total()
        except BaseException:
            self.close()
            raise

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files of the set, in order."""
        return tuple(shard.path for shard in self._shards)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def close(self) -> None:
        """Closes the files; arrays that were handed out stay valid."""
        for shard in self._shards:
            shard.close()

    def __enter__(self) -> "GGUFFile":
        """The file itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes the file."""
        self.close()

    def __repr__(self) -> str:
        """Path and counts."""
        return f"GGUFFile({str(self.path)!r}: {len(self.tensors)} tensors)"

    def _collect(self) -> dict[str, TensorInfo]:
        tensors: dict[str, TensorInfo] = {}
        for shard in self._shards:
            for entry in shard.header.tensors:
                if entry.name in tensors:
                    where = tensors[entry.name].path.name
                    raise ModelFileError(
                        f"{shard.path.name}: tensor {entry.name!a:.80} is also in {where}"
                    )
                tensors[entry.name] = _tensor(entry, shard)
        return tensors

    def _check_total(self) -> None:
        total = _integer(self.metadata, "split.tensors.count", self.path, default=None)
        if len(self._shards) > 1 and total is not None and total != len(self.tensors):
            raise ModelFileError(
                f"{self.path.name}: the set should have {total} tensors, but its files have "
                f"{len(self.tensors)}; a file is from another set, download it again"
            )


def _tensor(entry: TensorEntry, shard: Shard) -> TensorInfo:
    return TensorInfo(entry.name, entry.type, entry.ne, entry.nbytes, entry.offset, shard)


def _integer(metadata: Metadata, key: str, path: Path, default: int | None) -> int | None:
    """A count of any integer width."""
    if key not in metadata:
        return default
    type = metadata.type(key)
    if type not in INTEGERS:
        raise ModelFileError(f"{path.name}: {key} must be a count, not {type.name}")
    value = int(metadata[key])
    if value < 0:
        raise ModelFileError(f"{path.name}: {key} must be a count, not {value}")
    return value


def _other_paths(path: Path, metadata: Metadata) -> Iterator[Path]:
    """The other files of the set that `path` is the first of."""
    count = _integer(metadata, "split.count", path, default=1) or 1
    number = _integer(metadata, "split.no", path, default=0)
    if count == 1:
        return
    match = _SPLIT_NAME.match(path.name)
    if match is None:
        raise ModelFileError(
            f"{path.name}: it is file {(number or 0) + 1} of a set of {count}; give the files "
            f"their names back, NAME-00001-of-{count:05}.gguf"
        )
    if int(match["count"]) != count:
        raise ModelFileError(
            f"{path.name}: its name says {int(match['count'])} files, its metadata {count}"
        )
    stem = match["stem"]
    if int(match["number"]) != 1 or number != 0:
        raise ModelFileError(
            f"{path.name}: open the first file of the set, {stem}-00001-of-{count:05}.gguf"
        )
    for i in range(2, count + 1):
        yield path.with_name(f"{stem}-{i:05}-of-{count:05}.gguf")


def _open_other(path: Path, first: Path, index: int) -> Shard:
    """Opens file `index` (from 0) of the set and checks that it is that one."""
    if not path.exists():
        raise ModelFileError(f"{first.name}: {path.name} of the same set is missing beside it")
    shard = Shard(path)
    try:
        metadata = Metadata(shard.buffer, shard.header.entries)
        number = _integer(metadata, "split.no", path, default=index)
        if number != index:
            raise ModelFileError(
                f"{path.name}: its metadata says it is file {(number or 0) + 1} of the set; "
                "download it again"
            )
    except BaseException:
        shard.close()
        raise
    return shard
