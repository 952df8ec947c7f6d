"""One layer of the decoder all families share: pre-norm attention and feed-forward part.

Attributes bear the names of the GGUF tensors.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from greenroom.layers.backend import AttentionSpec, NormLike, Step
from greenroom.layers.batch import KVCache
from greenroom.layers.moe import Matrix
from greenroom.models.parts import Parts

if TYPE_CHECKING:
    from greenroom.models.model import Model


@dataclass(frozen=True, slots=True)
class KVSpec:
    """The retention rule of a KV group: `window` tokens, or everything."""

    window: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What is fixed for a family.

    Attributes:
        neox: pairing of the rotary embedding, see `Rope`.
        centred: LayerNorm instead of RMSNorm.
        qk_norm: RMSNorm of queries and keys, "head" by head or over "all" heads together.
        biases: attention projections that must have a bias: "q", "k", "v", "output".
        ffn_norm: name of the norm before the feed-forward part.
    """

    neox: bool = True
    centred: bool = False
    qk_norm: str | None = None
    biases: frozenset[str] = field(default_factory=frozenset)
    ffn_norm: str = "ffn_norm"


class Block:
    """One layer.

    Args:
        parts: takes this layer's tensors from the file.
        model: the model it belongs to, for its configuration, traits and feed-forward part.
        layer: its index.
    """

    def __init__(self, parts: Parts, model: "Model", layer: int) -> None:
        config, traits = model.config, model.traits
        shape = config.attention
        self.shape = shape
        self.backend = parts.backend
        self.attn_norm: NormLike = parts.norm("attn_norm")
        self.attn_qkv = parts.qkv(traits.biases)
        self.qk_norm = traits.qk_norm
        if traits.qk_norm is not None:
            per = 1 if traits.qk_norm == "head" else shape.heads
            self.attn_q_norm = parts.norm("attn_q_norm", per * shape.key_length)
            per = 1 if traits.qk_norm == "head" else shape.kv_heads
            self.attn_k_norm = parts.norm("attn_k_norm", per * shape.key_length)
        self.attn_output = parts.attn_output(traits.biases)
        self.ffn_norm: NormLike = parts.norm(model.ffn_norm_name(parts))
        self.ffn: Matrix = model.feed_forward(parts, layer)
        self.residual = config.scales.residual
        sinks = model.sinks(parts)
        self.spec = AttentionSpec(
            group=config.kv_group(layer),
            scale=shape.scale or shape.key_length**-0.5,
            window=config.windows[layer],
            sinks=None if sinks is None else self.backend.place(sinks),
            head_norms=(self.attn_q_norm, self.attn_k_norm) if self.qk_norm == "head" else None,
        )

    def attend(self, x: Tensor, delta: Tensor | None, step: Step, cache: KVCache) -> Tensor:
        """The attention part.

        Args:
            x: (tokens, d) float32, the residual stream; delta is added to it in place.
            delta: (tokens, d) float32, what the layer before computed, or None.
            step: this step.
            cache: of this layer.

        Returns:
            (tokens, d) float32, to be added to x.
        """
        # Nothing holds the queries once they have been used: they are large in a long step.
        out = self.backend.attend(*self._heads(x, delta), cache, step, self.spec)
        return self._scaled(self.attn_output(out.view(x.shape[0], -1)))

    def _heads(self, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (tokens, heads, length) float32; arguments as of `attend`."""
        shape, tokens = self.shape, x.shape[0]
        q, k, v = self.attn_qkv(self.attn_norm(x, delta))
        if shape.clamp is not None:
            q, k, v = (t.clamp(-shape.clamp, shape.clamp) for t in (q, k, v))
        if self.qk_norm == "all":
            q, k = self.attn_q_norm(q), self.attn_k_norm(k)
        q = q.view(tokens, shape.heads, shape.key_length)
        k = k.view(tokens, shape.kv_heads, shape.key_length)
        return q, k, v.view(tokens, shape.kv_heads, shape.value_length)

    def feed(self, x: Tensor, delta: Tensor) -> Tensor:
        """The feed-forward part; arguments and result as those of `attend`."""
        return self._scaled(self.ffn(self.ffn_norm(x, delta)))

    @property
    def nbytes(self) -> int:
        """Bytes of everything but the routed experts."""
        owned: list[Any] = [
            self.attn_norm,
            self.attn_qkv,
            self.attn_output,
            self.ffn_norm,
            self.ffn,
        ]
        if self.qk_norm is not None:
            owned += [self.attn_q_norm, self.attn_k_norm]
        if self.spec.sinks is not None:
            owned.append(self.spec.sinks)
        return sum(part.nbytes for part in owned)

    def _scaled(self, delta: Tensor) -> Tensor:
        return delta if self.residual == 1.0 else delta * self.residual
