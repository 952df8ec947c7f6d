"""The dense model in plain torch: reads the GGUF, runs layers, gives hidden states.

Knows tensor names and the two block formats of the demo model's file (Q4_1, Q8_0). It does not
know about experts: `student.py` adds those on top of the same frozen weights.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SCALAR = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
F32, Q4_1, Q8_0 = 0, 3, 8
BLOCK_BYTES = {F32: 4, Q4_1: 20, Q8_0: 34}
BLOCK_SIZE = {F32: 1, Q4_1: 32, Q8_0: 32}
LINEAR = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


class _Cursor:
    def __init__(self, buffer: memoryview) -> None:
        self.buffer, self.at = buffer, 0

    def scalar(self, code: str) -> Any:
        value = struct.unpack_from("<" + code, self.buffer, self.at)[0]
        self.at += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        size = self.scalar("Q")
        self.at += size
        return bytes(self.buffer[self.at - size : self.at]).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == 8:
            return self.string()
        if kind == 9:
            inner, count = self.scalar("I"), self.scalar("Q")
            return [self.value(inner) for _ in range(count)]
        return self.scalar(SCALAR[kind])


def dequantize(kind: int, raw: np.ndarray) -> np.ndarray:
    """raw (blocks, block bytes) uint8 -> (blocks, block size) float32."""
    if kind == F32:
        return raw.view(np.float32)
    if kind == Q8_0:
        return raw[:, 2:].view(np.int8).astype(np.float32) * raw[:, :2].copy().view(np.float16)
    scale = raw[:, 0:2].copy().view(np.float16).astype(np.float32)
    low = raw[:, 2:4].copy().view(np.float16).astype(np.float32)
    codes = np.concatenate([raw[:, 4:] & 15, raw[:, 4:] >> 4], axis=1)
    return codes.astype(np.float32) * scale + low


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Metadata and every tensor as float32 in numpy order (out, in)."""
    buffer = memoryview(path.read_bytes())
    cursor = _Cursor(buffer)
    if cursor.scalar("I") != 0x46554747:
        raise SystemExit(f"{path}: not a GGUF file")
    cursor.scalar("I")
    tensors, pairs = cursor.scalar("Q"), cursor.scalar("Q")
    metadata = {}
    for _ in range(pairs):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.scalar("I"))
    infos = []
    for _ in range(tensors):
        name = cursor.string()
        ne = [cursor.scalar("Q") for _ in range(cursor.scalar("I"))]
        infos.append((name, ne, cursor.scalar("I"), cursor.scalar("Q")))
    alignment = metadata.get("general.alignment", 32)
    base = -(-cursor.at // alignment) * alignment
    out = {}
    for name, ne, kind, offset in infos:
        blocks = int(np.prod(ne)) // BLOCK_SIZE[kind]
        raw = np.frombuffer(buffer, np.uint8, blocks * BLOCK_BYTES[kind], base + offset)
        out[name] = dequantize(kind, raw.reshape(blocks, -1)).reshape(ne[::-1])
    return metadata, out


@dataclass(frozen=True)
class Shape:
    """Sizes of the dense model; all counts, `base` is the RoPE base."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    base: float
    eps: float

    @staticmethod
    def from_metadata(metadata: dict[str, Any]) -> Shape:
        get = lambda key: metadata["llama." + key]  # noqa: E731
        heads = get("attention.head_count")
        return Shape(
            layers=get("block_count"),
            hidden=get("embedding_length"),
            ffn=get("feed_forward_length"),
            heads=heads,
            kv_heads=get("attention.head_count_kv"),
            head_dim=get("embedding_length") // heads,
            base=get("rope.freq_base"),
            eps=get("attention.layer_norm_rms_epsilon"),
        )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., d) float32 -> (..., d) float32."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


class Dense:
    """The frozen weights on one device and the pieces of its forward pass.

    Linear weights are kept in `dtype`; norms, residual stream and RoPE tables in float32.
    """

    def __init__(self, path: Path, device: torch.device, dtype: torch.dtype) -> None:
        metadata, tensors = read_gguf(path)
        self.shape = Shape.from_metadata(metadata)
        self.device, self.dtype = device, dtype
        self.weights: dict[str, Tensor] = {}
        for name, array in tensors.items():
            kind = torch.float32 if array.ndim == 1 else dtype
            self.weights[name] = torch.tensor(array, device=device).to(kind)
        self.embedding = self.weights["token_embd.weight"]
        self.set_context(2048)

    def set_context(self, length: int) -> None:
        """RoPE tables cos, sin (length, head_dim / 2) float32."""
        half = self.shape.head_dim // 2
        power = torch.arange(half, dtype=torch.float64) / half
        angle = torch.arange(length, dtype=torch.float64)[:, None] * self.shape.base**-power
        self.cos = angle.cos().float().to(self.device)
        self.sin = angle.sin().float().to(self.device)

    def weight(self, layer: int, name: str) -> Tensor:
        return self.weights[f"blk.{layer}.{name}.weight"]

    def permute_neurons(self, order: list[np.ndarray]) -> None:
        """Reorder the FFN's neurons of every layer; the model's function stays the same."""
        for layer, indices in enumerate(order):
            index = torch.tensor(indices.astype(np.int64), device=self.device)
            for name, dim in (("ffn_gate", 0), ("ffn_up", 0), ("ffn_down", 1)):
                key = f"blk.{layer}.{name}.weight"
                self.weights[key] = self.weights[key].index_select(dim, index).contiguous()

    def block(self, layer: int) -> dict[str, Tensor]:
        """The layer's tensors by their short names."""
        return {n: self.weight(layer, n) for n in (*LINEAR, "attn_norm", "ffn_norm")}

    @torch.no_grad()
    def forward(
        self,
        tokens: Tensor,
        keep: list[Tensor] | None = None,
        probe: Any = None,
        run: Any = None,
    ) -> Tensor:
        """tokens (batch, tokens) -> final-norm hidden states (batch, tokens, d) in `dtype`.

        keep collects the residual stream after every layer (in `dtype`); probe(layer, x, h)
        sees the FFN's normed input (batch, tokens, d) and activations (batch, tokens, ffn);
        run is `dense_layer` or a compiled one.
        """
        stream = F.embedding(tokens, self.embedding).float()
        for layer in range(self.shape.layers):
            w = self.block(layer)
            stream, x, h = (run or dense_layer)(stream, w, self.cos, self.sin, self.shape)
            if probe is not None:
                probe(layer, x, h)
            if keep is not None:
                keep.append(stream.to(self.dtype))
        final = rms_norm(stream, self.weights["output_norm.weight"], self.shape.eps)
        return final.to(self.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, start: int = 0) -> Tensor:
    """x (batch, heads, tokens, head_dim), adjacent pairs turned by their position."""
    tokens = x.shape[2]
    cos, sin = cos[start : start + tokens], sin[start : start + tokens]
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    pair = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return pair.flatten(-2).to(x.dtype)


def attend(x: Tensor, w: dict[str, Tensor], cos: Tensor, sin: Tensor, shape: Shape) -> Tensor:
    """Causal attention of x (batch, tokens, d) with the matrices of w -> the same shape."""
    dim, group = shape.head_dim, shape.heads // shape.kv_heads
    q, k, v = (
        F.linear(x, w[n]).unflatten(-1, (-1, dim)).transpose(1, 2)
        for n in ("attn_q", "attn_k", "attn_v")
    )
    k, v = rotate(k, cos, sin).repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    out = F.scaled_dot_product_attention(rotate(q, cos, sin), k, v, is_causal=True)
    return F.linear(out.transpose(1, 2).flatten(-2), w["attn_output"])


def dense_layer(
    stream: Tensor, w: dict[str, Tensor], cos: Tensor, sin: Tensor, shape: Shape
) -> tuple[Tensor, Tensor, Tensor]:
    """stream (batch, tokens, d) float32 -> stream, the FFN's input and its activations."""
    dtype = w["attn_q"].dtype
    x = rms_norm(stream, w["attn_norm"], shape.eps).to(dtype)
    stream = stream + attend(x, w, cos, sin, shape)
    x = rms_norm(stream, w["ffn_norm"], shape.eps).to(dtype)
    h = F.silu(F.linear(x, w["ffn_gate"])) * F.linear(x, w["ffn_up"])
    return stream + F.linear(h, w["ffn_down"]), x, h


@torch.no_grad()
def cross_entropy(hidden: Tensor, targets: Tensor, embedding: Tensor, chunk: int = 4096) -> float:
    """Sum of -log p over targets (tokens,) from hidden (tokens, d); natural logarithm."""
    total = 0.0
    for at in range(0, hidden.shape[0], chunk):
        logits = F.linear(hidden[at : at + chunk], embedding).float()
        total += F.cross_entropy(logits, targets[at : at + chunk], reduction="sum").item()
    return total
