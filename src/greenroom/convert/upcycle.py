"""From a dense GGUF model to a Mixture-of-Experts one: exactly, or sparse with learned deltas.

The result is written tensor by tensor and appears under its name when it is whole.
"""

import os
from collections.abc import Callable

from greenroom.convert.upcycle_deltas import read_deltas
from greenroom.convert.upcycle_exact import exact_metadata, exact_specs, require_dense_llama
from greenroom.convert.upcycle_sparse import sparse_metadata, sparse_specs
from greenroom.gguf import GGUFFile, write_gguf

PathLike = str | os.PathLike[str]
Progress = Callable[[int, int], None]


def upcycle_exact(
    dense: PathLike, out: PathLike, experts: int = 8, progress: Progress | None = None
) -> None:
    """Cuts the FFN into `experts` equal experts, all active; logits stay the dense model's.

    Args:
        dense: a dense GGUF file of architecture `llama`, in any block format with float16
            scales, or in F32, F16, BF16.
        out: the file to write.
        experts: a power of two that cuts the FFN into whole blocks.
        progress: called with (bytes written, bytes of all tensors).

    Raises:
        ModelFileError, UnsupportedModelError: the file cannot be read, cut or written.
    """
    with GGUFFile(dense) as file:
        require_dense_llama(file)
        specs = list(exact_specs(file, experts))
        write_gguf(out, exact_metadata(file, experts), specs, progress)


def upcycle_sparse(
    dense: PathLike,
    out: PathLike,
    deltas: PathLike,
    active: float = 75,
    progress: Progress | None = None,
) -> None:
    """Turns the FFN into shared and routed experts with what `tools/distil_demo` learned.

    Args:
        dense: the dense GGUF file the deltas were learned for.
        out: the file to write.
        deltas: the file of deltas.
        active: percent of the FFN's neurons that work on one token.
        progress: called with (bytes written, bytes of all tensors).

    Raises:
        ModelFileError, UnsupportedModelError: a file cannot be used or written.
    """
    learned = read_deltas(deltas)
    with GGUFFile(dense) as file:
        require_dense_llama(file)
        metadata = sparse_metadata(file, learned, learned.used(active))
        write_gguf(out, metadata, list(sparse_specs(file, learned)), progress)
