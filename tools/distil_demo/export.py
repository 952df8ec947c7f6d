"""What is learned, as one small file; and the file applied, to measure what a user gets.

The arrays are described in `docs/demo-model.md`; `greenroom.convert.upcycle` reads them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dense import LINEAR, Dense
from partition import Layout
from student import Student
from torch import Tensor


def to_int8(values: Tensor, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """int8 codes and float32 scales, one scale per index along every dim but `dim`."""
    scale = values.abs().amax(dim, keepdim=True).clamp(min=1e-12) / 127
    codes = (values / scale).round().to(torch.int8)
    return codes.cpu().numpy(), scale.squeeze(dim).float().cpu().numpy()


def pack(student: Student, order: list[np.ndarray], notes: dict[str, Any]) -> dict[str, np.ndarray]:
    """Every array of the file, layers stacked in front."""
    layers = list(student.layers)
    stack = lambda tensors: torch.stack([t.detach() for t in tensors])  # noqa: E731
    half = lambda t: t.float().cpu().numpy().astype(np.float16)  # noqa: E731
    layout = student.layout
    out = {
        "layout": np.array([layout.shared, layout.routed, layout.width], np.int16),
        "order": np.stack(order).astype(np.int16),
        "router": half(stack([y.router * y.sharpness for y in layers])),
        "gain": half(stack([y.gain.flatten() for y in layers])),
        "attn_norm": half(stack([y.attn_norm for y in layers])),
        "ffn_norm": half(stack([y.ffn_norm for y in layers])),
        "output_norm": half(student.output_norm.detach()),
        "notes": np.frombuffer(json.dumps(notes).encode(), np.uint8),
    }
    for name in LINEAR:
        a, b = stack([y.delta[name].a for y in layers]), stack([y.delta[name].b for y in layers])
        length = a.norm(dim=2, keepdim=True).clamp(min=1e-12)  # (layers, rank, 1)
        a, b = a / length, b * length.transpose(1, 2)
        out[name + ".a"], out[name + ".a_scale"] = to_int8(a, 2)
        out[name + ".b"], out[name + ".b_scale"] = to_int8(b, 1)
    return out


def save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    partial = path.with_suffix(".partial.npz")
    np.savez_compressed(partial, **arrays)
    partial.replace(path)


def q8_0(weight: Tensor) -> Tensor:
    """weight (out, in) rounded as Q8_0 stores it, in float32."""
    blocks = weight.float().unflatten(-1, (-1, 32))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(scale > 0, blocks / scale, 0.0).round()
    return (codes * scale.half().float()).flatten(-2)


@torch.no_grad()
def apply(dense: Dense, arrays: dict[str, np.ndarray]) -> Student:
    """The student as its file will be: merged weights in Q8_0; changes `dense` in place.

    dense must be in its original neuron order.
    """
    layout = Layout(*map(int, arrays["layout"]))
    dense.permute_neurons(list(arrays["order"]))
    put = lambda array: torch.from_numpy(array.astype(np.float32)).to(dense.device)  # noqa: E731
    for layer in range(dense.shape.layers):
        for name in LINEAR:
            a = put(arrays[name + ".a"][layer]) * put(arrays[name + ".a_scale"][layer])[:, None]
            b = put(arrays[name + ".b"][layer]) * put(arrays[name + ".b_scale"][layer])
            merged = dense.weight(layer, name).float() + b @ a
            if name == "ffn_down":
                merged = merged * put(arrays["gain"][layer])
            key = f"blk.{layer}.{name}.weight"
            dense.weights[key] = q8_0(merged).to(dense.dtype)
        for name in ("attn_norm", "ffn_norm"):
            dense.weights[f"blk.{layer}.{name}.weight"] *= put(arrays[name][layer])
    dense.weights["output_norm.weight"] *= put(arrays["output_norm"])
    student = Student(dense, layout, dict.fromkeys(LINEAR, 1))
    for layer, row in zip(student.layers, arrays["router"], strict=True):
        layer.router.copy_(put(row))
        layer.sharpness.fill_(1.0)
    return student
