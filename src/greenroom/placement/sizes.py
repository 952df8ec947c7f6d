"""Bytes of a model's parts before anything of it is loaded: each layer's dense tensors, the
head, one expert, keys and values, what a step computes. Knows a file's tensors; decides nothing.
"""

import itertools
import re
from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from greenroom import native
from greenroom.experts.limits import BESIDE_STAGED, EXPERT_ROWS
from greenroom.experts.slabs import SlabLayout, stored_type
from greenroom.gguf import GGMLType, TensorInfo
from greenroom.models.config import ModelConfig

# The allocator hands out pieces of 2 and 20 MiB, of which one each is partly used; the vendor's
# products take 32 MiB for themselves on Hopper; attention spread over programs writes up to 9 MiB.
ALLOCATOR = 64 << 20

# What is freed within a step leaves gaps. Steps of 8192 tokens, with room to spare, were seen to
# take 1.85 times what lives at once; where there is none, the allocator gives back what is unused.
GAPS = 1.5

KEPT_GRAPHS, GRAPH_SEQUENCES = 8, 32  # as `layers.decode_graphs` has them
GRAPH_RANGES = (512, 4)  # its first range of contexts, and the factor to the next

_MIB = 1 << 20
_EXPERTS = re.compile(r"_exps\.|\.ffn_(gate|up|down)\.\d+\.")
_FLOAT32 = re.compile(r"ffn_gate_inp(_shexp)?\.weight$")  # routers are kept in float32
_NOT_PLACED = re.compile(r"^token_embd\.|^rope_f|attn_rot_embd|rotary_emb|attn\.masked_bias")
_LAYER = re.compile(r"blk\.(\d+)\.")
_JOINED = re.compile(r"(?:attn_[qkv]|ffn_(?:gate|up)(_shexp)?)\.(weight|bias)$")  # if of one type


@dataclass(frozen=True, slots=True)
class Sizes:
    """A model's parts, in bytes.

    Attributes:
        layers: dense tensors of each layer, shared experts and router included.
        head: the head and the norm before it.
        tensors: the dense tensors one by one, of each layer, and of the head as the last.
        embedding: the table, as the file has it.
        slab: the largest expert of layers that may leave the RAM; 0 if there are none.
        staged: beside staged experts: two matrices of one in half precision, and a table.
        experts: all routed experts together.
        expert_count: how many of them may leave the RAM, over all layers.
    """

    layers: tuple[int, ...]
    head: int
    tensors: tuple[tuple[int, ...], ...]
    embedding: int
    slab: int
    staged: int
    experts: int
    expert_count: int

    @staticmethod
    def of(tensors: Mapping[str, TensorInfo], config: ModelConfig) -> "Sizes":
        """Reads them off a file's tensors, as the backends will keep them."""
        parts: list[list[int]] = [[] for _ in range(config.layers + 1)]
        joined: dict[tuple[int, str | None, str, bool, int], int] = {}
        for name, tensor in tensors.items():
            if _EXPERTS.search(name) or _NOT_PLACED.search(name):
                continue
            match = _LAYER.match(name)
            layer = config.layers if match is None else int(match[1])
            if layer > config.layers:  # the loader complains of it
                continue
            nbytes = placed_bytes(name, tensor)
            if (several := _JOINED.search(name)) is not None:
                key = layer, several[1], several[2], ".attn" in name, int(tensor.type)
                joined[key] = joined.get(key, 0) + nbytes
            else:
                parts[layer].append(nbytes)
        for key, nbytes in joined.items():
            parts[key[0]].append(nbytes)
        table = tensors["token_embd.weight"]
        if "output.weight" not in tensors:  # the head is the embedding's twin
            parts[-1].append(placed_bytes("output.weight", table))
        slabs = slab_bytes(tensors, config)
        experts = 0 if config.moe is None else config.moe.experts
        return Sizes(
            layers=tuple(sum(part) for part in parts[:-1]),
            head=sum(parts[-1]),
            tensors=tuple(tuple(part) for part in parts),
            embedding=table.nbytes,
            slab=max(slabs, default=0),
            staged=4 * config.hidden_size * config.moe.width + BESIDE_STAGED * experts
            if config.moe
            else 0,
            experts=sum(slabs) * experts + mixed_bytes(tensors, config),
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
    """Bytes of one expert of each layer whose experts are all of one type."""
    found = []
    for layer in range(config.layers if config.moe is not None else 0):
        names = [_expert_name(tensors, layer, part) for part in ("gate", "up", "down")]
        infos = [tensors[name] for name in names if name is not None]
        if len(infos) == len(names):
            found.append(_slab(tensors, config, layer, infos))
    return found


def mixed_bytes(tensors: Mapping[str, TensorInfo], config: ModelConfig) -> int:
    """Bytes of all experts of the layers that have them in several types (mixed precision)."""
    total = 0
    for layer in range(config.layers if config.moe is not None else 0):
        for kind in itertools.count():
            names = [f"blk.{layer}.ffn_{p}_exps.c{kind}.weight" for p in ("gate", "up", "down")]
            if not all(name in tensors for name in names):
                break
            infos = [tensors[name] for name in names]
            total += infos[0].shape[0] * _slab(tensors, config, layer, infos)
    return total


def _slab(
    tensors: Mapping[str, TensorInfo], config: ModelConfig, layer: int, infos: list[TensorInfo]
) -> int:
    """Bytes of an expert whose gate, up and down are of the types of these tensors."""
    assert config.moe is not None
    hidden, width = config.hidden_size, config.moe.width
    gate, up, down = (
        stored_type(info.type, cols)
        for info, cols in zip(infos, (hidden, hidden, width), strict=True)
    )
    biases = any(f"blk.{layer}.ffn_{p}_exps.bias" in tensors for p in ("gate", "gate_up"))
    return SlabLayout.plan((gate, up, down), hidden, width, biases).nbytes


def _expert_name(tensors: Mapping[str, TensorInfo], layer: int, part: str) -> str | None:
    """The tensor that has a part of a layer's experts, stacked, fused or one by one."""
    names = [f"blk.{layer}.ffn_{part}_exps.weight", f"blk.{layer}.ffn_{part}.0.weight"]
    if part != "down":
        names.append(f"blk.{layer}.ffn_gate_up_exps.weight")
    return next((name for name in names if name in tensors), None)


def step_bytes(config: ModelConfig, tokens: int) -> int:
    """Bytes a step computes, at most, the logits apart."""
    shape, moe, d = config.attention, config.moe, config.hidden_size
    queries, attended = shape.heads * shape.key_length, shape.heads * shape.value_length
    projected = queries + shape.kv_heads * (shape.key_length + shape.value_length)
    # Residual and what is added to it; the norm of their sum and projections, then these, copies
    # for a norm of their own or a bound, and what attention gives.
    copies = projected if shape.normed or shape.clamp is not None else 0
    widest = 2 * d + max(d + projected, projected + copies + attended, 2 * d + attended)
    if moe is None or moe.dense_layers:  # gate and up, and copies or activations of them
        widest = max(widest, 4 * d + 4 * config.feed_forward_length)
    if moe is None:
        return 4 * widest * tokens
    # The sum, the router's values, routes sorted by expert; rows in half precision, and of the
    # rows of a group gate and up beside their product, or that and the output: see
    # `experts.stream`.
    routed = 4 * d + 4 * moe.experts + 16 * moe.used
    widest = max(widest, routed + 4 * moe.shared_width, routed + d // 2)
    rows = min(tokens, EXPERT_ROWS) * max(5 * moe.width // 2, d + moe.width // 2)
    return 4 * max(widest * tokens, (routed + d // 2) * tokens + rows)


def logit_bytes(config: ModelConfig, sequences: int) -> int:
    """Bytes of a step's logits and one copy."""
    return 8 * sequences * config.vocabulary_size


def graph_bytes(config: ModelConfig, sequences: int, context: int) -> int:
    """Bytes of the memory of recorded decode steps: each keeps its logits, all share the rest.

    Args:
        config: of the model.
        sequences: most of one step.
        context: most tokens of a sequence.
    """
    end, ranges = GRAPH_RANGES[0], 1
    while end < context:
        end, ranges = end * GRAPH_RANGES[1], ranges + 1
    most = min(sequences, GRAPH_SEQUENCES)
    kinds = [count for count in range(most, 0, -1) for _ in range(ranges)][:KEPT_GRAPHS]
    return reserved(4 * count * config.vocabulary_size for count in kinds) + 4 * _MIB


def reserved(tensors: Iterable[int]) -> int:
    """Bytes PyTorch's allocator takes for tensors that stay, given out in this order."""
    total = 0
    rests: tuple[list[int], list[int]] = [], []  # of pieces of small and of large tensors
    for nbytes in tensors:
        size = -(-nbytes // 512) * 512
        rest, least = (rests[0], 512) if size <= _MIB else (rests[1], _MIB + 1)
        at = bisect_left(rest, size)
        if at < len(rest):
            left = rest.pop(at) - size
        else:
            piece = 2 * _MIB if size <= _MIB else 20 * _MIB
            piece = piece if size < 10 * _MIB else -(-size // (2 * _MIB)) * 2 * _MIB
            total, left = total + piece, piece - size
        if left >= least:
            insort(rest, left)
    return total


def reserved_each(nbytes: int) -> int:
    """Bytes the allocator takes for one of many tensors of this size."""
    if nbytes >= 10 * _MIB:
        return -(-nbytes // (2 * _MIB)) * 2 * _MIB
    piece = 2 * _MIB if nbytes <= _MIB else 20 * _MIB
    return piece // (piece // nbytes) if nbytes else 0


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

    def layer(self, config: ModelConfig, layer: int, tokens: int, chunk: int) -> tuple[int, int]:
        """Bytes of one layer's keys and of its values."""
        shape = config.attention
        line = self.block_size * shape.kv_heads * self.value_bytes
        line *= self.blocks(config.windows[layer], tokens, chunk)
        return line * shape.key_length, line * shape.value_length
