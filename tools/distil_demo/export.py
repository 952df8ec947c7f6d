"""What is learned, as one small file; and the file applied, to measure what a user gets.

The arrays are described in `docs/demo-model.md`; `greenroom.convert.upcycle` reads them.
"""

from __future__ import annotations

import io
import json
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dense import LINEAR, Dense
from partition import Layout
from student import LowRank, Student
from torch import Tensor

MOST_BYTES = 4_900_000  # of the whole file; the aim is 5 MB
ROUTER_STEPS = 16.0  # of a router row's root mean square: 6 bits a number


def spectrum(delta: LowRank) -> tuple[Tensor, Tensor, Tensor]:
    """B A as U diag(S) V: (out, rank) and (rank, in) orthonormal, S falling."""
    q_b, r_b = torch.linalg.qr(delta.b.detach().double())
    q_a, r_a = torch.linalg.qr(delta.a.detach().double().T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T)
    return q_b @ u, s, v @ q_a.T


def to_codes(unit: Tensor, strength: Tensor) -> tuple[Tensor, Tensor]:
    """unit (rank, n) of unit rows; codes int8 of root mean square `strength`, and their scale."""
    wanted = unit * unit.shape[1] ** 0.5 * strength[:, None]
    scale = (wanted.abs().amax(1) / 127).clamp(min=1.0)
    codes = (wanted / scale[:, None]).round()
    return codes.to(torch.int8), scale / (unit.shape[1] ** 0.5 * strength)


def coarse(
    parts: list[tuple[Tensor, Tensor, Tensor]], norms: list[float], noise: float
) -> dict[str, Tensor]:
    """Codes of one matrix of every layer, coarse enough to compress.

    A direction of strength S gets codes of root mean square S / (noise |W|) on both sides, so
    that each direction's rounding adds the same error, in proportion to the matrix; weak
    directions need few bits and those below half a step are dropped (zeros).
    """
    out: dict[str, list[Tensor]] = {key: [] for key in ("a", "a_scale", "b", "b_scale")}
    for (u, s, v), norm in zip(parts, norms, strict=True):
        strength = s / (noise * norm)
        keep = strength > 0.5
        strength = strength.clamp(min=0.5)
        for key, unit in (("a", v), ("b", u.T)):
            codes, scale = to_codes(unit, strength)
            codes[~keep] = 0
            out[key].append(codes)
            out[key + "_scale"].append(torch.where(keep, scale * s.sqrt(), 0.0).float())
    return {key: torch.stack(values) for key, values in out.items()}


def compressed(arrays: list[np.ndarray]) -> int:
    """Bytes of the arrays in the file."""
    with ThreadPoolExecutor() as pool:
        return sum(pool.map(lambda array: len(zlib.compress(array.tobytes(), 6)), arrays))


def deltas(student: Student, dense: Dense, room: float) -> dict[str, np.ndarray]:
    """All matrices' codes at the finest rounding that fits into `room` bytes."""
    layers = list(student.layers)
    parts = {n: [spectrum(y.delta[n]) for y in layers] for n in LINEAR}
    norms = {
        n: [dense.weight(i, n).float().norm().item() for i in range(len(layers))] for n in LINEAR
    }
    low, high = 1e-4, 0.1
    for _ in range(9):
        noise = (low * high) ** 0.5
        coded = {n: coarse(parts[n], norms[n], noise) for n in LINEAR}
        size = compressed([c[side].cpu().numpy() for c in coded.values() for side in "ab"])
        low, high = (low, noise) if size < room else (noise, high)
    coded = {n: coarse(parts[n], norms[n], high) for n in LINEAR}
    return {f"{n}.{key}": t.cpu().numpy() for n, c in coded.items() for key, t in c.items()}


def pack(student: Student, order: list[np.ndarray], notes: dict[str, Any]) -> dict[str, np.ndarray]:
    """Every array of the file, layers stacked in front."""
    layers = list(student.layers)
    stack = lambda tensors: torch.stack([t.detach() for t in tensors])  # noqa: E731
    half = lambda t: t.float().cpu().numpy().astype(np.float16)  # noqa: E731
    layout = student.layout
    router = stack([y.router * y.sharpness for y in layers])
    step = router.square().mean(2).sqrt() / ROUTER_STEPS
    step = torch.maximum(step, router.abs().amax(2) / 127).clamp(min=1e-12)
    codes = (router / step[..., None]).round().to(torch.int8)
    out = {
        "layout": np.array([layout.shared, layout.routed, layout.width], np.int16),
        "order": np.stack(order).astype(np.int16),
        "router": codes.cpu().numpy(),
        "router_scale": step.float().cpu().numpy(),
        "gain": half(stack([y.gain for y in layers])),
        "attn_norm": half(stack([y.attn_norm for y in layers])),
        "ffn_norm": half(stack([y.ffn_norm for y in layers])),
        "output_norm": half(student.output_norm.detach()),
        "notes": np.frombuffer(json.dumps(notes).encode(), np.uint8),
    }
    packed = io.BytesIO()
    np.savez_compressed(packed, **out)
    return out | deltas(student, student.dense, MOST_BYTES - packed.tell() - 20_000)


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
            b = put(arrays[name + ".b"][layer]) * put(arrays[name + ".b_scale"][layer])[:, None]
            merged = dense.weight(layer, name).float() + b.T @ a
            if name == "ffn_down":
                merged = merged * put(arrays["gain"][layer])
            key = f"blk.{layer}.{name}.weight"
            dense.weights[key] = q8_0(merged).to(dense.dtype)
        for name in ("attn_norm", "ffn_norm"):
            dense.weights[f"blk.{layer}.{name}.weight"] *= put(arrays[name][layer])
    dense.weights["output_norm.weight"] *= put(arrays["output_norm"])
    student = Student(dense, layout, dict.fromkeys(LINEAR, 1))
    rows = arrays["router"] * arrays["router_scale"][..., None]
    for layer, row in zip(student.layers, rows, strict=True):
        layer.router.copy_(put(row))
        layer.sharpness.fill_(1.0)
    return student
