"""Collects an importance matrix: how much each input column of each matrix mattered on a text.

Sits before the matrices of a model that computes on the native backend and adds up the squares
of what goes in. Knows the attributes of `models.Model`, which bear the tensors' names.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from greenroom import native
from greenroom.bench.quality import Windows
from greenroom.errors import RequestError
from greenroom.experts.cpu import CpuExperts
from greenroom.experts.reference import ACTIVATIONS
from greenroom.gguf import GGMLType, GGUFFile, TensorSpec, write_gguf
from greenroom.layers.moe import Moe
from greenroom.layers.native_backend import NativeBackend, NativeMlp


class Sums:
    """Sums of squares of a tensor's inputs.

    Attributes:
        squares: (matrices, columns) float64.
        counts: (matrices,) tokens seen by each.
    """

    def __init__(self, matrices: int, columns: int) -> None:
        self.squares = np.zeros((matrices, columns))
        self.counts = np.zeros(matrices, np.int64)

    def add(self, matrix: int, x: NDArray[np.float32]) -> None:
        """Takes what one matrix was multiplied with, (tokens, columns)."""
        self.squares[matrix] += np.square(x, dtype=np.float64).sum(0)
        self.counts[matrix] += len(x)


class Metered:
    """A part of the model with something that looks at its arguments first."""

    def __init__(self, part: Any, look: Callable[..., None]) -> None:
        self.part, self.look = part, look

    @property
    def nbytes(self) -> int:
        """Bytes of the part."""
        return int(self.part.nbytes)

    def __call__(self, *args: Tensor) -> Any:
        """What the part computes."""
        self.look(*args)
        return self.part(*args)


class Importance:
    """Meters a loaded model; it counts whatever is computed from now on.

    Args:
        model: a `models.Model` on the native backend.
        path: the file it was loaded from, for the names of its tensors.

    Raises:
        RequestError: the model computes elsewhere.
    """

    def __init__(self, model: Any, path: Path) -> None:
        if not isinstance(model.backend, NativeBackend):
            raise RequestError("an importance matrix is collected on the CPU; use --vram 0", "vram")
        self._pool = model.backend.pool
        self.sums: dict[str, Sums] = {}
        with GGUFFile(path) as file:
            self._shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
        for layer, blk in enumerate(model.blk):
            prefix = f"blk.{layer}."
            projections = ("attn_q", "attn_k", "attn_v", "attn_qkv")
            blk.attn_qkv = self._metered(blk.attn_qkv, *(prefix + name for name in projections))
            blk.attn_output = self._metered(
                blk.attn_output, prefix + "attn_output", prefix + "attn_out"
            )
            if isinstance(blk.ffn, Moe):
                self._meter_moe(blk.ffn, prefix)
            else:
                blk.ffn = self._mlp(blk.ffn, prefix, "")
        model.output = self._metered(model.output, "output")

    def _meter_moe(self, moe: Moe, prefix: str) -> None:
        experts = moe.experts
        if isinstance(experts, CpuExperts):
            moe.experts = self._experts(experts, prefix, "_exps")
        if moe.shared is not None:
            moe.shared.mlp = self._mlp(moe.shared.mlp, prefix, "_shexp")

    def _sums(self, *names: str) -> list[Sums]:
        """Of those of the tensors that the file has."""
        found = []
        for name in (f"{name}.weight" for name in names):
            if name in self._shapes:
                shape = self._shapes[name]
                matrices = shape[0] if len(shape) == 3 else 1
                self.sums[name] = Sums(matrices, shape[-1])
                found.append(self.sums[name])
        return found

    def _metered(self, part: Any, *names: str) -> Metered:
        sums = self._sums(*names)

        def look(x: Tensor, *_: Any) -> None:
            for one in sums:
                one.add(0, x.numpy())

        return Metered(part, look)

    def _mlp(self, mlp: Any, prefix: str, suffix: str) -> Any:
        if isinstance(mlp, NativeMlp):
            mlp._experts = self._experts(mlp._experts, prefix, suffix)
        return mlp

    def _experts(self, experts: CpuExperts, prefix: str, suffix: str) -> Any:
        names = [f"{prefix}ffn_{part}{suffix}" for part in ("gate", "up", "gate_up")]
        first, down = self._sums(*names), self._sums(f"{prefix}ffn_down{suffix}")

        def look(hidden: Tensor, ids: Tensor, *_: Any) -> None:
            for expert in torch.unique(ids).tolist():
                x = hidden[(ids == expert).any(-1)].contiguous().numpy()
                for one in first:
                    one.add(expert, x)
                for one in down:
                    one.add(expert, self._inner(experts, expert, x))

        return Metered(experts, look)

    def _inner(
        self, experts: CpuExperts, expert: int, x: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """What an expert's down matrix is multiplied with: (tokens, f) float32."""
        layout, slab = experts.layouts[expert], experts.slab(expert)
        products = []
        for index in (0, 1):
            out = np.empty((len(x), layout.f), np.float32)
            native.lib().linear(
                self._pool, int(layout.types[index]), layout.f, layout.d,
                layout.matrix(slab, index), x, out, layout.bias(slab, index),
            )  # fmt: skip
            products.append(torch.from_numpy(out))
        return ACTIVATIONS[experts.activation](*products).numpy()

    def write(self, path: Path, text: str, windows: Windows) -> None:
        """Writes a GGUF file as llama.cpp's `llama-imatrix` does; experts no token reached have
        a count of 0.

        Args:
            path: the file.
            text: name of what was read.
            windows: how it was cut.

        Raises:
            ModelFileError: the file cannot be written.
        """
        specs = []
        for name, sums in self.sums.items():
            if not sums.counts.any():
                continue
            squares = sums.squares.astype(np.float32)
            counts = sums.counts.astype(np.float32)[:, None]
            specs.append(TensorSpec.of(f"{name}.in_sum2", GGMLType.F32, squares))
            specs.append(TensorSpec.of(f"{name}.counts", GGMLType.F32, counts))
        metadata = {
            "general.type": "imatrix",
            "imatrix.datasets": [text],
            "imatrix.chunk_count": len(windows.tokens),
            "imatrix.chunk_size": windows.context,
        }
        write_gguf(path, metadata, specs)
