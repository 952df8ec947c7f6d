"""A model's dense parts on a GPU: packed matrices and norms.

Steps of a few tokens read the packed blocks in the kernel; longer ones expand a bounded number
of rows to float32 and leave the product to the vendor's routine. Knows no family.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from greenroom import native
from greenroom.experts.slabs import (
    Bytes,
    Packer,
    allocate,
    note_requantised,
    stored_rows,
    stored_type,
)
from greenroom.gguf import GGMLType
from greenroom.kernels.dequantise import dequantise
from greenroom.kernels.matvec import matvec
from greenroom.kernels.norm import norm
from greenroom.kernels.packed import FORMATS, GROUP_ROWS
from greenroom.kernels.planes import Cutter
from greenroom.kernels.rowmajor import rowmajor
from greenroom.layers.ledger import SCRATCH_BYTES, Ledger
from greenroom.layers.moe import swiglu
from greenroom.layers.weight import Weight

FEW = 16  # tokens up to which reading packed blocks beats expanding them
CUT = 32  # tokens up to which a norm's result is cut into planes where somebody wants them

_FLOATS = {
    GGMLType.F32: torch.float32,
    GGMLType.F16: torch.float16,
    GGMLType.BF16: torch.bfloat16,
}


@contextmanager
def tensor_cores(device: torch.device) -> Iterator[None]:
    """float32 products on tensor cores: operands rounded to 11 bits (TF32), float32 sums.

    bfloat16 would be twice as fast, but keeps 8 bits of an activation.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


class Workbench:
    """What the parts on one device share: the account of its memory, the pool that packs, and
    scratch for expanded rows.

    Args:
        pool: the native thread pool.
        ledger: books every tensor.
        scratch_bytes: of expanded rows.

    Attributes:
        cut: cuts activations into planes.
        exact: whether long products keep all bits of float32, at a fraction of the speed.
    """

    def __init__(self, pool: Any, ledger: Ledger, scratch_bytes: int = SCRATCH_BYTES) -> None:
        self.pool = pool
        self.exact = False
        self.ledger = ledger
        self.device = ledger.device
        self.cut = Cutter()
        self._scratch = ledger.empty("workspace", [scratch_bytes // 4], torch.float32)

    def scratch(self, cols: int) -> Tensor:
        """As many whole groups of rows as fit, (rows, cols) float32; contents are anything."""
        rows = self._scratch.numel() // cols // GROUP_ROWS * GROUP_ROWS
        return self._scratch[: rows * cols].view(rows, cols)


class DeviceMatrix:
    """One matrix in its own format, with an optional bias.

    Args:
        bench: what is shared.
        weights: matrices of one type and input, rows behind rows; all but the last have whole
            groups of 16 rows.
        biases: of each weight (rows_i,) float32, or None.
    """

    def __init__(
        self, bench: Workbench, weights: Sequence[Weight], biases: Sequence[Tensor | None]
    ) -> None:
        self.bench = bench
        self.rows, self.cols = sum(w.shape[0] for w in weights), weights[0].shape[1]
        self.type = stored_type(weights[0].type, self.cols)
        self.data = bench.ledger.place("dense", torch.from_numpy(self._bytes(weights)))
        if self.type in _FLOATS:
            self.data = self.data.view(_FLOATS[self.type]).view(self.rows, self.cols)
        self.bias: Tensor | None = None
        if any(bias is not None for bias in biases):
            parts = [
                torch.zeros(w.shape[0]) if b is None else b
                for w, b in zip(weights, biases, strict=True)
            ]
            self.bias = bench.ledger.place("dense", torch.cat(parts))

    def _bytes(self, weights: Sequence[Weight]) -> Bytes:
        """All rows one behind the other, packed unless they are floats."""
        if self.type in _FLOATS:
            rows = [stored_rows(w.name, w.type, w.raw).view(np.uint8) for w in weights]
            return np.concatenate([part.reshape(-1) for part in rows])
        kind, packed_bytes = int(self.type), native.lib().packed_bytes
        sizes = [packed_bytes(kind, weight.shape[0], self.cols) for weight in weights]
        memory, packer, end = allocate(sum(sizes)), Packer(self.bench.pool), 0
        for weight, size in zip(weights, sizes, strict=True):
            note_requantised(weight.name, weight.type, self.cols)
            packer.add(weight.name, weight.type, weight.raw, memory[end : end + size])
            end += size
        packer.flush()
        return memory

    @property
    def nbytes(self) -> int:
        """Bytes of weight and bias."""
        return self.data.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        """Maps (tokens, cols) float32 to (tokens, rows) float32."""
        x = x.contiguous()
        if x.shape[0] > FEW:
            return self._many(x)
        if self.type in _FLOATS:
            return rowmajor(self.data, x, self.bias)
        return matvec(self.data, int(self.type), self.rows, self.cols, x, self.bias, self.bench.cut)

    def _many(self, x: Tensor) -> Tensor:
        out = torch.empty(x.shape[0], self.rows, device=x.device)
        scratch = self.bench.scratch(self.cols)
        with nullcontext() if self.bench.exact else tensor_cores(x.device):
            for start in range(0, self.rows, scratch.shape[0]):
                stop = min(start + scratch.shape[0], self.rows)
                torch.mm(x, self._expanded(start, stop, scratch).T, out=out[:, start:stop])
        return out if self.bias is None else out.add_(self.bias)

    def _expanded(self, start: int, stop: int, scratch: Tensor) -> Tensor:
        """Rows `start` to `stop` as float32, in scratch unless they are so already."""
        if self.type == GGMLType.F32:
            return self.data[start:stop]
        part = scratch[: stop - start]
        if self.type in _FLOATS:
            return part.copy_(self.data[start:stop])
        group = FORMATS[int(self.type)].group_bytes(self.cols)
        return dequantise(self.data[start // GROUP_ROWS * group :], int(self.type), part)


@dataclass(frozen=True, slots=True)
class _Span:
    """Which rows of which matrix an output of `DeviceMatrices` is."""

    matrix: int
    start: int
    stop: int


class DeviceMatrices:
    """Matrices that read the same input; those of one type are computed as one.

    Args:
        bench: what is shared.
        weights: each (rows_i, cols).
        biases: each (rows_i,) float32 or None.
    """

    def __init__(
        self, bench: Workbench, weights: Sequence[Weight], biases: Sequence[Tensor | None]
    ) -> None:
        runs: list[list[int]] = []
        for i, weight in enumerate(weights):
            last = weights[i - 1]
            if i and last.type == weight.type and last.shape[0] % GROUP_ROWS == 0:
                runs[-1].append(i)
            else:
                runs.append([i])
        self.parts: list[DeviceMatrix] = []
        self._spans: list[_Span] = []
        for run in runs:
            ends = [0]
            for i in run:
                ends.append(ends[-1] + weights[i].shape[0])
                self._spans.append(_Span(len(self.parts), ends[-2], ends[-1]))
            chosen = [weights[i] for i in run]
            self.parts.append(DeviceMatrix(bench, chosen, [biases[i] for i in run]))

    @property
    def nbytes(self) -> int:
        """Bytes of all weights and biases."""
        return sum(part.nbytes for part in self.parts)

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """Maps (tokens, cols) float32 to one (tokens, rows_i) float32 per matrix; those of one
        type are columns of one tensor."""
        whole = [part(x) for part in self.parts]
        return tuple(whole[s.matrix][:, s.start : s.stop] for s in self._spans)


class DeviceMlp:
    """`down(silu(gate(x)) * up(x))`."""

    def __init__(self, bench: Workbench, gate: Weight, up: Weight, down: Weight) -> None:
        self.gate_up = DeviceMatrices(bench, [gate, up], [None, None])
        self.down = DeviceMatrix(bench, [down], [None])

    @property
    def nbytes(self) -> int:
        """Bytes of the parameters."""
        return self.gate_up.nbytes + self.down.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """Maps (tokens, d) float32 to (tokens, d) float32."""
        gate, up = self.gate_up(x)
        return self.down(swiglu(gate, up))


class DeviceNorm:
    """A norm of the residual stream, fused with the addition before it; see `Norm`.

    Attributes:
        weight: (width,) float32.
        eps: added to the variance.
    """

    def __init__(
        self,
        ledger: Ledger,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        centred: bool,
        cut: Cutter | None = None,
    ) -> None:
        self.kind = 0  # of planes made beside the result, see `Cutter`
        self._cut = cut
        self.weight, self.eps = ledger.place("dense", weight), eps
        self._bias = None
        if bias is not None or centred:  # the kernel takes a bias as the sign to centre
            values = torch.zeros_like(weight) if bias is None else bias
            self._bias = ledger.place("dense", values)
        self._centred = centred

    @property
    def rms(self) -> bool:
        """Whether it is an RMSNorm that adds nothing."""
        return self._bias is None

    @property
    def nbytes(self) -> int:
        """Bytes of the parameters."""
        return self.weight.nbytes + (0 if self._bias is None else self._bias.nbytes)

    def __call__(self, x: Tensor, delta: Tensor | None = None) -> Tensor:
        """Adds delta to x in place and returns the sum normalised; (..., width) float32."""
        source, residual = (x.contiguous(), None) if delta is None else (delta.contiguous(), x)
        bias = self._bias if self._centred else None
        few = self._cut is not None and x.dim() == 2 and x.shape[0] <= CUT
        kind = self.kind if few else 0
        y, planes = norm(source, self.weight, self.eps, bias, residual, kind)
        if self._bias is not None and not self._centred:
            return y.add_(self._bias)
        if few and self._cut is not None:
            self._cut.made(y, kind, planes, self)
        return y


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a tensor in RAM to the device without waiting for what the device is doing."""
    if device.type != "cuda":
        return tensor.clone()
    return tensor.pin_memory().to(device, non_blocking=True)
