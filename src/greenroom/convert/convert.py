"""From a checkpoint to one GGUF file, in a small memory: read, rename, round, write.

The result appears under its name when it is whole; a run that was stopped goes on where it was.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from greenroom.convert.checkpoint import Checkpoint
from greenroom.convert.config import Config
from greenroom.convert.encoding import tensor_spec
from greenroom.convert.families import FAMILIES
from greenroom.convert.families.base import Family
from greenroom.convert.families.gpt_oss_original import MARK
from greenroom.convert.mixture import MIXES, Rules, check_mix, parse_override
from greenroom.convert.origin import origin
from greenroom.convert.quantisers import Quantisers
from greenroom.convert.vocabulary import tokenizer_metadata
from greenroom.errors import ModelFileError, UnsupportedModelError
from greenroom.gguf import GGMLType, TensorSpec, write_gguf

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Conversion:
    """What to make of a checkpoint.

    Attributes:
        folder: in HF's layout, or as OpenAI publishes gpt-oss.
        type: a key of `mixture.MIXES`, or "auto" for the checkpoint's own.
        overrides: "REGEX=TYPE" rules that come first.
        name: of the model; by default the folder's.
        threads: of the quantisers.
    """

    folder: Path
    type: str = "auto"
    overrides: Sequence[str] = ()
    name: str | None = None
    threads: int | None = None


def convert(job: Conversion, out: Path, progress: Progress | None = None) -> int:
    """Writes the file; returns the bytes an earlier run that was stopped had written of it.

    Raises:
        ModelFileError: the checkpoint is damaged or incomplete, or `out` cannot be written.
        UnsupportedModelError: the class or a variant of it is not implemented.
        TokenizerError: the tokenizer cannot be stored.
    """
    if not job.folder.is_dir():
        raise ModelFileError(f"{job.folder}: this is no folder; give one with a config.json")
    mix = "auto" if job.type == "auto" else check_mix(job.type)
    checkpoint = Checkpoint(job.folder)
    family = find_family(checkpoint, Config.read(job.folder))
    keys = family.metadata()
    prefix = family.architecture
    rules = Rules(
        mix,
        layers=keys[f"{prefix}.block_count"],
        experts=keys.get(f"{prefix}.expert_count", 0),
        overrides=[parse_override(text) for text in job.overrides],
    )
    quantisers = Quantisers(job.threads)
    specs = [
        tensor_spec(
            name,
            rules.type_of(name, values.shape, values.source),
            values,
            quantisers.encoder(name),
            checkpoint.release,
        )
        for name, values in family.tensors()
    ]
    metadata = {
        **general_metadata(prefix, job.name or job.folder.resolve().name),
        **keys,
        **tokenizer_metadata(job.folder, family.config),
        "general.quantization_version": 2,
        "general.file_type": MIXES[mix].file_type if mix != "auto" else file_type(specs),
    }
    files = [*checkpoint.paths, family.config.path]
    return write_gguf(out, metadata, specs, progress, origin(files, replace(job, threads=None)))


def general_metadata(architecture: str, name: str) -> dict[str, Any]:
    """Keys that say what the file is."""
    return {
        "general.architecture": architecture,
        "general.type": "model",
        "general.name": name,
    }


def find_family(checkpoint: Checkpoint, config: Config) -> Family:
    """The converter of a checkpoint; UnsupportedModelError if there is none."""
    names = config.get("architectures", default=[])
    if MARK in checkpoint:
        names = ["OpenAI original"]
    for name in names if isinstance(names, list) else [names]:
        if name in FAMILIES:
            module, _, kind = FAMILIES[name].partition(":")
            found: type[Family] = getattr(importlib.import_module(module), kind)
            return found(checkpoint, config)
    raise UnsupportedModelError(
        f"{config.path}: architectures = {names!r:.60} is not implemented; "
        f"implemented: {', '.join(FAMILIES)}"
    )


def file_type(specs: Sequence[TensorSpec]) -> int:
    """`general.file_type` for the type that has most bytes."""
    sizes: dict[GGMLType, int] = {}
    for spec in specs:
        sizes[spec.type] = sizes.get(spec.type, 0) + spec.nbytes
    most = max(sizes, key=lambda type: sizes[type])
    return next((mix.file_type for mix in MIXES.values() if mix.base == most), 0)
