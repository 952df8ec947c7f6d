"""The experts of one layer on the CPU: slabs in RAM and the native fused kernel.

Eager mode packs all experts at load time. Lazy mode starts without copying anything: an expert
is packed from the mapped file when it is first routed to. Knows nothing of the router or of
other tiers; an id of -1 is a route somebody else serves.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from greenroom import native
from greenroom.errors import NativeError
from greenroom.experts.meter import Meter
from greenroom.experts.slabs import (
    Bytes,
    Floats,
    Packer,
    RawMatrices,
    SlabLayout,
    allocate,
    columns,
    note_requantised,
    stored_type,
    type_of,
)
from greenroom.gguf import GGMLType

Biases = tuple[Tensor, Tensor, Tensor]
Progress = Callable[[int], None]  # called with the bytes packed since the last call


class CpuExperts:
    """The routed experts of one layer as packed slabs.

    Args:
        pool: the native thread pool.
        matrices: gate (f, d), up (f, d) and down (d, f) of every expert, as the file has them.
        biases: of gate and up (experts, f) and down (experts, d) float32, or None.
        activation: "silu" or "gpt-oss".
        scales: factor of each expert's gate, up and down products, (experts, 3) float32, or None.
        lazy: pack an expert when it is first used.
        progress: told about packed bytes; unused in lazy mode.

    Raises:
        NativeError: the three matrices do not belong together.
        UnsupportedModelError: a tensor type cannot be decoded.
    """

    def __init__(
        self,
        pool: Any,
        matrices: tuple[RawMatrices, RawMatrices, RawMatrices],
        biases: Biases | None = None,
        activation: str = "silu",
        scales: Tensor | None = None,
        lazy: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self.pool, self._matrices, self._scales = pool, matrices, scales
        self._biases: list[Floats] = [b.float().contiguous().numpy() for b in biases or ()]
        self.experts = len(matrices[0].raw)
        self.activation = activation
        self.block: Bytes | None = None  # (experts, slab) where all slabs lie in one piece
        self.pinned = False  # whether the GPU may copy from it at the bus's full rate
        self.layouts = _plan(matrices, self._biases)
        layout = self.layouts[0]
        self.layer = native.lib().MoeLayer(self.experts, layout.d, layout.f, activation)
        self._slabs: dict[int, Bytes] = {}
        self.meter: Meter | None = None  # is told what every call costs
        for m in matrices:
            for type in dict.fromkeys(type_of(m, e) for e in range(self.experts)):
                note_requantised(m.name, type, layout.d)
        if not lazy:
            self._load_all(progress)

    def _load_all(self, progress: Progress | None) -> None:
        memory, end = allocate(sum(layout.nbytes for layout in self.layouts)), 0
        if self.uniform:
            self.block = memory.reshape(self.experts, -1)
        packer = Packer(self.pool)
        for expert, layout in enumerate(self.layouts):
            start, end = end, end + layout.nbytes
            self._load(expert, memory[start:end], packer)
            if progress is not None:
                progress(layout.nbytes)
        packer.flush()

    def _load(self, expert: int, slab: Bytes, packer: Packer) -> None:
        """Packs one expert into a slab and tells the native layer about it."""
        entries, layout = [], self.layouts[expert]
        for i, m in enumerate(self._matrices):
            part, type = layout.matrix(slab, i), type_of(m, expert)
            packed = packer.add(m.name, type, np.asarray(m.raw[expert]), into=part)
            bias = layout.bias(slab, i)
            if bias is not None:
                bias[:] = self._biases[i][expert]
            scale = 1.0 if self._scales is None else float(self._scales[expert, i])
            entries.append((int(packed.type), part, bias, scale))
        self.layer.set_expert(expert, *entries)
        self._slabs[expert] = slab

    @property
    def layout(self) -> SlabLayout:
        """Of every expert, where `uniform`; else of expert 0."""
        return self.layouts[0]

    @property
    def uniform(self) -> bool:
        """Whether all slabs have one size and layout; not in files of mixed precision."""
        return len(set(self.layouts)) == 1

    @property
    def complete(self) -> bool:
        """Whether all experts are in memory."""
        return len(self._slabs) == self.experts

    @property
    def threads(self) -> int:
        """Threads that compute."""
        return int(self.pool.size)

    @property
    def nbytes(self) -> int:
        """Bytes of the slabs in memory."""
        return sum(self.layouts[expert].nbytes for expert in self._slabs)

    def slab(self, expert: int) -> Bytes:
        """One expert's bytes, (nbytes of its layout,) uint8; packed now if it is not yet."""
        if expert not in self._slabs:
            packer = Packer(self.pool)
            self._load(expert, allocate(self.layouts[expert].nbytes), packer)
            packer.flush()
        return self._slabs[expert]

    def __call__(
        self, hidden: Tensor, ids: Tensor, weights: Tensor, out: Tensor | None = None
    ) -> Tensor:
        """Weighted sum of the chosen experts.

        Args:
            hidden: (tokens, d) float32.
            ids: (tokens, k) int32, -1 for routes that are served elsewhere.
            weights: (tokens, k) float32.
            out: (tokens, d) float32, contiguous, for the result; None for memory of its own.

        Returns:
            (tokens, d) float32.

        Raises:
            NativeError: a shape or an id is wrong.
        """
        if out is None:
            out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        if not self.complete:
            for expert in torch.unique(ids).tolist():
                if 0 <= expert < self.experts:
                    self.slab(expert)
        arguments = (hidden.contiguous(), ids.contiguous(), weights.contiguous())
        begin = time.perf_counter()
        try:
            native.lib().moe(self.pool, self.layer, *(a.numpy() for a in arguments), out.numpy())
        except (TypeError, ValueError) as error:
            raise NativeError(f"experts: {str(error).splitlines()[0]}") from None
        if self.meter is not None:
            self.meter.add(len(hidden), time.perf_counter() - begin, self.bytes_of(ids))
        return out

    def bytes_of(self, ids: Tensor) -> int:
        """Bytes of the experts that ids (tokens, k), all of them known or -1, name."""
        return sum(self.layouts[e].nbytes for e in set(ids.flatten().tolist()) - {-1})


def _plan(
    matrices: tuple[RawMatrices, RawMatrices, RawMatrices], biases: list[Floats]
) -> list[SlabLayout]:
    """The layout of each expert's slab; experts of the same types share one."""
    gate, up, down = matrices
    counts = {len(m.raw) for m in matrices} | {len(b) for b in biases}
    layouts: list[SlabLayout] = []
    known: dict[tuple[GGMLType, ...], SlabLayout] = {}
    for e in range(min(counts)):
        stored = [type_of(m, e) for m in matrices]
        parts = zip(matrices, stored, strict=True)
        shapes = [(np.shape(m.raw[e])[0], columns(t, np.asarray(m.raw[e]))) for m, t in parts]
        f, d = (layouts[0].f, layouts[0].d) if layouts else shapes[0]
        if shapes != [(f, d), (f, d), (d, f)] or len(counts) != 1:
            raise NativeError(
                f"{gate.name}, {up.name}, {down.name}: shapes {shapes} of {sorted(counts)} experts "
                "do not belong together"
            )
        kept = [stored_type(t, cols) for t, (_, cols) in zip(stored, shapes, strict=True)]
        types = (kept[0], kept[1], kept[2])
        if types not in known:
            known[types] = SlabLayout.plan(types, d, f, bool(biases))
        layouts.append(known[types])
    return layouts
