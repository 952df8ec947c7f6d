"""From one GGUF file to another with other types, tensor by tensor, in a small memory.

Knows files and rules; the types are chosen in `mixture`, the blocks made by `quantisers`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from greenroom.convert.encoding import tensor_spec
from greenroom.convert.heat import EXPERTS, Classes, Heat, header_bytes, merged
from greenroom.convert.imatrix import read_imatrix
from greenroom.convert.mixture import FLOATS, MIXES, Rules, check_mix, parse_override
from greenroom.convert.origin import origin
from greenroom.convert.quantisers import Quantisers
from greenroom.convert.values import Floats, Values
from greenroom.errors import ModelFileError, UnsupportedModelError
from greenroom.gguf import GGUFFile, TensorInfo, TensorSpec, dequantize, write_gguf


@dataclass(frozen=True, slots=True)
class Quantisation:
    """What to make of a file.

    Attributes:
        source: a GGUF file or the first of a split set.
        type: a key of `mixture.MIXES`.
        overrides: "REGEX=TYPE" rules that come first.
        imatrix: an importance matrix, or None.
        threads: None for as many as suit the machine.
        heat: gives each expert a type of its own, or None.
    """

    source: Path
    type: str
    overrides: Sequence[str] = ()
    imatrix: Path | None = None
    threads: int | None = None
    heat: Heat | None = None


def quantise_file(
    job: Quantisation, out: Path, progress: Callable[[int, int], None] | None = None
) -> int:
    """Writes the file; it appears under its name when it is whole.

    Returns:
        Bytes of tensors that an earlier run, which was stopped, had written.

    Raises:
        ModelFileError: a file is damaged, or `out` cannot be written.
        UnsupportedModelError: a type cannot be read, written or fitted.
    """
    if out.exists() and out.samefile(job.source):
        raise ModelFileError(f"{out}: this is the file that is read; give another name")
    mix = check_mix(job.type)
    importance = read_imatrix(job.imatrix) if job.imatrix is not None else {}
    quantisers = Quantisers(job.threads, importance)
    with GGUFFile(job.source) as file:
        rules = rules_of(file, mix, job.overrides)
        check_importance(file, importance, job.imatrix)
        specs = all_specs(file, rules, quantisers)
        if job.heat is not None:
            specs = mixed_specs(file, job, specs, quantisers)
        metadata = {
            **file.metadata.raw_values(),
            "general.quantization_version": 2,
            "general.file_type": MIXES[mix].file_type,
        }
        trace = job.heat.trace if job.heat is not None else None
        files = [*file.paths, *(path for path in (job.imatrix, trace) if path is not None)]
        made_from = origin(files, replace(job, threads=None))
        return write_gguf(out, metadata, specs, progress, made_from)


def all_specs(file: GGUFFile, rules: Rules, quantisers: Quantisers) -> list[TensorSpec]:
    """Every tensor by the rules; experts in classes become plain stacks again."""
    stacks, specs = merged(file), []
    for tensor in file.tensors.values():
        if tensor.name not in stacks:
            specs.append(requantised(tensor, rules, quantisers))
            continue
        whole = stacks[tensor.name]
        if whole is not None:
            name, values = whole
            type = rules.type_of(name, values.shape, values.source)
            specs.append(tensor_spec(name, type, values, quantisers.encoder(name)))
    return specs


def mixed_specs(
    file: GGUFFile, job: Quantisation, specs: Sequence[TensorSpec], quantisers: Quantisers
) -> list[TensorSpec]:
    """The same with experts in classes by heat."""
    assert job.heat is not None
    rest = [spec for spec in specs if not EXPERTS.fullmatch(spec.name)]
    rules = [rules_of(file, check_mix(mix), job.overrides) for mix in job.heat.mixes]
    size = header_bytes(file, len(rules)) + sum(spec.nbytes for spec in rest)
    classes = Classes(file, job.heat, rules, size, quantisers)
    out: list[TensorSpec] = []
    for spec in specs:
        if EXPERTS.fullmatch(spec.name):
            out += classes.specs(file.tensors[spec.name], quantisers)
        else:
            out.append(spec)
    return out


def rules_of(file: GGUFFile, mix: str, overrides: Sequence[str]) -> Rules:
    """The rules for the model in a file."""
    architecture = file.metadata.get("general.architecture")
    return Rules(
        mix,
        layers=int(file.metadata.get(f"{architecture}.block_count", 0)),
        experts=int(file.metadata.get(f"{architecture}.expert_count", 0)),
        overrides=[parse_override(text) for text in overrides],
    )


def check_importance(file: GGUFFile, importance: dict[str, Floats], path: Path | None) -> None:
    """Raises UnsupportedModelError if the matrix belongs to another model."""
    for name, weights in importance.items():
        tensor = file.tensors.get(name)
        if tensor is not None and weights.shape[-1] != tensor.ne[0]:
            raise UnsupportedModelError(
                f"{path}: {name} has {weights.shape[-1]} columns, but the model's has "
                f"{tensor.ne[0]}; the importance matrix is of another model"
            )
    if importance and not importance.keys() & file.tensors.keys():
        raise UnsupportedModelError(f"{path}: it names no tensor of this model")


def requantised(tensor: TensorInfo, rules: Rules, quantisers: Quantisers) -> TensorSpec:
    """A tensor in the type the rules give it; copied where that is the one it has."""
    if tensor.type in FLOATS or "_exps." in tensor.name or tensor.type.block_size > 1:
        type = rules.type_of(tensor.name, tensor.shape, tensor.type)
    else:
        type = tensor.type  # integers
    if type == tensor.type:
        return TensorSpec.copy(tensor)
    return tensor_spec(tensor.name, type, stored_values(tensor), quantisers.encoder(tensor.name))


def stored_values(tensor: TensorInfo) -> Values:
    """A file's tensor as values to read in pieces."""

    def load(start: int, stop: int) -> Floats:
        if len(tensor.shape) == 1:
            return tensor.dequantize()[start:stop]
        return np.asarray(dequantize(tensor.type, tensor.rows()[start:stop]), np.float32)

    return Values(tensor.shape, load, tensor.type)
