"""Builds the rotary embedding a file asks for: linear, YaRN, longrope, llama 3's table.

Knows metadata and the global tables of a file; the arithmetic stands in `layers.rope`.
"""

from dataclasses import replace

from torch import Tensor

from greenroom.errors import ModelFileError
from greenroom.layers.rope import Rope, Yarn, inverse_frequencies
from greenroom.models.config import RopeConfig
from greenroom.models.parts import Parts


def build_rope(
    rope: RopeConfig, parts: Parts, neox: bool, context_length: int, rounded: bool = True
) -> Rope | None:
    """The rotary embedding, or None where the model has no positions.

    Args:
        rope: the file's description.
        parts: for `rope_freqs`, `rope_factors_long` and `rope_factors_short`.
        neox: the family's pairing.
        context_length: tokens of a session: longrope takes its long table beyond the original
            context. The table must not change while keys are cached, so it is chosen here.
        rounded: round YaRN's bounds to whole dimensions.
    """
    factors = rope_factors(rope, parts, context_length)
    if not rope.enabled:
        return None
    frequencies = inverse_frequencies(rope.dimensions, rope.base)
    if factors is not None:
        frequencies = frequencies / factors.double()
    magnitude = 1.0 if rope.attention_factor is None else rope.attention_factor
    if rope.scaling == "linear":
        frequencies = frequencies / rope.factor
    elif rope.scaling == "yarn":
        yarn = make_yarn(rope, rounded)
        frequencies, magnitude = yarn.apply(frequencies, rope.base), magnitude * yarn.magnitude
    return Rope(frequencies, magnitude, neox)


def make_yarn(rope: RopeConfig, rounded: bool) -> Yarn:
    """YaRN's parameters from the metadata."""
    if rope.original_context == 0:
        raise ModelFileError(
            "rope.scaling.type is yarn, but rope.scaling.original_context_length is missing"
        )
    yarn = Yarn(rope.factor, rope.original_context, rounded=rounded)
    return replace(yarn, beta_fast=rope.beta_fast, beta_slow=rope.beta_slow)


def rope_factors(rope: RopeConfig, parts: Parts, context_length: int) -> Tensor | None:
    """Divisors of the frequencies, (rotated / 2,) float32, if the file has a table."""
    half = rope.dimensions // 2
    if rope.scaling == "longrope":
        tables = [parts.values(f"rope_factors_{name}.weight", half) for name in ("short", "long")]
        return tables[context_length > rope.original_context]
    if parts.has("rope_freqs.weight"):
        return parts.values("rope_freqs.weight", half)
    return None
