"""Typed look-ups in GGUF metadata: any integer width, a scalar or an array of equal values.

Knows how values may be spelled, not what a key means.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from greenroom.errors import ModelFileError, UnsupportedModelError

MAX_COUNT = 1 << 31  # no count of a model is larger; a larger one would only exhaust the memory


class Keys:
    """The keys `{architecture}.*` of a file.

    Args:
        metadata: all keys; `general.architecture` names the prefix.
    """

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        architecture = metadata.get("general.architecture")
        if not isinstance(architecture, str):
            raise ModelFileError("general.architecture is missing; this file is no model")
        self.architecture = architecture
        self._metadata = metadata

    def __contains__(self, key: str) -> bool:
        """Whether the file has the key."""
        return self.name(key) in self._metadata

    def name(self, key: str) -> str:
        """The key as the file spells it."""
        return f"{self.architecture}.{key}"

    def scalar(self, key: str) -> Any:
        """The value; of an array whose elements are equal, that element; None if absent."""
        value = self._metadata.get(self.name(key))
        if isinstance(value, np.ndarray):
            if value.size == 0 or not (value == value.flat[0]).all():
                raise UnsupportedModelError(
                    f"{self.name(key)} differs between layers; only models whose layers are "
                    "alike are implemented"
                )
            return value.flat[0].item()
        return value

    def count(
        self, key: str, default: int | None = None, minimum: int = 1, maximum: int = MAX_COUNT
    ) -> int:
        """An integer between minimum and maximum; without a default the key must be there."""
        value = self.scalar(key)
        if value is None:
            value = default
        if value is None:
            raise self._missing(key)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise ModelFileError(
                f"{self.name(key)} = {value!r:.40} must be a count from {minimum} to {maximum}"
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number of at least 0; without a default the key must be there."""
        value = self.scalar(key)
        if value is None:
            value = default
        if value is None:
            raise self._missing(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ModelFileError(f"{self.name(key)} = {value!r:.40} must be a number")
        if not math.isfinite(value) or value < 0:
            raise ModelFileError(f"{self.name(key)} = {value} must be finite and not negative")
        return float(value)

    def text(self, key: str, default: str) -> str:
        """A string."""
        value = self._metadata.get(self.name(key), default)
        if not isinstance(value, str):
            raise ModelFileError(f"{self.name(key)} = {value!r:.40} must be a string")
        return value

    def flag(self, key: str) -> bool | None:
        """A boolean, or None if the key is not there."""
        value = self.scalar(key)
        return None if value is None else bool(value)

    def flags(self, key: str, layers: int, period: int) -> list[bool]:
        """One boolean per layer, from an array, or from a period as `read_windows` explains."""
        value = self._metadata.get(self.name(key))
        if isinstance(value, np.ndarray) and value.size > 1:
            if len(value) != layers:
                raise ModelFileError(
                    f"{self.name(key)} has {len(value)} values for {layers} layers"
                )
            return [bool(v) for v in value]
        if value is not None:
            period = self.count(key, minimum=0)
        return [period == 0 or layer % period < period - 1 for layer in range(layers)]

    def _missing(self, key: str) -> ModelFileError:
        return ModelFileError(
            f"{self.name(key)} is missing in the metadata; the file is incomplete, convert it again"
        )
