"""Feed-forward parts: the dense SwiGLU MLP, the plain expert bank, and the MoE block.

The block routes, calls `experts(hidden, ids, weights)` and adds what shared experts give; it
does not know where the experts live.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


class Matrix(Protocol):
    """A linear layer of any backend."""

    @property
    def nbytes(self) -> int:
        """Bytes of its parameters."""

    def __call__(self, x: Tensor, /) -> Tensor:
        """Maps (tokens, in) float32 to (tokens, out) float32."""


class Matrices(Protocol):
    """Several linear layers with one input, of any backend."""

    @property
    def nbytes(self) -> int:
        """Bytes of their parameters."""

    def __call__(self, x: Tensor, /) -> tuple[Tensor, ...]:
        """Maps (tokens, in) float32 to one (tokens, out_i) float32 per matrix."""


class Routing(Protocol):
    """A router of any backend."""

    @property
    def nbytes(self) -> int:
        """Bytes of its parameters."""

    def __call__(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Routes (tokens, d) float32: ids (tokens, k) int32, weights (tokens, k) float32."""


class Experts(Protocol):
    """The experts of one layer, wherever they live."""

    @property
    def nbytes(self) -> int:
        """Bytes of their parameters."""

    def __call__(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Weighted sum of the chosen experts.

        Args:
            hidden: (tokens, d) float32.
            ids: (tokens, k) int32.
            weights: (tokens, k) float32.

        Returns:
            (tokens, d) float32.
        """


@runtime_checkable
class ExpertsApart(Experts, Protocol):
    """Experts computed by another processor than the one that computes the rest."""

    def start(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
        """Begins `__call__` with the same arguments."""

    def finish(self, shared: Tensor | None = None) -> Tensor:
        """The result of the last `start`, plus `shared` (tokens, d)."""


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`."""
    return torch.nn.functional.silu(gate) * up


class SharedExpert:
    """An MLP every token passes, optionally scaled by a sigmoid gate of its own.

    Args:
        mlp: (tokens, d) to (tokens, d).
        gate: (d,) float32 or None.
    """

    def __init__(self, mlp: Matrix, gate: Tensor | None = None) -> None:
        self.mlp = mlp
        self.gate = gate

    @property
    def nbytes(self) -> int:
        """Bytes of the parameters."""
        return self.mlp.nbytes + (0 if self.gate is None else self.gate.nbytes)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Maps (tokens, d) float32 to (tokens, d) float32."""
        out = self.mlp(hidden)
        if self.gate is not None:
            out = out * torch.sigmoid(hidden @ self.gate)[:, None]
        return out


class DenseMlp:
    """`down(silu(gate(x)) * up(x))`.

    Args:
        gate_up: the two projections (tokens, d) to (tokens, f).
        down: (tokens, f) to (tokens, d).
    """

    def __init__(self, gate_up: Matrices, down: Matrix) -> None:
        self.gate_up = gate_up
        self.down = down

    @property
    def nbytes(self) -> int:
        """Bytes of the parameters."""
        return self.gate_up.nbytes + self.down.nbytes

    def __call__(self, hidden: Tensor) -> Tensor:
        """Maps (tokens, d) float32 to (tokens, d) float32."""
        gate, up = self.gate_up(hidden)
        return self.down(swiglu(gate, up))


class Moe:
    """Router, routed experts and, where the family has one, a shared expert.

    Args:
        router: hidden states to expert ids and weights.
        experts: the routed experts.
        shared: added to the routed sum, or None.

    Attributes:
        record: is told the ids (tokens, k) int32 of every call, or None.
    """

    def __init__(
        self, router: Routing, experts: Experts, shared: SharedExpert | None = None
    ) -> None:
        self.router = router
        self.experts = experts
        self.shared = shared
        self.record: Callable[[Tensor], None] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of router and shared expert; the routed experts count apart."""
        return self.router.nbytes + (0 if self.shared is None else self.shared.nbytes)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Maps (tokens, d) float32 to (tokens, d) float32."""
        ids, weights = self.router(hidden)
        if self.record is not None:
            self.record(ids)
        if self.shared is None:
            return self.experts(hidden, ids, weights)
        if isinstance(self.experts, ExpertsApart):  # the shared expert runs beside them
            self.experts.start(hidden, ids, weights)
            return self.experts.finish(self.shared(hidden))
        return self.experts(hidden, ids, weights) + self.shared(hidden)
