"""Files from before April 2024 have one tensor per expert: merges them, changing no block.

Knows the names `blk.N.ffn_gate.E.weight`; everything else is copied as it is.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from greenroom.convert.origin import origin
from greenroom.errors import ModelFileError, UnsupportedModelError
from greenroom.gguf import GGUFFile, TensorInfo, TensorSpec, write_gguf
from greenroom.gguf.reader import Bytes

_SPLIT = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)\.(\d+)\.weight")


def merge_experts(
    source: Path, out: Path, progress: Callable[[int, int], None] | None = None
) -> int:
    """Writes `source` with the experts of a layer in one tensor.

    Returns:
        Bytes of tensors that an earlier run, which was stopped, had written.

    Raises:
        UnsupportedModelError: the file has no such experts, or theirs differ in type.
        ModelFileError: an expert is missing.
    """
    with GGUFFile(source) as file:
        if not any(_SPLIT.fullmatch(name) for name in file.tensors):
            raise UnsupportedModelError(
                f"{source}: its experts are merged already; "
                "use 'greenroom quantize' to change its types"
            )
        specs = list(_merged(file))
        return write_gguf(out, file.metadata.raw_values(), specs, progress, origin(file.paths))


def _merged(file: GGUFFile) -> Iterator[TensorSpec]:
    groups: dict[str, dict[int, TensorInfo]] = {}
    for tensor in file.tensors.values():
        match = _SPLIT.fullmatch(tensor.name)
        if match:
            name = f"blk.{match[1]}.ffn_{match[2]}_exps.weight"
            groups.setdefault(name, {})[int(match[3])] = tensor
    for tensor in file.tensors.values():
        match = _SPLIT.fullmatch(tensor.name)
        if match is None:
            yield TensorSpec.copy(tensor)
        elif int(match[3]) == 0:
            name = f"blk.{match[1]}.ffn_{match[2]}_exps.weight"
            yield _stacked(name, groups[name], file)


def _stacked(name: str, experts: dict[int, TensorInfo], file: GGUFFile) -> TensorSpec:
    if sorted(experts) != list(range(len(experts))):
        raise ModelFileError(f"{file.path.name}: an expert of {name} is missing")
    first = experts[0]
    for tensor in experts.values():
        if (tensor.type, tensor.shape) != (first.type, first.shape):
            raise UnsupportedModelError(
                f"{file.path.name}: {tensor.name} is {tensor.type.name} {tensor.shape}, but "
                f"{first.name} is {first.type.name} {first.shape}; requantise the model first"
            )

    def pieces() -> Iterator[Bytes]:
        for expert in range(len(experts)):
            yield experts[expert].data()

    return TensorSpec(name, first.type, (len(experts), *first.shape), pieces)
