"""Work on long texts a portion at a time: one call for megabytes keeps the interpreter lock, and
with it every other thread, for tens of milliseconds.
"""

import codecs
from collections.abc import Iterator

PORTION = 1 << 14  # characters or bytes that are changed in one call
_SEARCHED = 1 << 20  # characters looked through in one call


def portions(text: str) -> Iterator[str]:
    """The text in pieces of at most PORTION characters."""
    return (text[at : at + PORTION] for at in range(0, len(text), PORTION))


def find(text: str, what: str, begin: int = 0) -> int:
    """`text.find(what, begin)`."""
    for at in range(begin, len(text), _SEARCHED):
        if (found := text.find(what, at, at + _SEARCHED + len(what) - 1)) >= 0:
            return found
    return -1


def encoded(text: str) -> bytes:
    """The text in UTF-8; lone surrogates are kept."""
    return b"".join([part.encode("utf-8", "surrogatepass") for part in portions(text)])


def decoded(data: bytes) -> str:
    """The text that `encoded` wrote."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogatepass")
    view = memoryview(data)
    parts = [decoder.decode(view[at : at + PORTION]) for at in range(0, len(data), PORTION)]
    return "".join([*parts, decoder.decode(b"", final=True)])
