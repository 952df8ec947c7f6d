"""Published shapes of Mixture-of-Experts models, and which tensors a file of each has.

Numbers and names are those of the distributed GGUF files. Knows neither types nor bytes:
those are chosen in `synth_types.py` and made in `synth.py`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from greenroom.errors import UnsupportedModelError


class Role(Enum):
    """What a tensor is, as far as its type and its random values depend on it."""

    MATRIX = "matrix"
    EXPERTS = "experts"
    ROUTER = "router"
    NORM = "norm"  # around 1
    BIAS = "bias"  # around 0
    FACTORS = "factors"  # RoPE frequency factors


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor to be made: its shape is in NumPy's order, the contiguous dimension last."""

    name: str
    shape: tuple[int, ...]
    role: Role


@dataclass(frozen=True, slots=True)
class Family:
    """What an architecture's files have beyond attention, norms and routed experts."""

    ffn_norm: str = "ffn_norm"
    attention_bias: bool = False
    router_bias: bool = False
    expert_bias: bool = False
    norm_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    sinks: bool = False


FAMILIES: dict[str, Family] = {
    "gpt-oss": Family(
        ffn_norm="post_attention_norm",
        attention_bias=True,
        router_bias=True,
        expert_bias=True,
        sinks=True,
    ),
    "phimoe": Family(attention_bias=True, norm_bias=True, output_bias=True),
    "deepseek": Family(),
    "llama": Family(),
    "qwen3moe": Family(qk_norm=True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A model's sizes. `width` is the expert's, `dense_width` that of layers without experts."""

    name: str
    title: str
    architecture: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    used: int
    width: int
    tokens: str  # which vocabulary of `synth_vocabulary`
    vocabulary: int
    context: int
    eps: float
    rope_base: float
    mix: str = "Q4_K_M"
    dense_layers: int = 0
    dense_width: int = 0
    shared: int = 0
    rope_factors: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)  # keys without the architecture

    def metadata(self) -> dict[str, Any]:
        """The architecture's keys as converters write them, without the tokenizer's."""
        values: dict[str, Any] = {
            "block_count": self.layers,
            "context_length": self.context,
            "embedding_length": self.hidden,
            "feed_forward_length": self.dense_width or self.width,
            "attention.head_count": self.heads,
            "attention.head_count_kv": self.kv_heads,
            "attention.layer_norm_rms_epsilon": self.eps,
            "rope.freq_base": self.rope_base,
            "expert_count": self.experts,
            "expert_used_count": self.used,
            "vocab_size": self.vocabulary,
        }
        values |= {key: self._filled(value) for key, value in self.extra.items()}
        return {f"{self.architecture}.{key}": value for key, value in values.items()}

    def _filled(self, value: Any) -> Any:
        """A value of `extra`; one that is the name of a field stands for that field."""
        return getattr(self, value) if value in ("head_dim", "width", "shared") else value


_HEADS = {"attention.key_length": "head_dim", "attention.value_length": "head_dim"}
_GPT_OSS = Shape(
    name="gpt-oss-20b",
    title="gpt-oss 20b",
    architecture="gpt-oss",
    layers=24,
    hidden=2880,
    heads=64,
    kv_heads=8,
    head_dim=64,
    experts=32,
    used=4,
    width=2880,
    tokens="gpt-oss",
    vocabulary=201088,
    context=131072,
    eps=1e-5,
    rope_base=150000.0,
    mix="MXFP4",
    extra={
        **_HEADS,
        "expert_feed_forward_length": "width",
        "attention.sliding_window": 128,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 32.0,
        "rope.scaling.original_context_length": 4096,
    },
)
_PHI = Shape(
    name="phi-3.5-moe",
    title="Phi 3.5 MoE Instruct",
    architecture="phimoe",
    layers=32,
    hidden=4096,
    heads=32,
    kv_heads=8,
    head_dim=128,
    experts=16,
    used=2,
    width=6400,
    tokens="phi",
    vocabulary=32064,
    context=131072,
    eps=1e-5,
    rope_base=10000.0,
    rope_factors=True,
    extra={
        "rope.dimension_count": "head_dim",
        "rope.scaling.original_context_length": 4096,
        "rope.scaling.attn_factor": 1.1902381,
        "attention.sliding_window": 131072,
    },
)
_GRIN = replace(
    _PHI,
    name="grin-moe",
    title="GRIN MoE",
    context=4096,
    rope_factors=False,
    extra={
        "rope.dimension_count": "head_dim",
        "rope.scaling.original_context_length": 4096,
        "attention.sliding_window": 2047,
    },
)
_DEEPSEEK = Shape(
    name="deepseek-moe-16b",
    title="DeepSeek MoE 16b Chat",
    architecture="deepseek",
    layers=28,
    hidden=2048,
    heads=16,
    kv_heads=16,
    head_dim=128,
    experts=64,
    used=6,
    width=1408,
    tokens="deepseek",
    vocabulary=102400,
    context=4096,
    eps=1e-6,
    rope_base=10000.0,
    dense_layers=1,
    dense_width=10944,
    shared=2,
    extra={
        "rope.dimension_count": "head_dim",
        "rope.scaling.type": "none",
        "leading_dense_block_count": 1,
        "expert_feed_forward_length": "width",
        "expert_weights_scale": 1.0,
        "expert_shared_count": "shared",
    },
)
_MIXTRAL = Shape(
    name="mixtral-8x7b",
    title="Mixtral 8x7B Instruct",
    architecture="llama",
    layers=32,
    hidden=4096,
    heads=32,
    kv_heads=8,
    head_dim=128,
    experts=8,
    used=2,
    width=14336,
    tokens="llama",
    vocabulary=32000,
    context=32768,
    eps=1e-5,
    rope_base=1e6,
    extra={"rope.dimension_count": "head_dim"},
)
_QWEN3 = Shape(
    name="qwen3-30b-a3b",
    title="Qwen3 30B A3B",
    architecture="qwen3moe",
    layers=48,
    hidden=2048,
    heads=32,
    kv_heads=4,
    head_dim=128,
    experts=128,
    used=8,
    width=768,
    tokens="qwen",
    vocabulary=151936,
    context=40960,
    eps=1e-6,
    rope_base=1e6,
    dense_width=6144,
    extra={**_HEADS, "expert_feed_forward_length": "width"},
)
PUBLISHED: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        _GPT_OSS,
        replace(_GPT_OSS, name="gpt-oss-120b", title="gpt-oss 120b", layers=36, experts=128),
        _PHI,
        _GRIN,
        _DEEPSEEK,
        _MIXTRAL,
        _QWEN3,
    )
}


def shape_of(name: str, layers: int | None = None) -> Shape:
    """The shape `name`, which may end in `-tiny`, with another number of layers if asked for.

    Raises:
        UnsupportedModelError: no such shape, or too few layers for one of every kind.
    """
    shape = PUBLISHED.get(name.removesuffix("-tiny"))
    if shape is None:
        raise UnsupportedModelError(
            f"there is no shape {name!r}; choose one of {', '.join(PUBLISHED)}, "
            "or one of these with -tiny behind it"
        )
    if name.endswith("-tiny"):
        shape = _tiny(shape)
    if layers is None:
        return shape
    if layers <= shape.dense_layers:
        raise UnsupportedModelError(
            f"{name}: --layers {layers} leaves no layer with experts; "
            f"give {shape.dense_layers + 1} or more"
        )
    return replace(shape, layers=layers)


def _tiny(shape: Shape) -> Shape:
    """The same architecture in a few megabytes; odd widths stay odd for K-quants."""
    return replace(
        shape,
        name=shape.name + "-tiny",
        title=shape.title + " tiny",
        layers=4,
        hidden=256 if shape.hidden % 256 == 0 else 288,
        heads=4,
        kv_heads=4 if shape.kv_heads == shape.heads else 2,
        head_dim=64,
        experts=min(shape.experts, 16),
        used=min(shape.used, 4),
        width=256 if shape.width % 256 == 0 else 288,
        dense_width=544 if shape.dense_width else 0,
        vocabulary=4096,
    )


def parts_of(shape: Shape) -> list[Part]:
    """Every tensor of a file of this shape, in the order of the distributed files."""
    hidden, vocabulary = shape.hidden, shape.vocabulary
    family = FAMILIES[shape.architecture]
    parts = [Part("token_embd.weight", (vocabulary, hidden), Role.MATRIX)]
    if shape.rope_factors:
        half = (shape.head_dim // 2,)
        parts += [Part(f"rope_factors_{n}.weight", half, Role.FACTORS) for n in ("long", "short")]
    for layer in range(shape.layers):
        for part in (*_attention(shape, family), *_feed_forward(shape, family, layer)):
            parts.append(replace(part, name=f"blk.{layer}.{part.name}"))
    parts += _norm("output_norm", hidden, family)
    parts.append(Part("output.weight", (vocabulary, hidden), Role.MATRIX))
    if family.output_bias:
        parts.append(Part("output.bias", (vocabulary,), Role.BIAS))
    return parts


def _norm(name: str, size: int, family: Family) -> Iterator[Part]:
    yield Part(f"{name}.weight", (size,), Role.NORM)
    if family.norm_bias:
        yield Part(f"{name}.bias", (size,), Role.BIAS)


def _attention(shape: Shape, family: Family) -> Iterator[Part]:
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield from _norm("attn_norm", shape.hidden, family)
    outputs = {"attn_q": query, "attn_k": key, "attn_v": key, "attn_output": shape.hidden}
    for name, rows in outputs.items():
        columns = query if name == "attn_output" else shape.hidden
        yield Part(f"{name}.weight", (rows, columns), Role.MATRIX)
        if family.attention_bias:
            yield Part(f"{name}.bias", (rows,), Role.BIAS)
    if family.qk_norm:
        yield Part("attn_q_norm.weight", (shape.head_dim,), Role.NORM)
        yield Part("attn_k_norm.weight", (shape.head_dim,), Role.NORM)
    if family.sinks:
        yield Part("attn_sinks.weight", (shape.heads,), Role.BIAS)


def _feed_forward(shape: Shape, family: Family, layer: int) -> Iterator[Part]:
    yield from _norm(family.ffn_norm, shape.hidden, family)
    if layer < shape.dense_layers:
        yield from _mlp("", shape.hidden, shape.dense_width)
        return
    yield Part("ffn_gate_inp.weight", (shape.experts, shape.hidden), Role.ROUTER)
    if family.router_bias:
        yield Part("ffn_gate_inp.bias", (shape.experts,), Role.BIAS)
    for part in _mlp("_exps", shape.hidden, shape.width):
        yield Part(part.name, (shape.experts, *part.shape), Role.EXPERTS)
        if family.expert_bias:
            name = part.name.replace(".weight", ".bias")
            yield Part(name, (shape.experts, part.shape[0]), Role.BIAS)
    if shape.shared:
        yield from _mlp("_shexp", shape.hidden, shape.width * shape.shared)


def _mlp(suffix: str, hidden: int, width: int) -> Iterator[Part]:
    yield Part(f"ffn_gate{suffix}.weight", (width, hidden), Role.MATRIX)
    yield Part(f"ffn_up{suffix}.weight", (width, hidden), Role.MATRIX)
    yield Part(f"ffn_down{suffix}.weight", (hidden, width), Role.MATRIX)
