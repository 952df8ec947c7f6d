"""Long steps of experts that sit in VRAM, straight from their blocks. Where a layer's experts all
do, nothing is copied and the host need not know the routes, so that it can run ahead. Knows slabs,
not who decides where experts sit.
"""

import torch
from torch import Tensor

from greenroom.experts.limits import EXPERT_ROWS, FEW_ROWS
from greenroom.experts.slabs import SlabLayout
from greenroom.kernels.direct import direct
from greenroom.kernels.expert_rows import activated_rows, add_rows, scaled_rows
from greenroom.kernels.grouped import Group, Routes
from greenroom.kernels.packed import FORMATS


class DirectMlp:
    """The MLPs of a group of experts with few rows each: no matrix is expanded in memory.

    Args:
        layout: of a slab.
        activation: "silu" or "gpt-oss".
    """

    def __init__(self, layout: SlabLayout, activation: str) -> None:
        self._layout, self._activation = layout, activation
        self._packed = all(int(kind) in FORMATS for kind in layout.types)

    def takes(self, rows: int, experts: int) -> bool:
        """Whether so many rows of so many experts are worth computing this way."""
        return self._packed and rows <= FEW_ROWS * experts

    def __call__(
        self, slabs: Tensor, routes: Routes, group: Group, half: Tensor, row_scales: Tensor,
        out: Tensor, skip: int, rows: int,
    ) -> None:  # fmt: skip
        """Adds what a pass of the group contributes to out (tokens, d) float32.

        Args:
            slabs: (slabs, slab bytes) uint8, where `routes.table` says.
            routes, group: whose rows.
            half, row_scales: hidden states as `scaled_rows` gives them.
            skip, rows: of the group that this pass takes.
        """
        layout = self._layout
        (gate, _), (up, _), (down, _) = layout.matrices
        kinds = [int(kind) for kind in layout.types]
        both = torch.empty(rows, 2 * layout.f, device=out.device)
        if layout.joined:
            direct(half, slabs, gate, kinds[0], both, routes, group, skip, True)
        else:
            direct(half, slabs, gate, kinds[0], both[:, : layout.f], routes, group, skip, True)
            direct(half, slabs, up, kinds[1], both[:, layout.f :], routes, group, skip, True)
        starts = layout.biases or ((0, 0),) * 3
        inner, scales = activated_rows(
            both, slabs, (starts[0][0], starts[1][0]) if layout.biases else None, row_scales,
            routes, group, skip, self._activation,
        )  # fmt: skip
        del both  # large: its room is that of y
        y = torch.empty(rows, layout.d, device=out.device)
        direct(inner, slabs, down, kinds[2], y, routes, group, skip, False)
        bias = starts[2][0] if layout.biases else None
        add_rows(out, y, scales, slabs, bias, routes, group, skip)


class ResidentMlp:
    """The MLPs of all experts of a layer from their slots.

    Args:
        layout: of a slab.
        activation: "silu" or "gpt-oss".
        experts: of the layer.
        chunk: most tokens of a step, if known; room for as many rows is planned.
    """

    def __init__(self, layout: SlabLayout, activation: str, experts: int, chunk: int) -> None:
        self._mlp, self._chunk = DirectMlp(layout, activation), chunk
        self._group = Group(0, 0, (0,) * experts)

    def takes(self, routes: int) -> bool:
        """Whether so many routes are worth computing here."""
        return self._mlp.takes(routes, len(self._group.counts))

    def __call__(
        self, memory: Tensor, table: Tensor, hidden: Tensor, ids: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The weighted sum of the chosen experts.

        Args:
            memory: (slots, slab bytes) uint8.
            table: (experts,) int32, everybody's slot.
            hidden: (tokens, d) float32, contiguous.
            ids: (tokens, k) int32.
            weights: (tokens, k) float32.

        Returns:
            (tokens, d) float32, and (experts + 1,) int32: where in the routes, sorted by expert,
            each expert's begin.
        """
        routes = Routes.all_in(ids, weights, table)
        half, scales = scaled_rows(hidden)
        out, most = torch.zeros_like(hidden), min(EXPERT_ROWS, max(len(hidden), self._chunk))
        for skip in range(0, ids.numel(), most):
            rows = min(most, ids.numel() - skip)
            self._mlp(memory, routes, self._group, half, scales, out, skip, rows)
        return out, routes.starts
