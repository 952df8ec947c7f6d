"""What computing a token takes of a model: bytes, weights and operations.

Reads them off a file's tensors; knows no machine and no rates.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from greenroom.gguf import TensorInfo
from greenroom.models.config import ModelConfig

_SPLIT = re.compile(r"\.\d+\.weight$")  # one expert of several, each a tensor of its own
_EXPERTS = re.compile(r"_exps\.weight$|\.ffn_(gate|up|down)\.\d+\.weight$")
_MLP = re.compile(r"\.ffn_(gate|up|down)(_shexp)?\.weight$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What computing a token takes of a model.

    Attributes:
        experts: bytes of all routed experts by format.
        dense: bytes of everything else that every token reads, by format.
        expert_values, dense_values: weights behind them, by format.
        share: of the experts that one token uses.
        layers: with experts.
        cache: bytes of keys and values per token of context, as float16, windows left out.
        head, head_values: of `dense` and `dense_values`, what only a prompt's last token reads:
            the output, and what the last layer has beside attention and routed experts.
        matrices: products of a step, the experts of a layer counted as one gate, up and down.
        windows: of every layer's attention, None for all tokens.
        scores: operations of a layer's attention for one query and one key.
        heads, kv_heads: of them, and those that share a key and value.
        kv: bytes of a layer's key and value of one token, as float16.
        expert_outputs: rows of all experts' down matrices.
        mlp_outputs: the same of MLPs that every token passes.
        dense_outputs, head_outputs: rows of other matrices behind the values.
        passed: numbers of a token that norms, rotation and the cache take in all layers.
        late: share of the experts, those of the last layer, that a prompt's last token reads alone.
    """

    experts: Mapping[str, int]
    dense: Mapping[str, int]
    expert_values: Mapping[str, int]
    dense_values: Mapping[str, int]
    share: float
    count: int
    layers: int
    cache: int
    head: Mapping[str, int] = field(default_factory=dict)
    head_values: Mapping[str, int] = field(default_factory=dict)
    matrices: int = 0
    windows: tuple[int | None, ...] = ()
    scores: int = 0
    heads: int = 0
    kv_heads: int = 0
    kv: int = 0
    expert_outputs: int = 0
    mlp_outputs: int = 0
    dense_outputs: int = 0
    head_outputs: int = 0
    passed: int = 0
    late: float = 0.0

    @staticmethod
    def of(tensors: Mapping[str, TensorInfo], config: ModelConfig) -> "Work":
        """Reads it off a file's tensors."""
        sizes = _Sizes.of(tensors, f"blk.{config.layers - 1}.ffn_")
        moe, shape = config.moe, config.attention
        width = shape.key_length + shape.value_length
        rotated = (shape.heads + shape.kv_heads) * shape.key_length
        return Work(
            experts=sizes.experts,
            dense=sizes.dense,
            expert_values=sizes.expert_values,
            dense_values=sizes.dense_values,
            share=moe.used / moe.experts if moe else 0.0,
            count=moe.experts if moe else 0,
            layers=len(sizes.layers),
            cache=2 * shape.kv_heads * width * sum(w is None for w in config.windows),
            head=sizes.head,
            head_values=sizes.head_values,
            matrices=len(sizes.matrices),
            windows=tuple(config.windows),
            scores=2 * shape.heads * width,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            kv=2 * shape.kv_heads * width,
            expert_outputs=sizes.expert_outputs,
            mlp_outputs=sizes.mlp_outputs,
            dense_outputs=sizes.dense_outputs,
            head_outputs=sizes.head_outputs,
            passed=config.layers * (2 * config.hidden_size + rotated + shape.kv_heads * width),
            late=1 / len(sizes.layers) if sizes.layers else 0.0,
        )

    def touched(self, rows: float) -> float:
        """Share of the experts' bytes that a step of `rows` tokens reads, routed uniformly."""
        return 1.0 - float((1 - self.share) ** rows)

    def per_expert(self, rows: float) -> float:
        """Tokens of an expert that a step of `rows` tokens uses at all."""
        there = self.touched(rows)
        return rows * self.share / there if there else 0.0

    def pairs(self, first: int, last: int) -> float:
        """Keys that the tokens at positions `first` to `last` of a sequence see in all layers."""
        return sum(_pairs(last, w) - _pairs(first, w) for w in self.windows)

    def attended(self, first: int, last: int) -> float:
        """Operations of attention for those tokens."""
        return self.scores * self.pairs(first, last)

    def cached(self, context: int) -> int:
        """Bytes of a sequence's keys and values that a token behind it reads."""
        return self.kv * sum(min(context, w or context) for w in self.windows)

    @property
    def nbytes(self) -> int:
        """Bytes of all experts and everything else that tokens read."""
        return sum(self.experts.values()) + sum(self.dense.values())


def _pairs(tokens: int, window: int | None) -> float:
    """Keys that the first `tokens` queries see in all."""
    wide = tokens if window is None else min(tokens, window)
    return wide * (wide + 1) / 2 + (tokens - wide) * wide


@dataclass(slots=True)
class _Sizes:
    """Bytes and weights by format of a file's tensors, routed experts apart, and rows; `head` of
    the output and of tensors whose names begin with `last`."""

    last: str
    experts: Counter[str] = field(default_factory=Counter)
    dense: Counter[str] = field(default_factory=Counter)
    head: Counter[str] = field(default_factory=Counter)
    expert_values: Counter[str] = field(default_factory=Counter)
    dense_values: Counter[str] = field(default_factory=Counter)
    head_values: Counter[str] = field(default_factory=Counter)
    expert_outputs: int = 0
    mlp_outputs: int = 0
    dense_outputs: int = 0
    head_outputs: int = 0
    layers: set[str] = field(default_factory=set)
    matrices: set[str] = field(default_factory=set)

    @staticmethod
    def of(tensors: Mapping[str, TensorInfo], last: str) -> "_Sizes":
        found = _Sizes(last)
        for name, tensor in tensors.items():
            if not name.startswith("token_embd") or "output.weight" not in tensors:
                found.add(name, tensor)
        return found

    def add(self, name: str, tensor: TensorInfo) -> None:
        form, count = tensor.type.name, math.prod(tensor.ne)
        matrix = len(tensor.ne) > 1 and name.endswith(".weight")
        outputs = count // tensor.ne[0] * matrix
        if matrix:
            self.matrices.add(_SPLIT.sub("", name))
        if _EXPERTS.search(name):
            self.experts[form] += tensor.nbytes
            self.expert_values[form] += count
            self.expert_outputs += outputs * ("ffn_down" in name)
            self.layers.add(name.split(".")[1])
            return
        self.dense[form] += tensor.nbytes
        self.dense_values[form] += count
        last = name.startswith(("output.", "token_embd.", self.last))
        if last:
            self.head[form] += tensor.nbytes
            self.head_values[form] += count
        if _MLP.search(name):
            self.mlp_outputs += outputs * ("ffn_down" in name) * (not last)
            return
        self.dense_outputs += outputs
        self.head_outputs += outputs * last
