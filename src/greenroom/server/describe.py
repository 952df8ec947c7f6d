"""What a model file says of itself, for listings: architecture, size, quantisation, template.

Read in a worker and remembered while the file does not change.
"""

import asyncio
from collections import Counter
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from greenroom.errors import GreenroomError
from greenroom.server.source import ModelSource

if TYPE_CHECKING:
    from greenroom.server.served import Served

_LONGEST = 4096  # characters of a metadata value that is shown; the template is shown whole
_known: dict[tuple[str, float, int], "Description"] = {}


@dataclass(frozen=True, slots=True)
class Description:
    """A model in a few words; empty where it is not known."""

    architecture: str = ""
    parameters: int = 0
    quantization: str = ""
    template: str = ""
    license: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    problem: str = ""  # why the file cannot be read

    @property
    def parameter_size(self) -> str:
        """`20.9B` and the like."""
        for factor, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
            if self.parameters >= factor:
                return f"{self.parameters / factor:.1f}{unit}"
        return str(self.parameters) if self.parameters else ""


async def describe(source: ModelSource, served: "Served | None", workers: Executor) -> Description:
    """The description of a model; never raises for a damaged file."""
    if source.path is None:
        config = getattr(served.engine, "model_config", None) if served else None
        return Description(architecture=str(getattr(config, "architecture", "")))
    key = (str(source.path), source.modified, source.size)
    if key not in _known:
        loop = asyncio.get_running_loop()
        _known[key] = await loop.run_in_executor(workers, read_description, source)
    return _known[key]


def read_description(source: ModelSource) -> Description:
    """Reads the file's header."""
    from greenroom.gguf import GGUFFile

    assert source.path is not None
    try:
        with GGUFFile(source.path) as file:
            metadata = file.metadata
            return Description(
                architecture=str(metadata.get("general.architecture", "")),
                parameters=sum(_elements(tensor.ne) for tensor in file.tensors.values()),
                quantization=_main_type(file.tensors.values()),
                template=str(metadata.get("tokenizer.chat_template", "")),
                license=str(metadata.get("general.license", "")),
                metadata=_shown(metadata),
            )
    except (GreenroomError, OSError) as error:
        return Description(problem=str(error))


def _elements(shape: Any) -> int:
    total = 1
    for size in shape:
        total *= int(size)
    return total


def _main_type(tensors: Any) -> str:
    """The type that most of the bytes have."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.type.name] += tensor.nbytes
    return sizes.most_common(1)[0][0] if sizes else ""


def _shown(metadata: Any) -> dict[str, Any]:
    """Scalars only: a vocabulary has no place in a listing."""
    found = {}
    for key, value in metadata.items():
        scalar = isinstance(value, bool | int | float) or (
            isinstance(value, str) and len(value) <= _LONGEST
        )
        if scalar:
            found[key] = value
    return found
