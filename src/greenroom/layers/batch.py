"""What one engine step hands to a model: the tokens of all its sequences, and where their
keys and values live. Built by the engine, read by attention layers; knows neither.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Cache addresses of one step for the layers that share a retention rule.

    All full-attention layers form one group, all layers with the same sliding window
    another. A block holds `block_size` consecutive positions of one sequence; entry j of a
    block table is the block of positions [j*block_size, (j+1)*block_size), or -1 once the
    window has moved past it.
    """

    block_tables: Tensor  # (sequences, blocks) int32
    slots: (
        Tensor  # (tokens,) int64: block * block_size + offset, where to write each token's K and V
    )


@dataclass(frozen=True, slots=True)
class Batch:
    """One step. Tokens of a sequence are consecutive rows, sequences follow each other."""

    tokens: Tensor  # (tokens,) int64
    positions: Tensor  # (tokens,) int64, position within its own sequence
    query_starts: Tensor  # (sequences + 1,) int32, row where each sequence's tokens begin
    context_lengths: Tensor  # (sequences,) int32, positions in the cache after this step
    groups: tuple[KVGroup, ...]  # indexed by ModelConfig.kv_group(layer)
    output_rows: Tensor  # (outputs,) int64, rows whose logits are wanted


@dataclass(frozen=True, slots=True)
class KVCache:
    """The cache of one layer, in blocks."""

    k: Tensor  # (blocks, kv_heads, block_size, key_length)
    v: Tensor  # (blocks, kv_heads, block_size, value_length)


@dataclass(frozen=True, slots=True)
class Launched:
    """What a step leaves on the device that was only launched; the next step overwrites it.

    Attributes:
        logits: (outputs, vocabulary) float32.
        likeliest: (outputs,) int64; -1 where the largest logit is no finite number. A step that
            is told nothing else goes on with them.
        answering: entered already; its end waits for what the CPU computes in the step, or
            gives the step up after an error.
    """

    logits: Tensor
    likeliest: Tensor
    answering: AbstractContextManager[object]
