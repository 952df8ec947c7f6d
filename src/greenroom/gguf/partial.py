"""A file on its way to its name: written under a hidden one beside it, and renamed when whole.

Where it is said what the bytes are made from, a journal is kept of the parts that are there, with
their checksums: a run that was stopped at any point goes on behind the last good one, and starts
anew where anything differs. Knows parts and bytes, not tensors.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from greenroom.errors import GreenroomError, ModelFileError

_READ = 8 << 20
_LINE = re.compile(rb"(\d+) ([0-9a-f]{8})\n")


@dataclass(frozen=True, slots=True)
class Layout:
    """What will be written.

    Attributes:
        header: the first bytes.
        sizes: bytes of each part behind it.
        alignment: parts are padded with zeros to a multiple of it.
        source: a description of all the parts are made from; None: nothing is kept of a run
            that stops.
    """

    header: bytes
    sizes: Sequence[int]
    alignment: int
    source: str | None = None

    @property
    def identity(self) -> str:
        """The journal's first line: equal only if the same bytes are to be made."""
        digest = hashlib.sha256(self.header)
        digest.update(b"\0" + (self.source or "").encode())
        return f"greenroom journal 1 {digest.hexdigest()}\n"

    def padded(self, part: int) -> int:
        """Bytes of a part with its padding."""
        return -(-self.sizes[part] // self.alignment) * self.alignment

    @property
    def total(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(map(self.padded, range(len(self.sizes))))


def partial_path(target: Path) -> Path:
    """Where a file is until it is whole."""
    return target.with_name(f".{target.name}.partial")


def journal_path(target: Path) -> Path:
    """Where the journal of that file is."""
    return target.with_name(f".{target.name}.journal")


class Partial:
    """The open file, its header written and its whole parts kept.

    Args:
        layout: what will be written.
        file: open for reading and writing, at any position.
        journal: open for reading and appending, or None.
    """

    def __init__(self, layout: Layout, file: IO[bytes], journal: IO[bytes] | None) -> None:
        self._layout = layout
        self._file = file
        self._journal = journal
        self._checksum = 0
        self.complete = 0  # parts that are there
        if journal is not None:
            self._resume(journal)
        end = len(layout.header) + sum(map(layout.padded, range(self.complete)))
        if not self.complete:
            file.seek(0)
            file.truncate(0)
            file.write(layout.header)
        file.truncate(end)
        file.seek(end)

    def write(self, piece: memoryview) -> None:
        """Appends bytes of the part that is next."""
        self._file.write(piece)
        if self._journal is not None:
            self._checksum = zlib.crc32(piece, self._checksum)

    def end_part(self) -> None:
        """Pads the part, and notes that it is there."""
        size = self._layout.sizes[self.complete]
        self.write(memoryview(bytes(self._layout.padded(self.complete) - size)))
        if self._journal is not None:
            # The journal must not be ahead of the file when the process is killed.
            self._file.flush()
            self._journal.write(b"%d %08x\n" % (self.complete, self._checksum))
        self._checksum = 0
        self.complete += 1

    def _resume(self, journal: IO[bytes]) -> None:
        """Counts the parts that are there as noted; forgets the rest."""
        identity = self._layout.identity.encode()
        self._file.seek(0)
        first, *lines = journal.read().splitlines(keepends=True) or [b""]
        kept = len(identity) if first == identity and self._has(self._layout.header) else 0
        for line in lines if kept else ():
            if not self._whole(line):
                break
            kept += len(line)
            self.complete += 1
        journal.truncate(kept)
        journal.seek(kept)
        if not kept:
            journal.write(identity)

    def _has(self, header: bytes) -> bool:
        return self._file.read(len(header)) == header

    def _whole(self, line: bytes) -> bool:
        """Whether the part that is next is in the file as this line says; reads it."""
        match = _LINE.fullmatch(line)
        part = self.complete
        if match is None or int(match[1]) != part or part >= len(self._layout.sizes):
            return False
        left, checksum = self._layout.padded(part), 0
        while left and (piece := self._file.read(min(left, _READ))):
            left -= len(piece)
            checksum = zlib.crc32(piece, checksum)
        return not left and checksum == int(match[2], 16)


@contextlib.contextmanager
def replacing(target: Path, layout: Layout) -> Iterator[Partial]:
    """A file under a hidden name that takes `target`'s place if all goes well.

    What was written of a file with a source stays when the run is stopped or the disk is full,
    not when the data are at fault.

    Raises:
        ModelFileError: the disk is full, the path cannot be written, or another process is
            writing it.
    """
    partial, journal = partial_path(target), journal_path(target)
    keep = False
    try:
        with _locked(partial, target) as file, contextlib.ExitStack() as stack:
            keep = layout.source is not None
            _check_space(target, layout.total, file)
            notes = stack.enter_context(_journal(journal)) if keep else None
            yield Partial(layout, file, notes)
            if keep:
                file.flush()
                os.fsync(file.fileno())  # its name must not be on the disk before its bytes
            partial.replace(target)
            keep = False
    except OSError as error:
        raise ModelFileError(f"{target}: cannot be written: {error.strerror or error}") from error
    except _Busy:
        keep = True  # it is the other's
        raise
    except (ValueError, GreenroomError):
        keep = False
        raise
    finally:
        if not keep:
            for path in (partial, journal):
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)


class _Busy(ModelFileError):
    """Another process is writing the same file."""


def _journal(path: Path) -> IO[bytes]:
    """Unbuffered, so that a line is in the file when it is written; made if need be."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)


@contextlib.contextmanager
def _locked(partial: Path, target: Path) -> Iterator[IO[bytes]]:
    """The hidden file, opened as it is or made, for this process alone."""
    with os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except OSError as error:
            locked = not isinstance(error, BlockingIOError)  # or a file system without locks
        # Between opening and locking the other may have finished, or given up.
        if not locked or _inode(partial) != os.fstat(file.fileno()).st_ino:
            raise _Busy(f"{target}: another process is writing it; wait for it or stop it")
        yield file


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def _check_space(target: Path, size: int, file: IO[bytes]) -> None:
    there = os.fstat(file.fileno()).st_blocks * 512
    free = shutil.disk_usage(target.parent).free
    if size > free + there:
        raise ModelFileError(
            f"{target}: {_amount(size)} are needed, but only {_amount(free + there)} are free there"
        )


def _amount(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
