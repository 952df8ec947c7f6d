"""The decoder all families share: pre-norm blocks of attention and feed-forward.

A family is a subclass of `Model` that states its traits and overrides what differs. Attributes
bear the names of the GGUF tensors. Knows nothing of scheduling or of where experts live.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from greenroom.experts.cpu import CpuExperts
from greenroom.experts.meter import Meter
from greenroom.experts.trace import TraceRecorder
from greenroom.layers.backend import Backend, Graphs, Step
from greenroom.layers.batch import Batch, KVCache, Launched
from greenroom.layers.moe import Matrix, Moe
from greenroom.layers.rope import Rope
from greenroom.models.block import Block, KVSpec, Traits
from greenroom.models.config import ModelConfig
from greenroom.models.lead import Lead
from greenroom.models.parts import Parts
from greenroom.models.ropes import build_rope


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
        self.lead = Lead(self)
        self.graphs: Graphs | None = self.lead.device.graphs(self.rope)

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
            replayed = self.graphs(batch, caches, self.lead, self._compute)
            if replayed is not None:
                return replayed if self._whole else self._logits(self._end(replayed))
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
        if not self._recordable or not self._whole:
            return None
        assert self.graphs is not None
        return self.graphs.replay(batch, caches, self.lead, chosen)

    @property
    def chains(self) -> bool:
        """Whether a launched step can go on with tokens the host has not seen."""
        return self._recordable and self._whole and self.lead.reads

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
        x = self.scaled(self.token_embd(batch.tokens))
        steps = {id(backend): backend.step(batch, self.rope) for backend in self.backends}
        return self._end(*self.through(x, steps, caches, rows=batch.output_rows))

    def scaled(self, x: Tensor) -> Tensor:
        """Rows of the embedding as the first layer takes them."""
        scale = self.config.scales.embedding
        return x if scale == 1.0 else x * scale

    def _compute(self, x: Tensor, step: Step, caches: Sequence[KVCache]) -> Tensor:
        """What follows the lead, on one backend: its rows to logits of every row, or where the
        head is elsewhere, to the residual stream."""
        steps = {id(self.lead.device): step}
        x, delta = self.through(x, steps, caches, slice(self.lead.layers, None))
        if self._whole:
            return self._logits(self._end(x, delta))
        return x if delta is None else x.add_(delta)

    def through(
        self,
        x: Tensor,
        steps: dict[int, Step],
        caches: Sequence[KVCache],
        layers: slice = slice(None),
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The residual stream through some layers.

        Args:
            x: (tokens, d) float32; overwritten.
            steps: of the backends of these layers, by id.
            caches: one per layer of the model.
            layers: which.
            rows: that matter behind the last layer, None for all.

        Returns:
            (outputs, d) float32, and what is still to be added to it.
        """
        delta: Tensor | None = None
        last = self.blk[-1]
        for blk, cache in zip(self.blk[layers], caches[layers], strict=True):
            here = blk.backend  # brings what another processor has computed
            x, delta = here.bring(x), None if delta is None else here.bring(delta)
            delta = blk.attend(x, delta, steps[id(here)], cache)
            if blk is last and rows is not None:
                if len(rows) == 0:  # all but the last chunk of a prompt
                    return x[:0], None
                # Behind the last attention only the rows that are asked for matter.
                x, delta = x[rows], delta[rows]
            delta = blk.feed(x, delta)
        return x, delta

    def _end(self, x: Tensor, delta: Tensor | None = None) -> Tensor:
        """The residual stream normalised, where the head is."""
        if len(x) == 0:
            return x
        bring = self.ending.bring
        return self.output_norm(bring(x), None if delta is None else bring(delta))

    @property
    def mixed(self) -> bool:
        """Whether layers, or layers and head, are computed by different processors."""
        return len(self.backends) > 1

    @property
    def _whole(self) -> bool:
        """Whether what follows the lead includes the head."""
        return self.ending is self.lead.device

    @property
    def waits(self) -> bool:
        """Whether what follows the lead waits for experts on another processor; no graph can hold
        it then."""
        following = self.blk[self.lead.layers :]
        banks = (blk.ffn.experts for blk in following if isinstance(blk.ffn, Moe))
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

    def rehearse(self) -> None:
        """After loading, with nothing else running: measures what steps depend on."""
        for backend in self.backends:
            backend.rehearse()

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
