"""Mixed precision: hot experts of a layer get a finer type than cold ones, under a size.

A layer's experts of one class are stacked in one tensor, and a small tensor says which class an
expert is of (docs/mixed-precision.md). Knows traces, names and sizes; makes no blocks.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from greenroom.convert.mixture import Rules
from greenroom.convert.quantisers import Quantisers
from greenroom.convert.values import Bytes, Floats, Values
from greenroom.errors import ModelFileError, UnsupportedModelError
from greenroom.experts.trace import Trace
from greenroom.gguf import GGMLType, GGUFFile, TensorInfo, TensorSpec, dequantize

Counts = npt.NDArray[np.int64]

EXPERTS = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)_exps\.weight")
CLASS_PART = re.compile(r"(blk\.(\d+)\.ffn_(?:gate|up|down)_exps)\.c(\d+)\.weight")
HOT, COLD = 0, 1
DEFAULT_SHARE = 0.25
_LINE = 256  # bytes of a header one more tensor may take


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


class Classes:
    """The class of every expert of a file, and the tensors that makes.

    Args:
        file: the model, its experts stacked.
        heat: what decides.
        rules: those of the hot and of the cold experts.
        rest: bytes of everything that is not an expert matrix, header included.

    Raises:
        UnsupportedModelError: the experts are stored in another form, or the size cannot be
            reached.
        ModelFileError: the trace is damaged or of another model.
    """

    def __init__(self, file: GGUFFile, heat: Heat, rules: tuple[Rules, Rules], rest: int) -> None:
        self.types: dict[str, tuple[GGMLType, GGMLType]] = {}
        cost: dict[int, list[int]] = {}  # layer: bytes of one expert, hot and cold
        for tensor in file.tensors.values():
            match = EXPERTS.fullmatch(tensor.name)
            if match is None:
                continue
            hot, cold = (smaller(tensor, rule) for rule in rules)
            self.types[tensor.name] = hot, cold
            sums = cost.setdefault(int(match[1]), [0, 0])
            for i, type in enumerate((hot, cold)):
                sums[i] += tensor.shape[1] * type.row_bytes(tensor.shape[2])
        if not cost or any("_exps.c" in name or "_gate_up_" in name for name in file.tensors):
            raise UnsupportedModelError(
                f"{file.path.name}: precision by heat needs experts in three plain stacks per "
                "layer; this file has none, fused ones or classes already"
            )
        trace = Trace.load(heat.trace)
        experts = next(file.tensors[name].shape[0] for name in self.types)
        trace.fits(experts, sorted(cost), heat.trace)
        bytes_of = np.array([cost[layer] for layer in trace.layers], np.int64)
        chosen = choose(trace.counts(), bytes_of, heat, rest)
        self.of = dict(zip(trace.layers, chosen, strict=True))

    def specs(self, tensor: TensorInfo, quantisers: Quantisers) -> Iterator[TensorSpec]:
        """What an expert matrix becomes."""
        match = EXPERTS.fullmatch(tensor.name)
        assert match is not None
        of = self.of[int(match[1])]
        types = self.types[tensor.name]
        base = tensor.name.removesuffix(".weight")
        present = [c for c in (HOT, COLD) if (of == c).any()]
        if match[2] == "gate" and len(present) > 1:
            name = f"blk.{match[1]}.ffn_exps.class"
            yield TensorSpec(name, GGMLType.I32, of.shape, of.astype(np.int32))
        for c in present:
            name = f"{base}.c{c}.weight" if len(present) > 1 else tensor.name
            yield one_class(name, tensor, types[c], np.flatnonzero(of == c), quantisers)


def smaller(tensor: TensorInfo, rules: Rules) -> GGMLType:
    """The type the rules give, or the tensor's own where that takes no more bytes."""
    wanted = rules.type_of(tensor.name, tensor.shape, GGMLType.F32)
    columns = tensor.shape[-1]
    return min(tensor.type, wanted, key=lambda type: type.row_bytes(columns))


def choose(counts: Counts, bytes_of: Counts, heat: Heat, rest: int) -> Counts:
    """The class of each expert, (layers, experts): most routes per byte of finer blocks.

    Args:
        counts: routes, (layers, experts).
        bytes_of: one expert's bytes, hot and cold, (layers, 2).
        heat: the share or the size.
        rest: bytes of everything else.

    Raises:
        UnsupportedModelError: even with cold experts only the file is too large.
    """
    experts = counts.shape[1]
    extra = np.maximum(bytes_of[:, HOT] - bytes_of[:, COLD], 0)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    order = np.argsort(-(share / np.maximum(extra, 1)[:, None]), axis=None, kind="stable")
    room = int(experts * extra.sum() * (DEFAULT_SHARE if heat.share is None else heat.share))
    if heat.size is not None:
        least = rest + experts * int(bytes_of[:, COLD].sum())
        room = heat.size - least
        if room < 0:
            raise UnsupportedModelError(
                f"a size of {heat.size / 2**20:.1f} MiB cannot be reached: with cold experts only "
                f"the file has {least / 2**20:.1f} MiB; choose a coarser --cold-type or --type"
            )
    classes = np.full(counts.shape, COLD, np.int64)
    for index in order:
        layer = index // experts
        if extra[layer] <= room:
            room -= int(extra[layer])
            classes[layer, index % experts] = HOT
    return classes


def one_class(
    name: str, tensor: TensorInfo, type: GGMLType, members: Counts, quantisers: Quantisers
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
    """At most the bytes of a file beyond its tensors, with `classes` per layer."""
    outside = sum(path.stat().st_size for path in file.paths) - file.nbytes
    return int(outside + _LINE * classes * len(file.tensors))
