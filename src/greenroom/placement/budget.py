"""Sizes of memory as people write them: "6GiB", "300 MB", "0", "max". Knows nothing of devices."""

import re

from greenroom.errors import RequestError

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_DECIMAL = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_SIZE = re.compile(r"(\d{1,30}(?:\.\d{1,30})?)\s*(?:([kmgt]?)(i?)b?)", re.IGNORECASE)


def parse_size(text: str | int, field: str) -> int | None:
    """Bytes; None for "max".

    "GiB" and a bare "G" are 2^30 bytes, "GB" is 10^9.

    Raises:
        RequestError: it is no size; the error names `field`.
    """
    if isinstance(text, int) and not isinstance(text, bool) and text >= 0:
        return text
    plain = str(text).strip()
    if plain.lower() == "max":
        return None
    match = _SIZE.fullmatch(plain)
    if match is None:
        raise RequestError(f"{field} must be a size like 6GiB, 0 or max, not {plain!r}", field)
    number, unit, binary = match[1], match[2].lower(), match[3]
    decimal = unit and not binary and plain.lower().endswith("b")
    return int(float(number) * (_DECIMAL[unit] if decimal else _UNITS[unit]))


def mib(nbytes: int) -> str:
    """Rounded up to whole MiB, so that giving the number back is enough."""
    return f"{-(-nbytes // 2**20)} MiB"
