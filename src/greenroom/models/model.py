"""The decoder all families share: pre-norm blocks of attention and feed-forward.

A family is a subclass of `Model` that states its traits and overrides what differs. Attributes
bear the names of the GGUF tensors. Knows nothing of scheduling or of where experts live.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from greenroom.experts.cpu import CpuExperts
from greenroom.experts.meter import Meter
from greenroom.experts.trace import TraceRecorder
from greenroom.layers.backend import AttentionSpec, Backend, Graphs, NormLike, Step
from greenroom.layers.batch import Batch, KVCache, Launched
from greenroom.layers.moe import Matrix, Moe
from greenroom.layers.rope import Rope
from greenroom.models.config import ModelConfig
from greenroom.models.parts import Parts
from greenroom.models.ropes import build_rope


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


class Model:
    """A language model, loaded.

    Args:
        config: its configuration.
        parts: takes the file's tensors and prepares them for a backend.
        context_length: tokens of a session; decides longrope's table.
        llama_cpp_math: follow llama.cpp where it differs from the publisher.
    """

    traits: ClassVar[Traits]

    def __init__(
        self, config: ModelConfig, parts: Parts, context_length: int, llama_cpp_math: bool = False
    ) -> None:
        self.config = config
        self.context_length = context_length
        self.llama_cpp_math = llama_cpp_math
        self.backend: Backend = parts.backend
        self.kv_groups = tuple(KVSpec(window) for window in config.group_windows)
        self.token_embd = parts.token_embd()
        self.rope = self.make_rope(parts)
        self.blk = [Block(parts.block(i), self, i) for i in range(config.layers)]
        self.ending: Backend = parts.ending or parts.backend
        self.output_norm = parts.end().norm("output_norm")
        self.output = self.head(parts.end())
        used = (self.backend, *(blk.backend for blk in self.blk), self.ending)
        self.backends: tuple[Backend, ...] = tuple({id(b): b for b in used}.values())
        self._groups = [config.kv_group(i) for i in range(config.layers)]
        self.recorder: TraceRecorder | None = None
        self.meters: dict[int, Meter] = {}  # by layer, see `meter`
        self.graphs: Graphs | None = None
        if not self.mixed:
            self.graphs = self.backend.graphs(self.rope)

    # What a family may override.

    def feed_forward(self, parts: Parts, layer: int) -> Matrix:
        """The feed-forward part of a layer; a dense SwiGLU unless a family says otherwise."""
        return parts.dense()

    def ffn_norm_name(self, parts: Parts) -> str:
        """Name of the norm before the feed-forward part."""
        return self.traits.ffn_norm

    def head(self, parts: Parts) -> Matrix:
        """The projection to the vocabulary."""
        return parts.output()

    def sinks(self, parts: Parts) -> Tensor | None:
        """Attention sinks of a layer, (heads,) float32."""
        return None

    def make_rope(self, parts: Parts) -> Rope | None:
        """The rotary embedding."""
        return build_rope(self.config.rope, parts, self.traits.neox, self.context_length)

    # What the engine calls.

    def new_caches(
        self, blocks: Sequence[int], block_size: int, dtype: torch.dtype = torch.float32
    ) -> list[KVCache]:
        """One zeroed cache per layer.

        Args:
            blocks: number of blocks of each KV group.
            block_size: positions of a block.
            dtype: of keys and values, torch.float32 or torch.float16.
        """
        shape = self.config.attention
        caches = []
        for group, blk in zip(self._groups, self.blk, strict=True):
            size = (blocks[group], shape.kv_heads, block_size)
            k = blk.backend.cache((*size, shape.key_length), dtype)
            caches.append(KVCache(k, blk.backend.cache((*size, shape.value_length), dtype)))
        return caches

    @torch.inference_mode()
    def forward(self, batch: Batch, caches: Sequence[KVCache]) -> Tensor:
        """One step: writes the batch's keys and values, returns logits.

        Args:
            batch: the step.
            caches: one per layer, from `new_caches`.

        Returns:
            (outputs, vocabulary) float32 for `batch.output_rows`.
        """
        if self._recordable:
            assert self.graphs is not None
            replayed = self.graphs(batch, caches, self.token_embd, self._compute)
            if replayed is not None:
                return replayed
        return self._logits(self.hidden(batch, caches))

    def launch(
        self, batch: Batch, caches: Sequence[KVCache], chosen: Tensor | None = None
    ) -> Launched | None:
        """As `forward`, where the step was recorded and need only be launched: returns before
        it is computed. None where `forward` has more to do. Only within torch.inference_mode().

        Args:
            batch: the step.
            caches: one per layer, from `new_caches`.
            chosen: (sequences,) int64 where the last step left them, the tokens if `batch` does
                not tell them; only if `chains`.
        """
        if not self._recordable:
            return None
        assert self.graphs is not None
        return self.graphs.replay(batch, caches, self.token_embd, chosen)

    @property
    def chains(self) -> bool:
        """Whether a launched step can go on with tokens the host has not seen."""
        return self._recordable and self.token_embd.reads

    def prepare(self, batch: Batch, caches: Sequence[KVCache]) -> None:
        """While a launched step is computed: takes in the batch of the next `launch`, whose
        tokens are not known yet."""
        if self.graphs is not None:
            self.graphs.prepare(batch, caches)

    @property
    def _recordable(self) -> bool:
        return self.graphs is not None and self.recorder is None and not self.waits

    def _logits(self, hidden: Tensor) -> Tensor:
        if len(hidden) == 0:
            return hidden.new_empty(0, self.config.vocabulary_size)
        logits = self.output(hidden)
        scale = self.config.scales.logit
        return logits if scale == 1.0 else logits / scale

    @torch.inference_mode()
    def hidden(self, batch: Batch, caches: Sequence[KVCache]) -> Tensor:
        """As `forward`, but the normalised hidden states: (outputs, d) float32."""
        if self.recorder is not None:
            self.recorder.begin(batch.positions, batch.output_rows)
        # First: a step may send experts to the device, and what comes later waits behind them.
        x = self._embed(batch.tokens)
        steps = {id(backend): backend.step(batch, self.rope) for backend in self.backends}
        return self._layers(x, steps, caches, batch.output_rows)

    def _embed(self, tokens: Tensor) -> Tensor:
        return self._scaled(self.token_embd(tokens))

    def _scaled(self, x: Tensor) -> Tensor:
        scale = self.config.scales.embedding
        return x if scale == 1.0 else x * scale

    def _compute(self, x: Tensor, step: Step, caches: Sequence[KVCache]) -> Tensor:
        """Rows of the embedding to logits of every row, on one backend."""
        return self._logits(self._layers(self._scaled(x), {id(self.backend): step}, caches, None))

    def _layers(
        self,
        x: Tensor,
        steps: dict[int, Step],
        caches: Sequence[KVCache],
        rows: Tensor | None,
    ) -> Tensor:
        """Embeddings (tokens, d) to hidden states of `rows`, or of all: (outputs, d) float32."""
        delta: Tensor | None = None
        last, here = self.blk[-1], self.backend
        for blk, cache in zip(self.blk, caches, strict=True):
            if blk.backend is not here:  # the border between the processors' layers
                here = blk.backend
                x, delta = here.bring(x), None if delta is None else here.bring(delta)
            delta = blk.attend(x, delta, steps[id(here)], cache)
            if blk is last and rows is not None:
                if len(rows) == 0:  # all but the last chunk of a prompt
                    return x[:0]
                # Behind the last attention only the rows that are asked for matter.
                x, delta = x[rows], delta[rows]
            delta = blk.feed(x, delta)
        if self.ending is not here:
            assert delta is not None
            x, delta = self.ending.bring(x), self.ending.bring(delta)
        return self.output_norm(x, delta)

    @property
    def mixed(self) -> bool:
        """Whether layers are computed by different processors; then no graph can hold a step."""
        return len(self.backends) > 1

    @property
    def waits(self) -> bool:
        """Whether a step waits for experts on another processor; no graph can hold it then."""
        banks = (blk.ffn.experts for blk in self.blk if isinstance(blk.ffn, Moe))
        return any(getattr(bank, "waits", True) for bank in banks)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Block numbers of the layers with routed experts."""
        return tuple(i for i, blk in enumerate(self.blk) if isinstance(blk.ffn, Moe))

    def record(self, recorder: TraceRecorder | None) -> None:
        """Has `recorder` told the routes of all steps from now on; None ends it.

        A step that is replayed from a graph tells nothing: whoever captures graphs runs plain
        steps while `self.recorder` is set.
        """
        self.recorder = recorder
        for layer, blk in enumerate(self.blk):
            if isinstance(blk.ffn, Moe):
                blk.ffn.record = None if recorder is None else partial(recorder.add, layer)

    def step_done(self, tokens: int, seconds: float = 0.0) -> None:
        """Between two steps: what a backend does when nobody waits for it.

        Args:
            tokens: of the step that was computed.
            seconds: what the step before it took; 0 where that is not known.
        """
        for backend in self.backends:
            backend.step_done(tokens, seconds)

    def abandon(self) -> None:
        """After a step failed: forgets what it left half done."""
        for blk in self.blk:
            forget = getattr(getattr(blk.ffn, "experts", None), "abandon", None)
            if forget is not None:
                forget()

    def relieve(self) -> int:
        """After an allocation failed and `abandon`: gives back half of the experts' slots, or
        what else can be done without; returns the bytes, 0 if there is nothing."""
        if self.graphs is not None:
            self.graphs.clear()
        return sum(backend.relieve() for backend in self.backends)

    def meter(self) -> None:
        """Has every layer's experts report what they cost the CPU from now on."""
        for layer in self.moe_layers:
            bank = getattr(self.blk[layer].ffn, "experts", None)
            cpu = getattr(bank, "cpu", bank)
            if isinstance(cpu, CpuExperts):
                cpu.meter = self.meters[layer] = Meter()

    def expert_stats(self) -> dict[str, Any]:
        """Hits, misses and who sits where, if experts have more than one place to be."""
        return {k: v for backend in self.backends for k, v in backend.expert_stats().items()}

    def memory(self) -> dict[str, int]:
        """Bytes by part: experts, dense, embedding, output; ".vram" marks what is there."""
        tier = self.ending.tier
        parts = {"experts": 0, f"dense{tier}": self.output_norm.nbytes}
        for blk in self.blk:
            if isinstance(blk.ffn, Moe):
                parts["experts"] += blk.ffn.experts.nbytes
            name = f"dense{blk.backend.tier}"
            parts[name] = parts.get(name, 0) + blk.nbytes
        ends = {"embedding": self.token_embd.nbytes, f"output{tier}": self.output.nbytes}
        return parts | ends
