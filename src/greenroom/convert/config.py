"""`config.json` of a checkpoint: look-ups with one line of error, and the rotary embedding.

Knows the spellings of several generations of the publishers' libraries; not which family needs
what.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from greenroom.convert.values import Values
from greenroom.errors import ModelFileError, UnsupportedModelError


class Config:
    """The keys of a `config.json`.

    Args:
        path: the file, for messages.
        values: what it holds.
    """

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path = path
        self.values = values

    @classmethod
    def read(cls, folder: Path) -> "Config":
        """The configuration of a folder; ModelFileError if there is none."""
        return cls(folder / "config.json", read_json(folder / "config.json"))

    def __contains__(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self.values.get(key) is not None

    def get(self, *keys: str, default: Any = None) -> Any:
        """The first of these keys that is there and not null."""
        return next((self.values[key] for key in keys if key in self), default)

    def count(self, *keys: str, default: int | None = None) -> int:
        """An integer; without a default one of the keys must be there."""
        value = self.get(*keys, default=default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ModelFileError(f"{self.path}: {keys[0]} = {value!r:.40} must be an integer")
        return value

    def number(self, *keys: str, default: float | None = None) -> float:
        """A number; without a default one of the keys must be there."""
        value = self.get(*keys, default=default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ModelFileError(f"{self.path}: {keys[0]} = {value!r:.40} must be a number")
        return float(value)

    def require(self, key: str, *harmless: Any) -> None:
        """UnsupportedModelError unless the key is missing, null or one of these values."""
        value = self.get(key)
        if value is not None and value not in harmless:
            allowed = " or ".join(map(str, harmless)) or "null"
            raise UnsupportedModelError(
                f"{self.path}: {key} = {value!r:.40} is not implemented; implemented: {allowed}"
            )

    @property
    def rope(self) -> dict[str, Any]:
        """Parameters of the rotary embedding, of either spelling; `rope_type` is always set."""
        found = dict(self.get("rope_parameters", "rope_scaling", default={}))
        found.setdefault("rope_theta", self.number("rope_theta", default=10000.0))
        found["rope_type"] = found.get("rope_type") or found.get("type") or "default"
        return found

    @property
    def head_dim(self) -> int:
        """Elements of one head."""
        heads = self.count("num_attention_heads")
        if heads < 1:
            raise ModelFileError(f"{self.path}: num_attention_heads = {heads} must be 1 or more")
        return self.count("head_dim", default=self.count("hidden_size") // heads)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; ModelFileError in one line if it is missing or damaged."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise ModelFileError(f"{path}: this is not JSON; download it again") from None
    if not isinstance(found, dict):
        raise ModelFileError(f"{path}: a JSON object is expected")
    return found


def rope_metadata(config: Config) -> dict[str, Any]:
    """`rope.*` keys without the architecture's prefix."""
    rope = config.rope
    keys: dict[str, Any] = {
        "rope.dimension_count": rotated(config),
        "rope.freq_base": float(rope["rope_theta"]),
    }
    kind = rope["rope_type"]
    if kind == "linear":
        keys["rope.scaling.type"] = "linear"
        keys["rope.scaling.factor"] = float(rope["factor"])
    elif kind == "yarn":
        keys |= _yarn(rope, config)
    elif kind in ("longrope", "su"):
        keys |= _longrope(rope, config)
    elif kind not in ("default", "llama3"):
        raise UnsupportedModelError(
            f"{config.path}: rotary scaling {kind!r} is not implemented; implemented: default, "
            "linear, yarn, longrope, llama3"
        )
    return keys


def rotated(config: Config) -> int:
    """Channels of a head that are rotated."""
    share = config.rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    return int(config.head_dim * (share or 1.0))


def _yarn(rope: dict[str, Any], config: Config) -> dict[str, Any]:
    factor = float(rope["factor"])
    original = rope.get("original_max_position_embeddings")
    keys: dict[str, Any] = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": int(
            original or config.count("max_position_embeddings")
        ),
        "rope.scaling.yarn_beta_fast": float(rope.get("beta_fast") or 32.0),
        "rope.scaling.yarn_beta_slow": float(rope.get("beta_slow") or 1.0),
    }
    given = rope.get("attention_factor")
    if given is not None:
        # The key is a factor on top of YaRN's own magnitude.
        keys["rope.scaling.attn_factor"] = float(given) / (0.1 * math.log(factor) + 1.0)
    return keys


def _longrope(rope: dict[str, Any], config: Config) -> dict[str, Any]:
    context = config.count("max_position_embeddings")
    original = int(
        rope.get("original_max_position_embeddings")
        or config.count("original_max_position_embeddings", default=context)
    )
    magnitudes = [rope.get("short_mscale"), rope.get("long_mscale"), rope.get("attention_factor")]
    given = {float(m) for m in magnitudes if m is not None}
    if len(given) > 1:
        raise UnsupportedModelError(
            f"{config.path}: short_mscale and long_mscale differ, which GGUF has no key for"
        )
    factor = context / original
    formula = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return {
        "rope.scaling.original_context_length": original,
        "rope.scaling.attn_factor": given.pop() if given else formula,
    }


def rope_tables(config: Config) -> dict[str, Values]:
    """The global tables of a model whose frequencies are scaled one by one: (rotated / 2,)."""
    rope = config.rope
    if rope["rope_type"] in ("longrope", "su"):
        return {
            f"rope_factors_{length}.weight": Values.of(rope[f"{length}_factor"])
            for length in ("long", "short")
        }
    if rope["rope_type"] == "llama3":
        return {"rope_freqs.weight": Values.of(_llama3(rope, rotated(config)))}
    return {}


def _llama3(rope: dict[str, Any], dimensions: int) -> npt.NDArray[np.float64]:
    """Divisors of the frequencies, as Llama 3.1's reference has them: waves much shorter than
    the original context stay, much longer ones stretch, those between are mixed."""
    frequency = float(rope["rope_theta"]) ** -(np.arange(0, dimensions, 2) / dimensions)
    turns = rope["original_max_position_embeddings"] * frequency / (2 * np.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    share = np.clip((turns - low) / (high - low), 0, 1)
    divisors: npt.NDArray[np.float64] = 1 / ((1 - share) / rope["factor"] + share)
    return divisors
