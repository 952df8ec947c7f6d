"""Text the dense model writes itself: many sequences at once with a plain KV cache.

Three kinds of beginnings: chat prompts, an empty chat turn (the model makes up the request too)
and the first words of real text.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from dense import Dense, rms_norm, rotate
from torch import Tensor

PAD = 65535


class Writer:
    """write(starts (batch, longest) int64 padded with PAD) -> (batch, length) tokens."""

    def __init__(self, dense: Dense, batch: int, length: int) -> None:
        shape = dense.shape
        self.dense, self.length = dense, length
        size = (shape.layers, batch, shape.kv_heads, length, shape.head_dim)
        self.keys = torch.zeros(size, dtype=dense.dtype, device=dense.device)
        self.values = torch.zeros_like(self.keys)

    def step(self, tokens: Tensor, at: int) -> Tensor:
        """tokens (batch,) at position `at` -> logits (batch, vocabulary) float32."""
        d, shape = self.dense, self.dense.shape
        stream = F.embedding(tokens, d.embedding).float()
        split = lambda x: x.unflatten(-1, (-1, shape.head_dim))[:, :, None]  # noqa: E731
        turn = lambda x: rotate(x, d.cos, d.sin, at)  # noqa: E731
        for layer in range(shape.layers):
            w = lambda name, layer=layer: d.weight(layer, name)  # noqa: E731
            x = rms_norm(stream, w("attn_norm"), shape.eps).to(d.dtype)
            q = turn(split(F.linear(x, w("attn_q"))))[:, :, 0]
            self.keys[layer, :, :, at] = turn(split(F.linear(x, w("attn_k"))))[:, :, 0]
            self.values[layer, :, :, at] = split(F.linear(x, w("attn_v")))[:, :, 0]
            keys, values = self.keys[layer, :, :, : at + 1], self.values[layer, :, :, : at + 1]
            grouped = q.unflatten(1, (shape.kv_heads, -1))  # (batch, kv heads, group, head_dim)
            scores = grouped @ keys.transpose(-1, -2) * shape.head_dim**-0.5
            mixed = scores.float().softmax(-1).to(d.dtype) @ values
            stream = stream + F.linear(mixed.flatten(1), w("attn_output"))
            x = rms_norm(stream, w("ffn_norm"), shape.eps).to(d.dtype)
            h = F.silu(F.linear(x, w("ffn_gate"))) * F.linear(x, w("ffn_up"))
            stream = stream + F.linear(h, w("ffn_down"))
        final = rms_norm(stream, d.weights["output_norm.weight"], shape.eps)
        return F.linear(final.to(d.dtype), d.embedding).float()

    @torch.no_grad()
    def write(self, starts: Tensor, temperature: float = 0.9, min_p: float = 0.02) -> Tensor:
        out = torch.empty((starts.shape[0], self.length), dtype=torch.int64, device=starts.device)
        current = starts[:, 0]
        for at in range(self.length):
            if at and at < starts.shape[1]:
                current = torch.where(starts[:, at] == PAD, current, starts[:, at])
            out[:, at] = current
            p = (self.step(current, at) / temperature).softmax(-1)
            p = torch.where(p >= min_p * p.amax(-1, keepdim=True), p, 0.0)
            current = torch.multinomial(p, 1)[:, 0]
        return out


def beginnings(prompts: np.ndarray, texts: list[np.ndarray], batch: int, seed: int) -> np.ndarray:
    """batch x longest prompt, int64: a third prompts, a few empty chats, the rest real text."""
    rng = np.random.default_rng(seed)
    out = np.full((batch, prompts.shape[1]), PAD, np.int64)
    for row in range(batch):
        kind = rng.random()
        if kind < 0.4:  # row 0 of prompts is the empty chat turn
            index = 0 if kind < 0.08 else rng.integers(1, len(prompts))
            out[row] = prompts[index]
        else:
            text = texts[rng.integers(len(texts))]
            start = rng.integers(0, len(text) - 32)
            out[row, :32] = text[start : start + 32]
    return out
