"""Which block format a tensor gets, by the rules of llama.cpp's quantiser.

Knows names, shapes and the mixes people use; makes no bytes.
"""

import re

from greenroom.convert.mixture import FALLBACKS, more_bits
from greenroom.convert.synth_shapes import Part, Role, Shape
from greenroom.errors import UnsupportedModelError
from greenroom.gguf import GGMLType

# Mixes and plain types, with the number `general.file_type` has for them.
FILE_TYPES: dict[str, int] = {
    "F32": 0,
    "F16": 1,
    "BF16": 32,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q8_0": 7,
    "Q2_K": 10,
    "Q3_K": 12,
    "Q4_K": 14,
    "Q4_K_M": 15,
    "Q5_K": 16,
    "Q6_K": 18,
    "IQ4_NL": 25,
    "IQ4_XS": 30,
    "MXFP4": 38,
    "NVFP4": 39,
}

_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.weight")


def check_mix(mix: str) -> str:
    """The mix in upper case; UnsupportedModelError if it is none."""
    if mix.upper() not in FILE_TYPES:
        raise UnsupportedModelError(f"there is no type {mix!r}; choose {', '.join(FILE_TYPES)}")
    return mix.upper()


def type_of(part: Part, shape: Shape, mix: str) -> GGMLType:
    """The type of `part` in a file of `shape` quantised as `mix`, a key of FILE_TYPES."""
    if part.role not in (Role.MATRIX, Role.EXPERTS):
        return GGMLType.F32
    if mix in ("MXFP4", "NVFP4"):
        # As distributed: experts in four bits, all other matrices in eight.
        wanted = GGMLType[mix] if part.role is Role.EXPERTS else GGMLType.Q8_0
    elif mix == "Q4_K_M":
        wanted = _medium(part.name, shape)
    else:
        wanted = GGMLType[mix]
    if part.shape[-1] % wanted.block_size == 0:
        return wanted
    fallback = FALLBACKS.get(wanted, GGMLType.F16)
    return GGMLType.Q8_0 if part.name == "output.weight" else fallback


def _medium(name: str, shape: Shape) -> GGMLType:
    """Q4_K_M: Q6_K for the head, and in half of the layers for values and `ffn_down`."""
    if name == "output.weight":
        return GGMLType.Q6_K
    match = _BLOCK.fullmatch(name)
    if match is None:
        return GGMLType.Q4_K
    layer, kind = int(match[1]), match[2]
    if shape.experts == 8 and kind in ("attn_k", "attn_v"):
        return GGMLType.Q8_0
    if kind == "attn_v" or kind.startswith("ffn_down"):
        return GGMLType.Q6_K if more_bits(layer, shape.layers) else GGMLType.Q4_K
    return GGMLType.Q4_K
