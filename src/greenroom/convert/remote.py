"""The header of a GGUF file that is somewhere else, by range requests: a file of the full size
whose tensors are a hole. Knows URLs, not the hub.
"""

import os
from pathlib import Path
from typing import Any

from greenroom.errors import ModelFileError
from greenroom.gguf.header import MAX_HEADER_BYTES, read_header

FIRST_BYTES = 1 << 20
_GROWTH = 4


def fetch_header(client: Any, url: str, path: Path) -> int:
    """Writes `path` with the header found at `url`; returns the bytes that were fetched.

    Args:
        client: an httpx client, its headers set.
        url: of the file.
        path: to write; nothing behind the header takes room on the disk.

    Raises:
        ModelFileError: it is no GGUF file, or the server does not answer ranges.
    """
    have, wanted = b"", FIRST_BYTES
    while True:
        more, size = _range(client, url, len(have), wanted - 1, path.name)
        have += more
        with path.open("wb") as file:
            file.write(have)
            os.truncate(file.fileno(), max(size, len(have)))
        problem = _problem(path, have)
        if problem is None:
            return len(have)
        if len(have) >= min(size, MAX_HEADER_BYTES) or not have.startswith(b"GGUF"):
            raise ModelFileError(problem)
        wanted = min(wanted * _GROWTH, size, MAX_HEADER_BYTES)


def _problem(path: Path, have: bytes) -> str | None:
    """What is wrong with the header as far as it was fetched; None if it is complete."""
    import mmap

    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        try:
            header = read_header(mapped, path.name)
        except ModelFileError as error:
            return str(error)
    return None if header.data_start <= len(have) else f"{path.name}: its header is too long"


def _range(client: Any, url: str, first: int, last: int, name: str) -> tuple[bytes, int]:
    """Bytes first to last of the file, and the size of the whole."""
    with client.stream("GET", url, headers={"Range": f"bytes={first}-{last}"}) as answer:
        if answer.status_code != 206:
            raise ModelFileError(
                f"{name}: the server answered {answer.status_code} to a request for a part; "
                "a gated model needs HF_TOKEN"
            )
        total = answer.headers.get("content-range", "").rpartition("/")[2]
        body = bytearray()
        for piece in answer.iter_bytes():
            body += piece
            if len(body) > last - first + 1:
                raise ModelFileError(f"{name}: the server sent more than it was asked for")
    return bytes(body), int(total) if total.isdigit() else first + len(body)
