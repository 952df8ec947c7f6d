"""A model's configuration, read from GGUF metadata: the one place that reads it.

Frozen once built. What a file asks for and is not implemented is refused here with one line;
what only one family knows (constants, norms, tensor names) stands in that family's file.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from greenroom.errors import ModelFileError, UnsupportedModelError
from greenroom.gguf import TensorInfo
from greenroom.models.metadata import Keys


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionConfig:
    """Shapes of the attention; lengths in elements.

    Attributes:
        heads, kv_heads: query heads, and heads of keys and values.
        key_length, value_length: of one head.
        scale: factor of the scores, or None for 1/sqrt(key_length).
        clamp: bound of query, key and value values, or None.
        normed: whether queries and keys have norms of their own.
    """

    heads: int
    kv_heads: int
    key_length: int
    value_length: int
    scale: float | None = None
    clamp: float | None = None
    normed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding as the file describes it.

    Attributes:
        dimensions: rotated channels of a head.
        base: of the frequencies.
        scaling: "none", "linear", "yarn" or "longrope".
        factor: how many times longer than `original_context` the context became.
        original_context: tokens, or 0 if the file does not say.
        attention_factor: factor of the magnitude, or None if the file does not say.
        beta_fast, beta_slow: YaRN's bounds, in turns.
        enabled: whether there is a rotary embedding at all.
    """

    dimensions: int
    base: float
    scaling: str
    factor: float
    original_context: int
    attention_factor: float | None
    beta_fast: float
    beta_slow: float
    enabled: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeConfig:
    """Expert structure.

    Attributes:
        experts, used: routed experts of a layer, and how many a token takes.
        width: inner width of one routed expert.
        shared_width: inner width of the shared expert, 0 if there is none.
        dense_layers: leading layers without experts.
        renormalise: whether the weights of a token sum to one, None if the file does not say.
        weight_scale: factor of the weights.
    """

    experts: int
    used: int
    width: int
    shared_width: int
    dense_layers: int
    renormalise: bool | None
    weight_scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Scales:
    """Granite's multipliers: of the embedding, of what a layer adds; a divisor of the logits."""

    embedding: float = 1.0
    residual: float = 1.0
    logit: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Everything about a model but its weights.

    Attributes:
        architecture: `general.architecture`.
        layers: blocks.
        hidden_size: width of the residual stream.
        feed_forward_length: inner width of dense layers.
        vocabulary_size: rows of the embedding.
        context_length: tokens the model was made for.
        norm_epsilon: of every norm.
        windows: sliding window of each layer in tokens, None where attention is full.
        attention, rope, moe, scales: the parts; moe is None for a dense model.
    """

    architecture: str
    layers: int
    hidden_size: int
    feed_forward_length: int
    vocabulary_size: int
    context_length: int
    norm_epsilon: float
    windows: tuple[int | None, ...]
    attention: AttentionConfig
    rope: RopeConfig
    moe: MoeConfig | None
    scales: Scales

    @classmethod
    def from_metadata(
        cls, metadata: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
    ) -> "ModelConfig":
        """Reads the configuration of a GGUF file.

        Args:
            metadata: key to value.
            tensors: name to tensor; their shapes give the vocabulary's size.

        Raises:
            ModelFileError: a key is missing or makes no sense.
            UnsupportedModelError: the file asks for something that is not implemented.
        """
        keys = Keys(metadata)
        layers = keys.count("block_count", maximum=len(tensors))
        hidden = keys.count("embedding_length")
        context = keys.count("context_length")
        refuse_unknown(keys)
        attention = read_attention(keys, hidden, any(".attn_q_norm." in name for name in tensors))
        moe = read_moe(keys)
        return cls(
            architecture=keys.architecture,
            layers=layers,
            hidden_size=hidden,
            feed_forward_length=keys.count("feed_forward_length", default=0, minimum=0),
            vocabulary_size=embedding_rows(tensors, hidden),
            context_length=context,
            norm_epsilon=read_epsilon(keys),
            windows=read_windows(keys, layers, context),
            attention=attention,
            rope=read_rope(keys, attention, tensors),
            moe=moe,
            scales=Scales(
                embedding=keys.number("embedding_scale", default=1.0),
                residual=keys.number("residual_scale", default=1.0),
                logit=keys.number("logit_scale", default=1.0) or 1.0,
            ),
        )

    @property
    def group_windows(self) -> tuple[int | None, ...]:
        """The window of each KV group: full attention first, then each window as it appears."""
        distinct = dict.fromkeys(self.windows)
        return tuple(sorted(distinct, key=lambda window: window is not None))

    def cache_bytes(self, value_bytes: int) -> int:
        """Bytes of one token's keys and values in the layers that keep all of them."""
        shape = self.attention
        width = shape.kv_heads * (shape.key_length + shape.value_length)
        return self.windows.count(None) * width * value_bytes

    def kv_group(self, layer: int) -> int:
        """Index of the KV group of a layer."""
        return self.group_windows.index(self.windows[layer])


def embedding_rows(tensors: Mapping[str, TensorInfo], hidden: int) -> int:
    """Rows of `token_embd.weight`, the size of the vocabulary."""
    tensor = tensors.get("token_embd.weight")
    if tensor is None:
        raise ModelFileError("tensor token_embd.weight is missing; this file is no language model")
    if len(tensor.ne) != 2 or tensor.ne[0] != hidden:
        raise ModelFileError(
            f"tensor token_embd.weight has shape {tensor.shape}, but embedding_length is {hidden}"
        )
    return int(tensor.ne[1])


# Keys that change the math and are not implemented, with the values that change nothing.
NO_OPS: dict[str, tuple[Any, ...]] = {
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "interleave_moe_layer_step": (0, 1),
    "nextn_predict_layers": (0,),
    "full_attention_interval": (0, 1),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "attention.q_lora_rank": (0,),
    "attention.kv_lora_rank": (0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.causal": (True,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "use_parallel_residual": (False,),
}


def refuse_unknown(keys: Keys) -> None:
    """Raises UnsupportedModelError for a key that asks for math that is not implemented."""
    for key, harmless in NO_OPS.items():
        value = keys.scalar(key)
        if value is not None and value not in harmless:
            raise UnsupportedModelError(
                f"{keys.name(key)} = {value} is not implemented; "
                f"implemented: {' or '.join(map(str, harmless))}"
            )


def read_attention(keys: Keys, hidden: int, normed: bool) -> AttentionConfig:
    """Shapes of the attention; head_count may be an array if all layers are alike."""
    heads = keys.count("attention.head_count")
    kv_heads = keys.count("attention.head_count_kv", default=heads)
    if heads % kv_heads:
        raise ModelFileError(
            f"{keys.name('attention.head_count')} = {heads} is not a multiple of "
            f"{keys.name('attention.head_count_kv')} = {kv_heads}"
        )
    default = hidden // heads if hidden % heads == 0 else None
    key_length = keys.count("attention.key_length", default=default)
    return AttentionConfig(
        heads=heads,
        kv_heads=kv_heads,
        key_length=key_length,
        value_length=keys.count("attention.value_length", default=default or key_length),
        scale=keys.number("attention.scale", default=0.0) or None,
        clamp=keys.number("attention.clamp_kqv", default=0.0) or None,
        normed=normed,
    )


def read_epsilon(keys: Keys) -> float:
    """The norms' epsilon, under either of its names."""
    for key in ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"):
        if key in keys:
            return keys.number(key)
    return keys.number("attention.layer_norm_rms_epsilon")  # raises, naming the key


# Every second layer slides in gpt-oss, beginning with the first; its files do not say so.
DEFAULT_WINDOW_PERIOD = {"gpt-oss": 2, "gptoss": 2}


def read_windows(keys: Keys, layers: int, context: int) -> tuple[int | None, ...]:
    """The window of each layer; a window no shorter than the context is none.

    The pattern is an array of one flag per layer, or a period p: layers with
    `layer % p == p - 1` see everything, the others the window; 0 lets every layer slide.
    """
    window = keys.count("attention.sliding_window", default=0, minimum=0)
    if not 0 < window < context:
        return (None,) * layers
    default = DEFAULT_WINDOW_PERIOD.get(keys.architecture, 0)
    pattern = keys.flags("attention.sliding_window_pattern", layers, default)
    return tuple(window if slides else None for slides in pattern)


def read_rope(
    keys: Keys, attention: AttentionConfig, tensors: Mapping[str, TensorInfo]
) -> RopeConfig:
    """Rotary embedding; longrope is recognised by its tables."""
    scaling = keys.text("rope.scaling.type", default="none")
    factor = keys.number("rope.scaling.factor", default=0.0)
    if not factor and "rope.scale_linear" in keys:  # files of 2023
        factor = keys.number("rope.scale_linear")
        scaling = "linear"
    if "rope_factors_short.weight" in tensors:
        scaling = "longrope"
    if scaling not in {"none", "linear", "yarn", "longrope"}:
        raise UnsupportedModelError(
            f"{keys.name('rope.scaling.type')} = {scaling!r} is not implemented; "
            "implemented: none, linear, yarn, longrope"
        )
    dimensions = keys.count("rope.dimension_count", default=attention.key_length)
    if dimensions > attention.key_length or dimensions % 2:
        raise ModelFileError(
            f"{keys.name('rope.dimension_count')} = {dimensions} must be even and at most the "
            f"key length {attention.key_length}"
        )
    return RopeConfig(
        dimensions=dimensions,
        base=keys.number("rope.freq_base", default=10000.0),
        scaling=scaling,
        factor=factor or 1.0,
        original_context=keys.count("rope.scaling.original_context_length", default=0, minimum=0),
        attention_factor=keys.number("rope.scaling.attn_factor", default=0.0) or None,
        beta_fast=keys.number("rope.scaling.yarn_beta_fast", default=32.0),
        beta_slow=keys.number("rope.scaling.yarn_beta_slow", default=1.0),
        enabled=has_positions(keys),
    )


def has_positions(keys: Keys) -> bool:
    """Granite's converter writes `finetuned` = false for models without positions."""
    return keys.architecture != "granitemoe" or keys.flag("rope.scaling.finetuned") is not False


SOFTMAX_GATING = 1


def read_moe(keys: Keys) -> MoeConfig | None:
    """Expert structure, or None for a dense model."""
    experts = keys.count("expert_count", default=0, minimum=0)
    if experts == 0:
        return None
    used = keys.count("expert_used_count", maximum=experts)
    gating = keys.count("expert_gating_func", default=SOFTMAX_GATING, minimum=0)
    # 3 is llama.cpp's number for the softmax over the selected logits, gpt-oss's rule.
    if gating not in {0, SOFTMAX_GATING, 3}:
        raise UnsupportedModelError(
            f"{keys.name('expert_gating_func')} = {gating} is not implemented; "
            "implemented: 1 (softmax)"
        )
    width = keys.count("expert_feed_forward_length", default=0, minimum=0)
    if not width:
        # Mixtral and its kin call the expert's width feed_forward_length; the first qwen2moe
        # files give the width of all used experts together.
        width = keys.count("feed_forward_length")
        width = width // used if keys.architecture == "qwen2moe" else width
    shared = keys.count("expert_shared_count", default=0, minimum=0) * width
    return MoeConfig(
        experts=experts,
        used=used,
        width=width,
        shared_width=keys.count("expert_shared_feed_forward_length", default=shared, minimum=0),
        dense_layers=keys.count("leading_dense_block_count", default=0, minimum=0),
        renormalise=keys.flag("expert_weights_norm"),
        weight_scale=keys.number("expert_weights_scale", default=0.0) or 1.0,
    )
