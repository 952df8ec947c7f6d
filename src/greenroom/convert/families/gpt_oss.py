"""gpt-oss in HF's layout: MXFP4 blocks or plain numbers, gate and up rows interleaved."""

from typing import Any

import numpy as np

from greenroom.convert.families.base import Family, Tensors
from greenroom.convert.values import Bytes, Values
from greenroom.gguf import GGMLType, repack_pairs

LIMIT, ALPHA = 7.0, 1.702  # constants of the model's definition; a GGUF does not carry them


class GptOss(Family):
    """Every layer has experts, all with biases."""

    architecture = "gpt-oss"
    ffn_norm = "post_attention_norm"

    def moe_metadata(self) -> dict[str, Any]:
        """The experts' width is intermediate_size."""
        config = self.config
        config.require("swiglu_limit", LIMIT)
        config.require("swiglu_alpha", ALPHA)
        return {
            "expert_count": config.count("num_local_experts", "num_experts"),
            "expert_used_count": config.count("num_experts_per_tok", "experts_per_token"),
            "expert_feed_forward_length": config.count("intermediate_size"),
        }

    def windows(self) -> dict[str, Any]:
        """Every second layer slides, beginning with the first, unless the config says else."""
        keys = super().windows()
        pattern = keys.get("attention.sliding_window_pattern")
        if pattern == [layer % 2 == 0 for layer in range(len(pattern or ()))]:
            del keys["attention.sliding_window_pattern"]
        return keys

    def attention(self, layer: int) -> Tensors:
        """The sinks are one number per head."""
        yield from super().attention(layer)
        yield f"blk.{layer}.attn_sinks.weight", self.take(f"model.layers.{layer}.self_attn.sinks")

    def feed_forward(self, layer: int) -> Tensors:
        """Router and experts."""
        old = f"model.layers.{layer}.mlp"
        names = f"{old}.experts.gate_up_proj", f"{old}.experts.down_proj"
        yield from self.routed(f"blk.{layer}.ffn", f"{old}.router", *names)

    def routed(self, new: str, router: str, gate_up: str, down: str) -> Tensors:
        """Router and experts of a layer from tensors of these names, biases among them."""
        yield from self.copy(f"{new}_gate_inp", router)
        bias = self.take(f"{gate_up}_bias")
        yield from self.interleaved(new, self.matrix(gate_up), bias)
        yield f"{new}_down_exps.weight", self.matrix(down)
        yield f"{new}_down_exps.bias", self.take(f"{down}_bias")

    def matrix(self, name: str) -> Values:
        """An expert matrix (experts, out, in): blocks, or numbers stored as (experts, in, out)."""
        if f"{name}_blocks" not in self.checkpoint:
            return self.take(name).transposed()
        return self.blocks(f"{name}_blocks", f"{name}_scales")

    def blocks(self, blocks: str, scales: str) -> Values:
        """MXFP4: blocks (experts, out, n, 16) and scales (experts, out, n), both uint8."""
        self.taken |= {blocks, scales}
        experts, rows, count, _ = self.checkpoint.entry(blocks).shape
        self.checkpoint.entry(scales)

        def load(start: int, stop: int) -> Bytes:
            scale = self.checkpoint.array(scales)[start:stop, ..., None]
            codes = self.checkpoint.array(blocks)[start:stop]
            joined = np.concatenate([scale, codes], axis=-1)
            return repack_pairs(joined.reshape(stop - start, rows, count * 17))

        shape = (experts, rows, count * 32)
        return Values(shape, load, GGMLType.MXFP4, GGMLType.MXFP4)

    def interleaved(self, new: str, gate_up: Values, bias: Values) -> Tensors:
        """Even rows are gate, odd rows up."""
        for start, part in enumerate(("gate", "up")):
            yield f"{new}_{part}_exps.weight", every_second(gate_up, start)
            yield f"{new}_{part}_exps.bias", bias.rows(start, step=2)


def every_second(values: Values, start: int) -> Values:
    """Rows start, start + 2, ... of every expert, of numbers or of blocks."""
    if values.encoded is None:
        return values.rows(start, step=2)
    shape = (values.shape[0], values.shape[1] // 2, *values.shape[2:])

    def load(first: int, last: int) -> Bytes:
        return np.ascontiguousarray(values.load(first, last)[:, start::2], np.uint8)

    return Values(shape, load, values.source, values.encoded)
