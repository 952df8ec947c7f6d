"""Hands a file's tensors to the model's parts by name, checked, and prepared by the backend.

Every tensor is taken once; what is missing, left over or of the wrong shape gives one line
that names it. Knows names and shapes, not what a family computes with them.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from torch import Tensor

from greenroom.errors import ModelFileError
from greenroom.gguf import GGMLType, GGUFFile, repack_pairs
from greenroom.layers.weight import MixedStack, Weight, WeightStack

# Written by old converters, derived from the metadata, never needed.
IGNORED_ENDINGS = (".attn_rot_embd", ".rotary_emb.inv_freq", ".attn.masked_bias")


class Tensors:
    """The tensors of one file.

    Args:
        file: the open file.
        progress: called with (bytes taken, bytes in all) as tensors are taken.
    """

    def __init__(self, file: GGUFFile, progress: Callable[[int, int], None] | None = None) -> None:
        self._file = file
        self._taken: set[str] = set()
        self._bytes = 0
        self._total = sum(tensor.nbytes for tensor in file.tensors.values())
        self._progress = progress

    def __contains__(self, name: str) -> bool:
        """Whether the file has a tensor of this name."""
        return name in self._file.tensors

    def take(self, name: str, *shape: int) -> Weight:
        """The raw rows of a tensor of this shape (NumPy order).

        Raises:
            ModelFileError: it is missing or has another shape.
        """
        tensor = self._file.tensors.get(name)
        if tensor is None:
            raise self.missing(name)
        if tensor.shape != shape:
            raise ModelFileError(
                f"{self._file.path.name}: tensor {name} has shape {tensor.shape}, but the "
                f"metadata makes it {shape}"
            )
        self._taken.add(name)
        self._bytes += tensor.nbytes
        if self._progress is not None:
            self._progress(self._bytes, self._total)
        if tensor.type == GGMLType.MXFP4_PAIRS:
            return Weight(name, GGMLType.MXFP4, repack_pairs(tensor.rows()))
        return Weight(name, tensor.type, tensor.rows())

    def missing(self, name: str) -> ModelFileError:
        """The error for a tensor that is not there."""
        return ModelFileError(
            f"{self._file.path.name}: tensor {name} is missing; the file is incomplete or of "
            "another kind than its metadata says"
        )

    def integers(self, name: str, count: int) -> npt.NDArray[np.int32]:
        """A tensor of (count,) int32; it may be asked for again.

        Raises:
            ModelFileError: it is missing, or of another type or shape.
        """
        tensor = self._file.tensors.get(name)
        if tensor is None:
            raise self.missing(name)
        if tensor.type != GGMLType.I32 or tensor.shape != (count,):
            raise ModelFileError(
                f"{self._file.path.name}: tensor {name} is {tensor.type.name} {tensor.shape}, "
                f"but must be I32 ({count},)"
            )
        self._taken.add(name)
        return tensor.data().view(np.int32)

    def values(self, name: str, *shape: int) -> Tensor:
        """A tensor's values in float32, for norms, biases and other small tensors."""
        return self.take(name, *shape).float32()

    def optional(self, name: str, *shape: int) -> Tensor | None:
        """`values`, or None if the file has no such tensor."""
        return self.values(name, *shape) if name in self else None

    def present(self, *names: str) -> str:
        """The first of these names the file has; the first of all if it has none."""
        return next((name for name in names if name in self), names[0])

    def finish(self) -> None:
        """Raises ModelFileError if a tensor was not taken: the math would be incomplete."""
        left = [
            name
            for name in self._file.tensors
            if name not in self._taken and not name.endswith(IGNORED_ENDINGS)
        ]
        if left:
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            raise ModelFileError(
                f"{self._file.path.name}: tensor {left[0]}{more} is not part of this "
                "architecture; the file is of another kind than its metadata says"
            )


def stack(weights: list[Weight]) -> WeightStack:
    """Experts stored one by one as one stack.

    Raises:
        ModelFileError: they are of different types.
    """
    first = weights[0]
    for weight in weights:
        if weight.type != first.type:
            raise ModelFileError(
                f"tensor {weight.name} has type {weight.type.name}, but {first.name} has "
                f"{first.type.name}; requantise the model"
            )
    return WeightStack(first.name, first.type, [weight.raw for weight in weights])


def mixed(
    tensors: Tensors, name: str, classes: npt.NDArray[np.int32], shape: tuple[int, ...]
) -> MixedStack:
    """Experts of several precision classes as one bank, see docs/mixed-precision.md.

    Args:
        tensors: the file's.
        name: "blk.N.ffn_gate_exps" or the like; ".cK.weight" has class K's experts by number.
        classes: of each expert, (experts,).
        shape: (rows, cols) of one expert.

    Raises:
        ModelFileError: the classes are not numbered from 0 without a gap, or a tensor is wrong.
    """
    counts = np.bincount(np.maximum(classes, 0))
    if classes.min() < 0 or not counts.all():
        raise ModelFileError(f"{name}: its classes are not numbered from 0 without a gap")
    banks = [
        tensors.take(f"{name}.c{c}.weight", int(count), *shape) for c, count in enumerate(counts)
    ]
    rows = [iter(bank.raw) for bank in banks]
    types = tuple(banks[c].type for c in classes)
    return MixedStack(f"{name}.c0.weight", types, [next(rows[c]) for c in classes])
