"""How a model's parts are prepared and run: the interface, and its plain float32 version.

A model asks its backend for parts (linear layers, norms, experts) once, when it is loaded, and
for attention in every layer. A backend knows no family.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from greenroom.experts.reference import ReferenceExperts
from greenroom.layers.attention import attention, write_kv
from greenroom.layers.batch import Batch, KVCache, Launched
from greenroom.layers.embedding import Embedding
from greenroom.layers.linear import Linear, Linears
from greenroom.layers.moe import DenseMlp, Experts, Matrices, Matrix, Routing
from greenroom.layers.norm import Norm
from greenroom.layers.rope import Rope, rotate
from greenroom.layers.router import Router, Rule
from greenroom.layers.weight import MixedStack, Weight, WeightStack


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What is constant about the attention of one layer.

    Attributes:
        group: index of its KV group.
        scale: factor of the scores.
        window: keys visible to a query, itself included; None for all.
        sinks: (heads,) float32 or None.
        head_norms: RMSNorms of every head of queries and of keys, before they are rotated.
    """

    group: int
    scale: float
    window: int | None = None
    sinks: Tensor | None = None
    head_norms: "tuple[NormLike, NormLike] | None" = None

    def normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Heads (tokens, heads, length) float32 after their norms, if they have any."""
        if self.head_norms is None:
            return q, k
        return self.head_norms[0](q), self.head_norms[1](k)


@dataclass(frozen=True, slots=True)
class Step:
    """A batch with what all layers need computed from it once.

    Attributes:
        batch: the step's tokens and cache addresses.
        rope: the rotation, or None.
        angles: cosines and sines (tokens, 2, rotated / 2) float32; None without rotation.
    """

    batch: Batch
    rope: Rope | None
    angles: Tensor | None


class NormLike(Protocol):
    """A norm of the residual stream, see `Norm`."""

    @property
    def nbytes(self) -> int:
        """Bytes of its parameters."""

    def __call__(self, x: Tensor, delta: Tensor | None = None) -> Tensor:
        """Adds delta to x in place and returns the sum normalised; (..., width) float32."""


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """The matrices of one layer's experts as the file has them.

    Attributes:
        gate, up: (experts, f, d).
        down: (experts, d, f).
        biases: of gate and up (experts, f) and down (experts, d) float32, or None.
        activation: "silu" or "gpt-oss".
    """

    gate: Weight | WeightStack | MixedStack
    up: Weight | WeightStack | MixedStack
    down: Weight | WeightStack | MixedStack
    biases: tuple[Tensor, Tensor, Tensor] | None = None
    activation: str = "silu"


class Start(Protocol):
    """How a recorded step begins: where the device does not find its rows by itself, the host
    computes them, maybe through layers of its own."""

    @property
    def reads(self) -> bool:
        """Whether `gather` works: the device looks rows up by itself."""

    def rows(self, batch: Batch, caches: Sequence[KVCache]) -> Tensor:
        """Rows (n, d) float32 of the step's tokens in RAM; writes keys and values of the layers
        before them."""

    def gather(self, ids: Tensor, chosen: Tensor) -> Tensor:
        """The same rows on the device, see `Embedding.gather`."""


class Compute(Protocol):
    """The rest of a step, on one backend."""

    def __call__(self, x: Tensor, step: Step, caches: Sequence[KVCache]) -> Tensor:
        """Rows (n, d) of a `Start` to logits (n, vocabulary), or where the head is not on this
        backend, to rows (n, d) for it; writes keys and values to caches. Overwrites x."""


class Graphs(Protocol):
    """Steps recorded once and replayed, see `DecodeGraphs`."""

    def __call__(
        self, batch: Batch, caches: Sequence[KVCache], start: Start, compute: Compute
    ) -> Tensor | None:
        """What `compute` gives of the step, or None to leave the step to the caller."""

    def replay(
        self,
        batch: Batch,
        caches: Sequence[KVCache],
        start: Start,
        chosen: Tensor | None = None,
    ) -> Launched | None:
        """Launches a recorded step and does not wait for it; None where none was recorded.

        Args:
            batch: the step.
            caches: one per layer.
            start: the same as the recorded step's.
            chosen: (sequences,) int64 on the device, the tokens if `batch` does not tell them;
                only if `start` reads.
        """

    def prepare(self, batch: Batch, caches: Sequence[KVCache]) -> None:
        """While a step is computed: writes what `replay` will need for this very batch, all but
        its tokens, which are not known yet."""

    def clear(self) -> None:
        """Forgets what was recorded, because memory it reads is given back."""


class Backend(Protocol):
    """Prepares the parts of a model and runs attention.

    Attributes:
        tier: marks, in accounts of memory, where dense parts are: "" in RAM, or ".vram".
    """

    tier: str

    def embedding(self, weight: Weight) -> Embedding:
        """A table (vocabulary, width)."""

    def linear(self, weight: Weight, bias: Tensor | None = None) -> Matrix:
        """A matrix (rows, cols) with an optional bias (rows,)."""

    def linears(self, weights: Sequence[Weight], biases: Sequence[Tensor | None]) -> Matrices:
        """Matrices that read the same input."""

    def norm(self, weight: Tensor, bias: Tensor | None, eps: float, centred: bool) -> NormLike:
        """A norm (width,); LayerNorm if centred."""

    def router(self, weight: Tensor, bias: Tensor | None, rule: Rule) -> Routing:
        """A router (experts, d)."""

    def mlp(self, gate: Weight, up: Weight, down: Weight) -> Matrix:
        """A SwiGLU MLP: gate and up (f, d), down (d, f)."""

    def experts(self, weights: ExpertWeights) -> Experts:
        """The routed experts of one layer."""

    def complete(self) -> None:
        """Called once, when all layers have been prepared."""

    def rehearse(self) -> None:
        """Called once, when nothing else that loads is running: what depends on the machine's
        speed is measured."""

    def step_done(self, tokens: int, seconds: float = 0.0) -> None:
        """Called between two steps with the tokens of the last one, and the seconds of the one
        before it; 0 where they are not known."""

    def relieve(self) -> int:
        """After an allocation failed: gives back what can be done without; returns the bytes."""

    def expert_stats(self) -> dict[str, Any]:
        """Hits, misses and residency of experts; empty if they have one place only."""

    def place(self, tensor: Tensor) -> Tensor:
        """A small tensor of any shape where this backend computes."""

    def bring(self, x: Tensor) -> Tensor:
        """Activations of any shape from wherever they are to where this backend computes."""

    def cache(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Zeroed memory for keys or values where this backend computes."""

    def step(self, batch: Batch, rope: Rope | None) -> Step:
        """What all layers share in this step."""

    def graphs(self, rope: Rope | None) -> Graphs | None:
        """What replays a model's decode steps; None where a step is not worth recording."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, cache: KVCache, step: Step, spec: AttentionSpec
    ) -> Tensor:
        """Normalises and rotates q and k, writes k and v to the cache and attends.

        Args:
            q: (tokens, heads, key_length) float32; may be overwritten.
            k: (tokens, kv_heads, key_length) float32; may be overwritten.
            v: (tokens, kv_heads, value_length) float32.
            cache: of this layer.
            step: this step.
            spec: of this layer.

        Returns:
            (tokens, heads, value_length) float32.
        """


class InRam:
    """Where a backend that computes on the CPU keeps things."""

    tier = ""

    def graphs(self, rope: Rope | None) -> Graphs | None:
        """There is nothing to launch."""
        return None

    def complete(self) -> None:
        """Nothing is left to do."""

    def rehearse(self) -> None:
        """Nothing depends on it."""

    def step_done(self, tokens: int, seconds: float = 0.0) -> None:
        """Nothing moves."""

    def relieve(self) -> int:
        """There is nothing to give back."""
        return 0

    def expert_stats(self) -> dict[str, Any]:
        """All experts are in RAM."""
        return {}

    def place(self, tensor: Tensor) -> Tensor:
        """It is there already."""
        return tensor

    def bring(self, x: Tensor) -> Tensor:
        """Waits for the device it comes from."""
        return x.cpu()

    def cache(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """See `Backend.cache`."""
        return torch.zeros(*shape, dtype=dtype)


class ReferenceBackend(InRam):
    """Everything dequantised to float32 and computed by torch."""

    def embedding(self, weight: Weight) -> Embedding:
        """Rows are decoded when they are looked up."""
        return Embedding(weight)

    def linear(self, weight: Weight, bias: Tensor | None = None) -> Linear:
        """See `Backend.linear`."""
        return Linear(weight, bias)

    def linears(self, weights: Sequence[Weight], biases: Sequence[Tensor | None]) -> Linears:
        """See `Backend.linears`."""
        return Linears(weights, biases)

    def norm(self, weight: Tensor, bias: Tensor | None, eps: float, centred: bool) -> Norm:
        """See `Backend.norm`."""
        return Norm(weight, bias, eps, centred)

    def router(self, weight: Tensor, bias: Tensor | None, rule: Rule) -> Router:
        """See `Backend.router`."""
        return Router(weight, bias, rule)

    def mlp(self, gate: Weight, up: Weight, down: Weight) -> DenseMlp:
        """See `Backend.mlp`."""
        return DenseMlp(self.linears([gate, up], [None, None]), self.linear(down))

    def experts(self, weights: ExpertWeights) -> ReferenceExperts:
        """See `Backend.experts`."""
        gate, up, down = (w.float32() for w in (weights.gate, weights.up, weights.down))
        return ReferenceExperts(gate, up, down, weights.biases, weights.activation)

    def step(self, batch: Batch, rope: Rope | None) -> Step:
        """Cosines and sines are computed once for all layers."""
        return Step(batch, rope, None if rope is None else rope.angles(batch.positions))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, cache: KVCache, step: Step, spec: AttentionSpec
    ) -> Tensor:
        """See `Backend.attend`."""
        q, k = spec.normed(q, k)
        if step.rope is not None and step.angles is not None:
            neox = step.rope.neox
            q, k = rotate(q, step.angles, neox), rotate(k, step.angles, neox)
        group = step.batch.groups[spec.group]
        write_kv(cache, group.slots, k, v)
        return attention(
            q,
            cache,
            group,
            step.batch,
            scale=spec.scale,
            window=spec.window,
            sinks=spec.sinks,
        )
