"""A dense model as a Mixture-of-Experts one with the same logits: its FFN cut into experts that
are all active. Nothing is requantised, so it is a fixture for everything that handles experts.

A router of zeros gives each of E experts the weight 1/E; the scales of `ffn_down` carry E.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from greenroom.errors import ModelFileError, UnsupportedModelError
from greenroom.gguf import GGMLType, GGUFFile, TensorInfo, TensorSpec

Bytes = npt.NDArray[np.uint8]

# Where the float16 scales (and minima) of a block are; numbers decoded are linear in them.
_HALVES: dict[GGMLType, tuple[int, ...]] = {
    GGMLType.F16: (0,),
    GGMLType.Q4_0: (0,),
    GGMLType.Q4_1: (0, 2),
    GGMLType.Q5_0: (0,),
    GGMLType.Q5_1: (0, 2),
    GGMLType.Q8_0: (0,),
    GGMLType.Q2_K: (80, 82),
    GGMLType.Q3_K: (108,),
    GGMLType.Q4_K: (0, 2),
    GGMLType.Q5_K: (0, 2),
    GGMLType.Q6_K: (208,),
    GGMLType.IQ4_NL: (0,),
    GGMLType.IQ4_XS: (0,),
}


def require_dense_llama(file: GGUFFile) -> None:
    """UnsupportedModelError unless the file is a dense model of architecture `llama`."""
    architecture = file.metadata.get("general.architecture")
    if architecture != "llama" or file.metadata.get("llama.expert_count", 0):
        what = f"architecture {architecture!r}" if architecture != "llama" else "experts already"
        raise UnsupportedModelError(
            f"{file.path.name} has {what}; upcycling starts from a dense model of "
            "architecture 'llama'"
        )


def exact_metadata(file: GGUFFile, experts: int) -> dict[str, Any]:
    """The file's metadata with the keys of `experts` experts, all of them used."""
    values: dict[str, Any] = dict(file.metadata.raw_values())
    values["general.name"] = f"{file.metadata.get('general.name', file.path.stem)} ({experts}x)"
    values["llama.expert_count"] = values["llama.expert_used_count"] = experts
    values["llama.feed_forward_length"] = _width(file) // experts
    return values


def exact_specs(file: GGUFFile, experts: int) -> Iterator[TensorSpec]:
    """The tensors: bytes of the dense file, rearranged where experts ask for it.

    Raises:
        UnsupportedModelError: the FFN cannot be cut into so many experts.
    """
    _check(file, experts)
    hidden = int(file.metadata["llama.embedding_length"])
    for name, tensor in file.tensors.items():
        layer, _, kind = name.removesuffix(".weight").rpartition(".")
        if kind in ("ffn_gate", "ffn_up"):
            rows, columns = tensor.shape
            shape = (experts, rows // experts, columns)
            yield TensorSpec(f"{layer}.{kind}_exps.weight", tensor.type, shape, tensor.data)
        elif kind == "ffn_down":
            yield _router(f"{layer}.ffn_gate_inp.weight", experts, hidden)
            yield _down(f"{layer}.ffn_down_exps.weight", tensor, experts)
        else:
            yield TensorSpec.copy(tensor)


def _width(file: GGUFFile) -> int:
    return int(file.metadata["llama.feed_forward_length"])


def _check(file: GGUFFile, experts: int) -> None:
    down = file.tensors.get("blk.0.ffn_down.weight")
    if down is None:
        raise ModelFileError(f"{file.path.name}: tensor blk.0.ffn_down.weight is missing")
    width, block = down.ne[0], down.type.block_size
    if experts < 2 or experts & (experts - 1) or width % (experts * block):
        possible = [e for e in (2, 4, 8, 16, 32, 64, 128) if width % (e * block) == 0]
        raise UnsupportedModelError(
            f"{file.path.name}: an FFN of {width} in {down.type.name} cannot be cut exactly into "
            f"{experts} experts; possible: {', '.join(map(str, possible)) or 'none'}"
        )


def _router(name: str, experts: int, hidden: int) -> TensorSpec:
    zeros = np.zeros((experts, hidden), np.float32)
    return TensorSpec(name, GGMLType.F32, zeros.shape, zeros)


def _down(name: str, tensor: TensorInfo, experts: int) -> TensorSpec:
    rows, columns = tensor.shape

    def data() -> Bytes:
        cut = tensor.rows().reshape(rows, experts, -1).swapaxes(0, 1)
        return scaled(tensor.type, np.ascontiguousarray(cut), experts, tensor.name)

    return TensorSpec(name, tensor.type, (experts, rows, columns // experts), data)


def scaled(type: GGMLType, raw: Bytes, factor: int, name: str) -> Bytes:
    """Raw blocks times a power of two, changed in place where only an exponent changes.

    Raises:
        UnsupportedModelError: the format cannot, or a scale would be infinite.
    """
    if type is GGMLType.F32:
        return (raw.view("<f4") * np.float32(factor)).view(np.uint8)
    if type is GGMLType.BF16:
        wide = (raw.view("<u2").astype(np.uint32) << 16).view(np.float32) * np.float32(factor)
        return (wide.view(np.uint32) >> 16).astype("<u2").view(np.uint8)
    if type not in _HALVES:
        raise UnsupportedModelError(f"{name}: {type.name} blocks cannot be scaled exactly")
    blocks = raw.reshape(-1, type.block_bytes)
    for at in _HALVES[type]:
        halves = np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2")
        with np.errstate(over="ignore"):
            larger = halves * np.float16(factor)
        if not np.isfinite(larger).all():
            raise UnsupportedModelError(f"{name}: a scale times {factor} exceeds float16")
        blocks[:, at : at + 2] = larger.view(np.uint8)
    return raw
