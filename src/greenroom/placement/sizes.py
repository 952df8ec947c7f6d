"""Bytes of a model's parts before anything of it is loaded: each layer's dense tensors, the
head, one expert, keys and values, what a step computes. Knows a file's tensors; decides nothing.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from greenroom import native
from greenroom.experts.slabs import SlabLayout, stored_type
from greenroom.gguf import GGMLType, TensorInfo
from greenroom.models.config import ModelConfig

# The allocator hands out pieces of 2 to 20 MiB, and the vendor's products take 32 MiB for
# themselves on Hopper.
ROUNDING = 96 << 20

# Tensors above 10 MiB get whole pieces of 2 MiB each, half of one wasted on average: two
# matrices of a layer, its keys and its values.
LAYER_ROUNDING = 2 << 20

_EXPERTS = re.compile(r"_exps\.|\.ffn_(gate|up|down)\.\d+\.")
_FLOAT32 = re.compile(r"ffn_gate_inp(_shexp)?\.weight$")  # routers are kept in float32
_NOT_PLACED = re.compile(r"^token_embd\.|^rope_f|attn_rot_embd|rotary_emb|attn\.masked_bias")
_LAYER = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Sizes:
    """A model's parts, in bytes.

    Attributes:
        layers: dense tensors of each layer, shared experts and router included.
        head: the head and the norm before it.
        embedding: the table, as the file has it.
        slab: the largest expert; 0 for a dense model.
        expanded: two matrices of an expert in half precision.
        experts: all routed experts together.
        expert_count: how many those are, over all layers.
    """

    layers: tuple[int, ...]
    head: int
    embedding: int
    slab: int
    expanded: int
    experts: int
    expert_count: int

    @staticmethod
    def of(tensors: Mapping[str, TensorInfo], config: ModelConfig) -> "Sizes":
        """Reads them off a file's tensors, as the backends will keep them."""
        layers, head = [0] * config.layers, 0
        for name, tensor in tensors.items():
            if _EXPERTS.search(name) or _NOT_PLACED.search(name):
                continue
            match = _LAYER.match(name)
            if match is None:
                head += placed_bytes(name, tensor)
            elif int(match[1]) < len(layers):  # the loader complains of the others
                layers[int(match[1])] += placed_bytes(name, tensor)
        table = tensors["token_embd.weight"]
        if "output.weight" not in tensors:  # the head is the embedding's twin
            head += placed_bytes("output.weight", table)
        slabs = slab_bytes(tensors, config)
        experts = 0 if config.moe is None else config.moe.experts
        return Sizes(
            layers=tuple(layers),
            head=head,
            embedding=table.nbytes,
            slab=max(slabs, default=0),
            expanded=4 * config.hidden_size * config.moe.width if config.moe else 0,
            experts=sum(slabs) * experts,
            expert_count=len(slabs) * experts,
        )


def placed_bytes(name: str, tensor: TensorInfo) -> int:
    """Bytes of one dense tensor as the cuda backend keeps it."""
    shape = tensor.shape
    if len(shape) < 2 or _FLOAT32.search(name):
        return 4 * prod(shape)
    rows, cols = shape
    kept = stored_type(tensor.type, cols)
    if kept in (GGMLType.F32, GGMLType.F16, GGMLType.BF16):
        return rows * cols * kept.block_bytes
    return int(native.lib().packed_bytes(int(kept), rows, cols))


def slab_bytes(tensors: Mapping[str, TensorInfo], config: ModelConfig) -> list[int]:
    """Bytes of one expert of each layer that has experts."""
    moe, found = config.moe, []
    for layer in range(config.layers if moe is not None else 0):
        assert moe is not None
        names = [_expert_name(tensors, layer, part) for part in ("gate", "up", "down")]
        if None in names:
            continue
        types = [
            stored_type(tensors[name].type, cols)
            for name, cols in zip(names, (config.hidden_size,) * 2 + (moe.width,), strict=True)
            if name is not None
        ]
        biases = any(f"blk.{layer}.ffn_{p}_exps.bias" in tensors for p in ("gate", "gate_up"))
        layout = SlabLayout.plan(
            (types[0], types[1], types[2]), config.hidden_size, moe.width, biases
        )
        found.append(layout.nbytes)
    return found


def _expert_name(tensors: Mapping[str, TensorInfo], layer: int, part: str) -> str | None:
    """The tensor that has a part of a layer's experts, stacked, fused or one by one."""
    names = [f"blk.{layer}.ffn_{part}_exps.weight", f"blk.{layer}.ffn_{part}.0.weight"]
    if part != "down":
        names.append(f"blk.{layer}.ffn_gate_up_exps.weight")
    return next((name for name in names if name in tensors), None)


def token_bytes(config: ModelConfig) -> int:
    """Bytes a step computes per token, at most, the logits apart."""
    shape = config.attention
    attention = (shape.heads + 2 * shape.kv_heads) * max(shape.key_length, shape.value_length)
    moe = config.moe
    inner = max(config.feed_forward_length, moe.shared_width if moe else 0)
    # Residual, its norm and a sum; projections, their contiguous copies and the attention's
    # output; gate and up, their copies and product.
    width = 4 * config.hidden_size + 3 * attention + 5 * inner
    if moe is not None:
        # Rows in half precision and the sum, routes sorted by expert, and of the rows of one
        # expert their copy, gate and up, their product and the output: see `experts.stream`.
        return 4 * width + 12 * (config.hidden_size + moe.width + 4 * moe.used)
    return 4 * width


def logit_bytes(config: ModelConfig, sequences: int) -> int:
    """Bytes of a step's logits and one copy."""
    return 8 * sequences * config.vocabulary_size


@dataclass(frozen=True, slots=True)
class CacheShape:
    """How the KV cache is cut.

    Attributes:
        block_size: tokens of a block.
        sequences: that run at the same time.
        value_bytes: of one key or value element, 2 or 4.
    """

    block_size: int
    sequences: int
    value_bytes: int

    def window_blocks(self, window: int, chunk: int) -> int:
        """Blocks of a window group: every sequence's window and what it adds until old blocks are
        let go, as much again for reusable prefixes, and one step's chunk, which all share."""
        held = -(-(window + min(chunk, 256)) // self.block_size) + 1
        return 2 * self.sequences * held + -(-chunk // self.block_size)

    def blocks(self, window: int | None, tokens: int, chunk: int) -> int:
        """Blocks of a group when the cache holds so many tokens."""
        full = -(-tokens // self.block_size)
        return full if window is None else min(full, self.window_blocks(window, chunk))

    def layer(self, config: ModelConfig, layer: int, tokens: int, chunk: int) -> int:
        """Bytes of one layer's keys and values."""
        shape = config.attention
        block = self.block_size * shape.kv_heads * (shape.key_length + shape.value_length)
        count = self.blocks(config.windows[layer], tokens, chunk)
        return count * block * self.value_bytes
