"""The native backend: packed weights and SIMD kernels behind the interface of `backend`.

Each part makes one native call; torch only allocates. Knows no family.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from greenroom import native
from greenroom.experts.cpu import CpuExperts
from greenroom.experts.shelf import Shelf
from greenroom.experts.slabs import Packed, Packer
from greenroom.layers import native_ops
from greenroom.layers.backend import AttentionSpec, ExpertWeights, InRam, Step
from greenroom.layers.batch import Batch, KVCache
from greenroom.layers.embedding import Embedding
from greenroom.layers.rope import Rope
from greenroom.layers.router import Rule
from greenroom.layers.weight import Weight


class NativeLinears:
    """Packed matrices that read the same input; one parallel region computes all.

    Args:
        pool: the thread pool.
        weights: each (rows_i, cols).
        biases: each (rows_i,) float32 or None.
    """

    def __init__(
        self, pool: Any, weights: Sequence[Weight], biases: Sequence[Tensor | None]
    ) -> None:
        self._pool = pool
        self._linears = native.lib().linears
        packer = Packer(pool)
        self._packed: list[Packed] = [packer.add(w.name, w.type, w.raw) for w in weights]
        packer.flush()
        # NumPy arrays cross into native code in a third of the time torch tensors take.
        self._biases = [None if bias is None else bias.contiguous().numpy() for bias in biases]

    @property
    def nbytes(self) -> int:
        """Bytes of all weights and biases."""
        biases = sum(bias.nbytes for bias in self._biases if bias is not None)
        return biases + sum(packed.data.nbytes for packed in self._packed)

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """Maps (tokens, cols) float32 to one (tokens, rows_i) float32 per matrix."""
        outs = tuple(torch.empty(x.shape[0], packed.rows) for packed in self._packed)
        parts = zip(self._packed, outs, self._biases, strict=True)
        work = [(int(p.type), p.rows, p.data, out.numpy(), bias, 1.0) for p, out, bias in parts]
        self._linears(self._pool, work, x.numpy())
        return outs


class NativeLinear(NativeLinears):
    """One packed matrix with an optional bias."""

    def __init__(self, pool: Any, weight: Weight, bias: Tensor | None) -> None:
        super().__init__(pool, [weight], [bias])

    def __call__(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Maps (tokens, cols) float32 to (tokens, rows) float32."""
        return super().__call__(x)[0]


class NativeMlp:
    """A SwiGLU MLP: the fused expert kernel with a single expert of weight 1.

    Args:
        pool: the thread pool.
        gate, up: (f, d).
        down: (d, f).
    """

    def __init__(self, pool: Any, gate: Weight, up: Weight, down: Weight) -> None:
        one = tuple(Weight(w.name, w.type, w.raw[None]) for w in (gate, up, down))
        self._experts = CpuExperts(pool, (one[0], one[1], one[2]))

    @property
    def nbytes(self) -> int:
        """Bytes of the parameters."""
        return self._experts.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """Maps (tokens, d) float32 to (tokens, d) float32."""
        tokens = x.shape[0]
        return self._experts(x, torch.zeros(tokens, 1, dtype=torch.int32), torch.ones(tokens, 1))


class NativeNorm:
    """A norm, fused with the residual addition before it; see `Norm`."""

    def __init__(
        self, pool: Any, weight: Tensor, bias: Tensor | None, eps: float, centred: bool
    ) -> None:
        self._pool = pool
        self._weight = weight
        self._bias = bias
        self._eps = eps
        self._centred = centred

    @property
    def nbytes(self) -> int:
        """Bytes of the parameters."""
        return self._weight.nbytes + (0 if self._bias is None else self._bias.nbytes)

    def __call__(self, x: Tensor, delta: Tensor | None = None) -> Tensor:
        """Adds delta to x in place and returns the sum normalised; (..., width) float32."""
        if self._centred:
            return native_ops.layer_norm(
                self._pool, x, self._weight, self._bias, self._eps, residual=delta
            )
        y = native_ops.rms_norm(self._pool, x, self._weight, self._eps, residual=delta)
        return y if self._bias is None else y + self._bias


class NativeRouter:
    """Projection, choice and weights in one call; see `Router`."""

    def __init__(self, pool: Any, weight: Tensor, bias: Tensor | None, rule: Rule) -> None:
        self._pool = pool
        self._weight = weight
        self._bias = bias
        self._rule = native_ops.router_rule(
            rule.gating, rule.selected, rule.renormalise, rule.scale
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the parameters."""
        return self._weight.nbytes + (0 if self._bias is None else self._bias.nbytes)

    def __call__(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Routes (tokens, d) float32: ids (tokens, k) int32, weights (tokens, k) float32."""
        return native_ops.router(self._pool, hidden, self._weight, self._rule, self._bias)


def cpu_experts(pool: Any, weights: ExpertWeights, lazy: bool, shelf: Shelf | None) -> CpuExperts:
    """A layer's experts: packed now, left in the file (`lazy`), or those on the shelf."""
    matrices = (weights.gate, weights.up, weights.down)
    if shelf is None or lazy:
        return CpuExperts(pool, matrices, weights.biases, weights.activation, lazy=lazy)
    return shelf.take(pool, matrices, weights.biases, weights.activation)


class NativeBackend(InRam):
    """Packed weights and native operations on one thread pool.

    Args:
        pool: the thread pool.
        mmap: leave embedding rows and experts in the mapped file until they are used.
        shelf: experts of an earlier model on the same file.
    """

    def __init__(self, pool: Any, mmap: bool = False, shelf: Shelf | None = None) -> None:
        self.pool = pool
        self.mmap = mmap
        self.shelf = shelf

    def embedding(self, weight: Weight) -> Embedding:
        """Rows are decoded when they are looked up."""
        return Embedding(weight, None if self.mmap else self.pool)

    def linear(self, weight: Weight, bias: Tensor | None = None) -> NativeLinear:
        """See `Backend.linear`."""
        return NativeLinear(self.pool, weight, bias)

    def linears(self, weights: Sequence[Weight], biases: Sequence[Tensor | None]) -> NativeLinears:
        """See `Backend.linears`."""
        return NativeLinears(self.pool, weights, biases)

    def norm(self, weight: Tensor, bias: Tensor | None, eps: float, centred: bool) -> NativeNorm:
        """See `Backend.norm`."""
        return NativeNorm(self.pool, weight, bias, eps, centred)

    def router(self, weight: Tensor, bias: Tensor | None, rule: Rule) -> NativeRouter:
        """See `Backend.router`."""
        return NativeRouter(self.pool, weight, bias, rule)

    def mlp(self, gate: Weight, up: Weight, down: Weight) -> NativeMlp:
        """See `Backend.mlp`."""
        return NativeMlp(self.pool, gate, up, down)

    def experts(self, weights: ExpertWeights) -> CpuExperts:
        """See `Backend.experts`."""
        return cpu_experts(self.pool, weights, self.mmap, self.shelf)

    def step(self, batch: Batch, rope: Rope | None) -> Step:
        """Cosines and sines are computed once for all layers."""
        if rope is None:
            return Step(batch, None, None)
        table = native_ops.rope_table(self.pool, batch.positions, rope.frequencies, rope.magnitude)
        return Step(batch, rope, table)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, cache: KVCache, step: Step, spec: AttentionSpec
    ) -> Tensor:
        """See `Backend.attend`."""
        pool, batch = self.pool, step.batch
        group = batch.groups[spec.group]
        q, k = spec.normed(q, k)
        if step.rope is not None and step.angles is not None:
            style = "neox" if step.rope.neox else "norm"
            native_ops.rope(pool, q, step.angles, style)
            native_ops.rope(pool, k, step.angles, style)
        native_ops.write_kv(pool, k, v, group.slots, cache.k, cache.v)
        return native_ops.attention(
            pool,
            q,
            cache.k,
            cache.v,
            group.block_tables,
            batch.query_starts,
            batch.context_lengths,
            spec.scale,
            spec.window,
            spec.sinks,
        )
