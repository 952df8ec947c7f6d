"""The header of a GGUF file that is somewhere else, by range requests: a file of the full size
whose tensors are a hole. Knows URLs, not the hub.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from greenroom.errors import ModelFileError
from greenroom.gguf.header import MAX_HEADER_BYTES, read_header

FIRST_BYTES = 1 << 20
_GROWTH = 4
_TIMEOUT = 30  # seconds


def fetch_header(
    client: Any, url: str, path: Path, headers: Mapping[str, str] = MappingProxyType({})
) -> int:
    """Writes `path` with the header found at `url`; returns the bytes that were fetched.

    Args:
        client: an HTTP client like httpx's; the hub's own package says which one that is.
        url: of the file.
        path: to write; nothing behind the header takes room on the disk.
        headers: to send, such as the token's.

    Raises:
        ModelFileError: it is no GGUF file, or the server does not answer ranges.
    """
    have, wanted = b"", FIRST_BYTES
    while True:
        part = {**headers, "Range": f"bytes={len(have)}-{wanted - 1}"}
        more, size = _range(client, url, part, wanted - len(have), path.name)
        have += more
        size = len(have) if size is None else size
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


def _range(
    client: Any, url: str, headers: Mapping[str, str], most: int, name: str
) -> tuple[bytes, int | None]:
    """The bytes that the headers ask for, and the size of the whole if it is told."""
    with client.stream("GET", url, headers=headers, timeout=_TIMEOUT) as answer:
        if answer.status_code != 206:
            raise ModelFileError(
                f"{name}: the server answered {answer.status_code} to a request for a part; "
                "a gated model needs HF_TOKEN"
            )
        total = answer.headers.get("content-range", "").rpartition("/")[2]
        body = bytearray()
        for piece in answer.iter_bytes():
            body += piece
            if len(body) > most:
                raise ModelFileError(f"{name}: the server sent more than it was asked for")
    return bytes(body), int(total) if total.isdigit() else None
