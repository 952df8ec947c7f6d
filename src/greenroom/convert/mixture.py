"""Which block format a tensor gets: plain types, llama.cpp's mixes, and a user's own rules.

Knows names and shapes; makes no bytes.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from greenroom.errors import UnsupportedModelError
from greenroom.gguf import GGMLType


@dataclass(frozen=True, slots=True)
class Mix:
    """A mix of types.

    Attributes:
        file_type: `general.file_type`.
        base: of most matrices.
        finer: of value and down projections in the layers `use_more_bits` names.
        head: of the output matrix.
        dense: of all but the experts, where the mix is about experts.
    """

    file_type: int
    base: GGMLType
    finer: GGMLType | None = None
    head: GGMLType | None = None
    dense: GGMLType | None = None


_T = GGMLType
MIXES: dict[str, Mix] = {
    "F32": Mix(0, _T.F32),
    "F16": Mix(1, _T.F16),
    "BF16": Mix(32, _T.BF16),
    "Q4_0": Mix(2, _T.Q4_0, head=_T.Q6_K),
    "Q4_1": Mix(3, _T.Q4_1, head=_T.Q6_K),
    "Q5_0": Mix(8, _T.Q5_0, head=_T.Q6_K),
    "Q5_1": Mix(9, _T.Q5_1, head=_T.Q6_K),
    "Q8_0": Mix(7, _T.Q8_0),
    "Q2_K": Mix(10, _T.Q2_K, _T.Q3_K, _T.Q6_K),
    "Q3_K": Mix(12, _T.Q3_K, _T.Q4_K, _T.Q6_K),
    "Q3_K_M": Mix(12, _T.Q3_K, _T.Q4_K, _T.Q6_K),
    "Q4_K": Mix(14, _T.Q4_K, head=_T.Q6_K),
    "Q4_K_S": Mix(14, _T.Q4_K, head=_T.Q6_K),
    "Q4_K_M": Mix(15, _T.Q4_K, _T.Q6_K, _T.Q6_K),
    "Q5_K": Mix(16, _T.Q5_K, head=_T.Q6_K),
    "Q5_K_S": Mix(16, _T.Q5_K, head=_T.Q6_K),
    "Q5_K_M": Mix(17, _T.Q5_K, _T.Q6_K, _T.Q6_K),
    "Q6_K": Mix(18, _T.Q6_K),
    "IQ4_NL": Mix(25, _T.IQ4_NL, head=_T.Q6_K),
    "IQ4_XS": Mix(30, _T.IQ4_XS, _T.Q5_K, _T.Q6_K),
    # As distributed: experts in four bits, all other matrices in eight.
    "MXFP4": Mix(38, _T.MXFP4, dense=_T.Q8_0),
    "NVFP4": Mix(39, _T.NVFP4, dense=_T.Q8_0),
}

# What rows that are not multiples of 256 get in place of a type with blocks of 256.
FALLBACKS = {
    _T.Q2_K: _T.IQ4_NL,
    _T.Q3_K: _T.IQ4_NL,
    _T.IQ4_XS: _T.IQ4_NL,
    _T.Q4_K: _T.Q5_0,
    _T.Q5_K: _T.Q5_1,
    _T.Q6_K: _T.Q8_0,
}
FLOATS = (_T.F32, _T.F16, _T.BF16)
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.weight")


@dataclass(frozen=True, slots=True)
class Rules:
    """How to choose types.

    Attributes:
        mix: a key of MIXES, or "auto" to keep the checkpoint's own types.
        layers: of the model.
        experts: routed experts of a layer, 0 for none.
        overrides: (regular expression, type); the first that is found in a name decides.
    """

    mix: str
    layers: int
    experts: int = 0
    overrides: Sequence[tuple[re.Pattern[str], GGMLType]] = field(default=())

    def type_of(self, name: str, shape: tuple[int, ...], source: GGMLType) -> GGMLType:
        """The type of a tensor.

        Args:
            name: in the file.
            shape: NumPy order.
            source: the type it has now.

        Raises:
            UnsupportedModelError: an override's blocks do not fit the rows.
        """
        for pattern, type in self.overrides:
            if pattern.search(name):
                return self._checked(name, shape, type)
        if keeps_float32(name, shape):
            return GGMLType.F32
        if self.mix == "auto":
            return source
        mix = MIXES[self.mix]
        return fitting(name, self._wanted(name, mix, source), shape[-1])

    def _wanted(self, name: str, mix: Mix, source: GGMLType) -> GGMLType:
        routed = "_exps." in name
        # gpt-oss was trained in MXFP4; rounding its blocks again would only lose.
        if routed and source == GGMLType.MXFP4 and mix.base != GGMLType.F32:
            return source
        if mix.dense is not None and not routed:
            return mix.dense
        if name == "output.weight" and mix.head is not None:
            return mix.head
        match = _BLOCK.fullmatch(name)
        if match is None or mix.finer is None:
            return mix.base
        layer, kind = int(match[1]), match[2]
        if self.experts == 8 and kind in ("attn_k", "attn_v"):
            return GGMLType.Q8_0
        if kind == "attn_v" or kind.startswith("ffn_down"):
            return mix.finer if more_bits(layer, self.layers) else mix.base
        return mix.base

    @staticmethod
    def _checked(name: str, shape: tuple[int, ...], type: GGMLType) -> GGMLType:
        if shape[-1] % type.block_size:
            raise UnsupportedModelError(
                f"tensor {name} has rows of {shape[-1]}, which are no blocks of {type.name} "
                f"({type.block_size}); choose another type for it"
            )
        return type


def keeps_float32(name: str, shape: tuple[int, ...]) -> bool:
    """What is never rounded: vectors, norms, routers, biases, tables."""
    if len(shape) == 1 or not name.endswith(".weight"):
        return True
    return "_norm" in name or "ffn_gate_inp" in name


def fitting(name: str, type: GGMLType, columns: int) -> GGMLType:
    """`type`, or what takes its place where rows are not whole blocks of it."""
    if columns % type.block_size == 0:
        return type
    fallback = GGMLType.Q8_0 if name == "output.weight" else FALLBACKS.get(type, GGMLType.F16)
    return fallback if columns % fallback.block_size == 0 else GGMLType.F16


def more_bits(layer: int, layers: int) -> bool:
    """llama.cpp's `use_more_bits`: the first and last eighth, and every third between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def check_mix(name: str) -> str:
    """The mix as MIXES spells it; UnsupportedModelError if there is none."""
    upper = name.upper()
    if upper not in MIXES:
        raise UnsupportedModelError(f"there is no type {name!r}; choose {', '.join(MIXES)}")
    return upper


def parse_override(text: str) -> tuple[re.Pattern[str], GGMLType]:
    """ "REGEX=TYPE"; UnsupportedModelError if it is none."""
    pattern, _, type = text.rpartition("=")
    try:
        return re.compile(pattern), GGMLType[type.upper()]
    except (re.error, KeyError):
        raise UnsupportedModelError(
            f"{text!r} is no rule of the form REGEX=TYPE, for example 'ffn_down_exps=Q6_K'"
        ) from None
