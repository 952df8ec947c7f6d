"""Mixed precision: experts whose errors matter more get finer types, under a size.

A layer's experts of one class are stacked in one tensor, and a small tensor says which class an
expert is of (docs/mixed-precision.md). Knows traces, names and sizes; makes no blocks.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from greenroom.convert.allocation import Ints, Reals, rounding_errors, spend
from greenroom.convert.mixture import MIXES, Rules
from greenroom.convert.quantisers import Quantisers
from greenroom.convert.values import Bytes, Floats, Values
from greenroom.errors import ModelFileError, UnsupportedModelError
from greenroom.experts.trace import ERRORS, Trace
from greenroom.gguf import GGMLType, GGUFFile, TensorInfo, TensorSpec, dequantize

EXPERTS = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)_exps\.weight")
CLASS_PART = re.compile(r"(blk\.(\d+)\.ffn_(?:gate|up|down)_exps)\.c(\d+)\.weight")
DEFAULT_SHARE = 0.25
_LINE = 160  # bytes of a header that one more tensor may take, and of its padding
_POWERS = 0.05, 2.0  # of a squared error; what is measured beyond is noise
# Between hot and cold, where a size is wanted. None of these gives single layers finer types.
_LADDER = ("Q8_0", "Q6_K", "Q5_K", "Q4_K")


@dataclass(frozen=True, slots=True)
class Heat:
    """What decides the classes.

    Attributes:
        trace: what `greenroom profile` recorded.
        hot, cold: keys of `mixture.MIXES`.
        share: of all experts that are hot, or None.
        size: bytes the file may take, or None; beats `share`.
    """

    trace: Path
    hot: str
    cold: str
    share: float | None = None
    size: int | None = None

    @property
    def mixes(self) -> list[str]:
        """Candidates, finest first: with a size also those between hot and cold."""
        hot, cold = (bits(MIXES[mix.upper()].base) for mix in (self.hot, self.cold))
        between = [mix for mix in _LADDER if cold < bits(MIXES[mix].base) < hot]
        return [self.hot, *(between if self.size is not None else ()), self.cold]


def bits(type: GGMLType) -> float:
    """Bits of one number."""
    return 8 * type.block_bytes / type.block_size


class Classes:
    """The class of every expert of a file, and the tensors that makes.

    Args:
        file: the model, its experts stacked.
        heat: what decides.
        rules: those of `heat.mixes`.
        rest: bytes of everything that is not an expert matrix, header included.
        quantisers: to measure what candidates cost.

    Raises:
        UnsupportedModelError: the experts are stored in another form, or the size cannot be
            reached.
        ModelFileError: the trace is damaged or of another model.
    """

    def __init__(
        self,
        file: GGUFFile,
        heat: Heat,
        rules: Sequence[Rules],
        rest: int,
        quantisers: Quantisers,
    ) -> None:
        self.types: dict[str, list[GGMLType]] = {}
        stacks: dict[int, list[TensorInfo]] = {}
        for tensor in file.tensors.values():
            match = EXPERTS.fullmatch(tensor.name)
            if match is not None:
                self.types[tensor.name] = [smaller(tensor, rule) for rule in rules]
                stacks.setdefault(int(match[1]), []).append(tensor)
        if not stacks or any("_exps.c" in name or "_gate_up_" in name for name in file.tensors):
            raise UnsupportedModelError(
                f"{file.path.name}: precision by heat needs experts in three plain stacks per "
                "layer; this file has none, fused ones or classes already"
            )
        trace = Trace.load(heat.trace)
        trace.fits(next(iter(stacks.values()))[0].shape[0], sorted(stacks), heat.trace)
        bytes_of = np.array([self._bytes(stacks[layer]) for layer in trace.layers], np.int64)
        room = room_for(bytes_of, trace.experts, heat, rest)
        if heat.size is None:
            cost = divergence(trace, np.array([0.0, ERRORS[-1] ** 2]))  # hot and cold
        else:
            errors = [self._errors(stacks[layer], quantisers) for layer in trace.layers]
            cost = divergence(trace, np.array(errors))
        chosen = spend(cost, bytes_of, room)
        self.of = dict(zip(trace.layers, chosen, strict=True))

    def _bytes(self, stacks: Sequence[TensorInfo]) -> list[int]:
        """One expert's bytes by candidate."""
        candidates = range(len(self.types[stacks[0].name]))
        return [
            sum(t.shape[1] * self.types[t.name][c].row_bytes(t.shape[2]) for t in stacks)
            for c in candidates
        ]

    def _errors(self, stacks: Sequence[TensorInfo], quantisers: Quantisers) -> Reals:
        """(experts, candidates) relative squared errors, summed over an expert's matrices."""
        parts = [rounding_errors(t, self.types[t.name], quantisers) for t in stacks]
        return np.asarray(np.sum(parts, axis=0))

    def specs(self, tensor: TensorInfo, quantisers: Quantisers) -> Iterator[TensorSpec]:
        """What an expert matrix becomes."""
        match = EXPERTS.fullmatch(tensor.name)
        assert match is not None
        # Classes are counted without a gap, finest first.
        present, of = np.unique(self.of[int(match[1])], return_inverse=True)
        base = tensor.name.removesuffix(".weight")
        if match[2] == "gate" and len(present) > 1:
            name = f"blk.{match[1]}.ffn_exps.class"
            yield TensorSpec(name, GGMLType.I32, of.shape, of.astype(np.int32))
        for c, candidate in enumerate(present):
            name = f"{base}.c{c}.weight" if len(present) > 1 else tensor.name
            type = self.types[tensor.name][candidate]
            yield one_class(name, tensor, type, np.flatnonzero(of == c), quantisers)


def smaller(tensor: TensorInfo, rules: Rules) -> GGMLType:
    """The type the rules give, or the tensor's own where that takes no more bytes."""
    wanted = rules.type_of(tensor.name, tensor.shape, GGMLType.F32)
    columns = tensor.shape[-1]
    return min(tensor.type, wanted, key=lambda type: type.row_bytes(columns))


def divergence(trace: Trace, errors: Reals) -> Reals:
    """What rounding an expert costs, the larger the worse.

    Where its sensitivity was measured, it is a power of the error through the two that were
    tried: behind a layer whose errors tip the choice of experts it grows more slowly than the
    squared error. Else an error counts as often as its expert is used.

    Args:
        trace: of the model.
        errors: (layers, experts, candidates), or a part of that to be spread, squared and
            relative.

    Returns:
        (layers, experts, candidates).
    """
    if trace.sensitivity is None:
        counts = trace.counts()
        return np.asarray(
            (counts / np.maximum(counts.sum(1, keepdims=True), 1))[..., None] * errors
        )
    low, high = np.maximum(np.moveaxis(trace.sensitivity, -1, 0), 1e-30)[..., None]
    small, large = np.square(ERRORS)
    power = np.clip(np.log(high / low) / np.log(large / small), *_POWERS)
    return np.asarray(high * (errors / large) ** power)


def room_for(bytes_of: Ints, experts: int, heat: Heat, rest: int) -> int:
    """Bytes to spend beyond the smallest candidates.

    Args:
        bytes_of: one expert's bytes, (layers, candidates).
        experts: of a layer.
        heat: the share or the size.
        rest: bytes of everything else.

    Raises:
        UnsupportedModelError: even with the smallest the file is too large.
    """
    least = experts * int(bytes_of.min(1).sum())
    if heat.size is None:
        extra = np.maximum(bytes_of[:, 0] - bytes_of[:, -1], 0)
        share = DEFAULT_SHARE if heat.share is None else heat.share
        return int(experts * extra.sum() * share)
    if heat.size < least + rest:
        raise UnsupportedModelError(
            f"a size of {heat.size / 2**20:.1f} MiB cannot be reached: with cold experts only "
            f"the file has {(least + rest) / 2**20:.1f} MiB; choose a coarser --cold-type or "
            "--type"
        )
    return heat.size - least - rest


def one_class(
    name: str, tensor: TensorInfo, type: GGMLType, members: Ints, quantisers: Quantisers
) -> TensorSpec:
    """The experts `members` of a tensor as one of `type`."""
    encode = quantisers.encoder(tensor.name, members)

    def pieces() -> Iterator[Bytes]:
        for expert in members:
            raw = tensor.expert(int(expert))
            if tensor.type == type:
                yield raw
            else:
                yield encode(type, np.asarray(dequantize(tensor.type, raw), np.float32)[None])

    return TensorSpec(name, type, (len(members), *tensor.shape[1:]), pieces)


def merged(file: GGUFFile) -> Mapping[str, tuple[str, Values] | None]:
    """For each tensor of a file's classes: the stack it begins and that stack's values; None for
    the others, which are part of such a stack. Empty for a file of uniform layers."""
    found: dict[str, tuple[str, Values] | None] = {}
    for tensor in file.tensors.values():
        match = CLASS_PART.fullmatch(tensor.name)
        if match is None:
            continue
        found[tensor.name] = None
        if match[3] == "0":
            index = f"blk.{match[2]}.ffn_exps.class"
            if index not in file.tensors:
                raise ModelFileError(f"{file.path.name}: tensor {index} is missing")
            found[index] = None
            classes = file.tensors[index].data().view(np.int32)
            found[tensor.name] = f"{match[1]}.weight", _stack(file, match[1], classes)
    return found


def _stack(file: GGUFFile, base: str, classes: npt.NDArray[np.int32]) -> Values:
    names = [f"{base}.c{c}.weight" for c in range(int(classes.max()) + 1)]
    rows = [int((classes[:e] == c).sum()) for e, c in enumerate(classes)]
    if any(name not in file.tensors for name in names) or any(
        file.tensors[name].shape[0] != int((classes == c).sum()) for c, name in enumerate(names)
    ):
        raise ModelFileError(f"{file.path.name}: {base} does not have the classes of its index")
    banks: Sequence[TensorInfo] = [file.tensors[name] for name in names]

    def load(start: int, stop: int) -> Floats:
        parts = []
        for expert in range(start, stop):
            bank = banks[classes[expert]]
            parts.append(dequantize(bank.type, bank.expert(rows[expert])))
        return np.stack(parts).astype(np.float32)

    return Values((len(classes), *banks[0].shape[1:]), load)


def header_bytes(file: GGUFFile, classes: int) -> int:
    """At most the bytes of a file beyond its tensors, with `classes` per layer, and those of
    the tensors that say which expert has which."""
    outside = sum(path.stat().st_size for path in file.paths) - file.nbytes
    stacks = [t for t in file.tensors.values() if EXPERTS.fullmatch(t.name)]
    indices = sum(4 * t.shape[0] + _LINE for t in stacks) // 3
    return int(outside + _LINE * classes * len(stacks) + indices)
