"""A dense `llama` model as a sparse Mixture-of-Experts one in the `deepseek` architecture.

Shared experts hold the neurons every token needs, a router picks some of the others. Softmax
weights are used as they are there, so the routed `ffn_down` is multiplied by the number of
routed experts: an even router then changes nothing.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from greenroom.convert.upcycle_deltas import MATRICES, Deltas
from greenroom.errors import ModelFileError
from greenroom.gguf import GGMLType, GGUFFile, TensorInfo, TensorSpec, Typed, ValueType, quantize

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

_OLD, _NEW = "llama.", "deepseek."


def sparse_metadata(file: GGUFFile, deltas: Deltas, used: int) -> dict[str, Any]:
    """The dense file's metadata under the new architecture's name, with the experts' keys."""
    raw = file.metadata.raw_values()
    values: dict[str, Any] = {
        _NEW + key.removeprefix(_OLD) if key.startswith(_OLD) else key: value
        for key, value in raw.items()
    }
    total = deltas.shared + deltas.routed
    name = file.metadata.get("general.name", file.path.stem)
    experts = {
        "expert_count": deltas.routed,
        "expert_used_count": used,
        "expert_shared_count": deltas.shared,
        "expert_feed_forward_length": deltas.width,
        "expert_weights_scale": 1.0,
        "leading_dense_block_count": 0,
        "rope.scaling.type": "none",
    }
    return values | {
        "general.architecture": _NEW[:-1],
        "general.name": f"{name}, upcycled ({deltas.shared + used} of {total} experts)",
        "general.file_type": Typed(ValueType.U32, 7),  # mostly Q8_0
        **{_NEW + key: value for key, value in experts.items()},
    }


def sparse_specs(file: GGUFFile, deltas: Deltas) -> Iterator[TensorSpec]:
    """The tensors, each computed when its turn comes; changed matrices become Q8_0.

    Raises:
        ModelFileError: the deltas belong to another model.
    """
    _check(file, deltas)
    for name, tensor in file.tensors.items():
        layer, kind = _place(name)
        if kind == "output_norm":
            yield _norm(tensor, deltas.factor(kind))
        elif layer is None or kind not in (*MATRICES, "attn_norm", "ffn_norm"):
            yield TensorSpec.copy(tensor)
        elif kind in ("attn_norm", "ffn_norm"):
            yield _norm(tensor, deltas.factor(kind, layer))
        elif kind.startswith("attn"):
            yield _spec(name, tensor.shape, partial(_merged, tensor, deltas, kind, layer))
        else:
            yield from _experts(tensor, deltas, kind, layer)


def _place(name: str) -> tuple[int | None, str]:
    """Layer and kind of `blk.7.ffn_up.weight`; no layer for tensors outside of them."""
    stem = name.removesuffix(".weight")
    if not stem.startswith("blk."):
        return None, stem
    _, layer, kind = stem.split(".", 2)
    return int(layer), kind


def _check(file: GGUFFile, deltas: Deltas) -> None:
    got = tuple(
        int(file.metadata[_OLD + key])
        for key in ("block_count", "embedding_length", "feed_forward_length")
    )
    wanted = (deltas.layers, deltas.hidden, deltas.neurons)
    changes = (
        deltas.arrays[f"{n}.b"].shape[2:] + deltas.arrays[f"{n}.a"].shape[2:] for n in MATRICES
    )
    same = all(
        file.tensors[f"blk.0.{name}.weight"].shape == shape
        for name, shape in zip(MATRICES, changes, strict=True)
    )
    if got != wanted or not same:
        raise ModelFileError(
            f"{file.path.name}: these deltas are for another model: {wanted[0]} layers, hidden "
            f"size {wanted[1]}, FFN of {wanted[2]}; this one has {got[0]}, {got[1]}, {got[2]}"
        )


def _spec(name: str, shape: tuple[int, ...], values: Any) -> TensorSpec:
    return TensorSpec(name, GGMLType.Q8_0, shape, lambda: quantize(GGMLType.Q8_0, values()))


def _norm(tensor: TensorInfo, factor: Floats) -> TensorSpec:
    return TensorSpec(
        tensor.name, GGMLType.F32, tensor.shape, lambda: (tensor.dequantize() * factor).view("u1")
    )


def _merged(tensor: TensorInfo, deltas: Deltas, kind: str, layer: int) -> Floats:
    """The changed matrix, (out, in) float32, neurons in their new order."""
    dense = tensor.dequantize()
    if kind.startswith("ffn"):
        dense = np.take(dense, deltas.order(layer), axis=1 if kind == "ffn_down" else 0)
    dense = dense + deltas.change(kind, layer)
    if kind == "ffn_down":
        dense *= deltas.factor("gain", layer)
    return dense


def _experts(tensor: TensorInfo, deltas: Deltas, kind: str, layer: int) -> Iterator[TensorSpec]:
    """One dense FFN matrix as that of the shared experts and those of the routed ones."""
    hidden, cut = deltas.hidden, deltas.shared * deltas.width
    down = kind == "ffn_down"

    def shared() -> Floats:
        matrix = _merged(tensor, deltas, kind, layer)
        return matrix[:, :cut] if down else matrix[:cut]

    def routed() -> Floats:
        matrix = _merged(tensor, deltas, kind, layer)
        if not down:
            return matrix[cut:]
        experts = matrix[:, cut:].reshape(hidden, deltas.routed, deltas.width)
        return np.ascontiguousarray(experts.swapaxes(0, 1)) * np.float32(deltas.routed)

    one = (hidden, deltas.width) if down else (deltas.width, hidden)
    yield _spec(f"blk.{layer}.{kind}_exps.weight", (deltas.routed, *one), routed)
    yield _spec(
        f"blk.{layer}.{kind}_shexp.weight", (hidden, cut) if down else (cut, hidden), shared
    )
    if down:
        router = deltas.router(layer)
        yield TensorSpec(f"blk.{layer}.ffn_gate_inp.weight", GGMLType.F32, router.shape, router)
