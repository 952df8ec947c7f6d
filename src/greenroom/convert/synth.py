"""Writes a GGUF file with a published model's exact shapes and random weights.

It serves to measure a model on a machine before downloading it. The file is made piece by
piece on several threads and is the same for the same seed, whatever their number. Its routing
is close to uniform, so caches of experts do worse on it than on a trained model; with a skew some
experts of each layer are in demand more often than others, as in trained ones.
"""

import os
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from greenroom.convert.synth_shapes import Part, Role, Shape, parts_of
from greenroom.convert.synth_types import FILE_TYPES, check_mix, type_of
from greenroom.convert.synth_vocabulary import tokenizer_metadata
from greenroom.gguf import GGMLType, TensorSpec, random_blocks, write_gguf

Bytes = npt.NDArray[np.uint8]

_PIECE_BYTES = 8 << 20
_AHEAD = 32  # pieces in work or waiting: 256 MiB, enough for the threads of one machine
_LONG_FACTOR = 32.0  # published long factors of Phi grow to about this


@dataclass(frozen=True, slots=True)
class Synthesis:
    """A file to be made: sizes, mix of types (None: as published), seed, and skew of the routing.

    Router rows are multiplied by rank ** -skew, ranks being dealt out anew in every layer: the
    larger an expert's logits, the more often they are among the largest.
    """

    shape: Shape
    mix: str | None = None
    seed: int = 0
    skew: float = 0.0

    def specs(self, pool: ThreadPoolExecutor | None = None) -> list[TensorSpec]:
        """Every tensor; without a pool only for asking sizes."""
        mix = check_mix(self.mix or self.shape.mix)
        specs = []
        for part in parts_of(self.shape):
            type = type_of(part, self.shape, mix)
            specs.append(TensorSpec(part.name, type, part.shape, self._maker(part, type, pool)))
        return specs

    def nbytes(self) -> int:
        """Bytes of all tensors; the file has a header besides."""
        return sum(spec.nbytes for spec in self.specs())

    def metadata(self) -> dict[str, Any]:
        """All metadata, in the order of the distributed files."""
        shape = self.shape
        return {
            "general.architecture": shape.architecture,
            "general.type": "model",
            "general.name": shape.title + " (random weights)",
            "general.description": "Published shapes with random weights, for measurements only",
            **shape.metadata(),
            **tokenizer_metadata(shape.tokens, shape.vocabulary),
            "general.quantization_version": 2,
            "general.file_type": FILE_TYPES[check_mix(self.mix or shape.mix)],
        }

    def _maker(
        self, part: Part, type: GGMLType, pool: ThreadPoolExecutor | None
    ) -> Callable[[], Iterator[Bytes]]:
        def made() -> Iterator[Bytes]:
            if part.role in (Role.MATRIX, Role.EXPERTS, Role.ROUTER):
                assert pool is not None, "sizes only"
                pieces = _matrix(part, type, self.seed, pool)
                if part.role is Role.ROUTER and self.skew:
                    return _skewed(part, self.skew, self.seed, pieces)
                return pieces
            return iter([_vector(part, _generator(self.seed, part.name, 0))])

        return made


def write_synthetic(
    job: Synthesis,
    path: str | os.PathLike[str],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes the file; it appears under its name when it is whole.

    Args:
        job: what to make.
        path: the file; one that is there is replaced.
        progress: called with (bytes written, bytes of all tensors).

    Raises:
        UnsupportedModelError: the mix is none, or the vocabulary is too small.
        ModelFileError: the disk has too little room, or the path cannot be written.
    """
    threads = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(threads) as pool:
        write_gguf(Path(path), job.metadata(), job.specs(pool), progress)


def _generator(seed: int, name: str, piece: int) -> np.random.Generator:
    """The source of one piece's bits: it depends on nothing that other pieces do."""
    sequence = np.random.SeedSequence([seed, zlib.crc32(name.encode()), piece])
    return np.random.Generator(np.random.SFC64(sequence))


def _matrix(part: Part, type: GGMLType, seed: int, pool: ThreadPoolExecutor) -> Iterator[Bytes]:
    """Rows in pieces of a few megabytes, some made ahead of the one being written."""
    *outer, columns = part.shape
    rows = int(np.prod(outer))
    step = max(1, _PIECE_BYTES // type.row_bytes(columns))
    # The residual stream begins at the size of one number per channel.
    scale = 1.0 if part.name == "token_embd.weight" else None
    waiting: deque[Future[Bytes]] = deque()
    for piece, start in enumerate(range(0, rows, step)):
        count = min(step, rows - start)
        rng = _generator(seed, part.name, piece)
        waiting.append(pool.submit(random_blocks, type, count, columns, rng, scale))
        if len(waiting) > _AHEAD:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _skewed(part: Part, skew: float, seed: int, pieces: Iterator[Bytes]) -> Iterator[Bytes]:
    """A router in float32, its rows scaled; see `Synthesis`."""
    experts, columns = part.shape
    ranks = _generator(seed, part.name + ".ranks", 0).permutation(experts) + 1
    rows = np.concatenate([piece.reshape(-1) for piece in pieces]).view(np.float32)
    scaled = rows.reshape(experts, columns) * (ranks[:, None] ** -skew).astype(np.float32)
    return iter([scaled.view(np.uint8)])


def _vector(part: Part, rng: np.random.Generator) -> Bytes:
    """Norms near one, biases near zero, RoPE factors as a published model's grow."""
    if part.role is Role.FACTORS:
        top = _LONG_FACTOR if "long" in part.name else 1.0
        values = np.geomspace(1.0, top, part.shape[0], dtype=np.float32)
    else:
        values = rng.standard_normal(part.shape, np.float32)
        values *= np.float32(0.05)
        values += np.float32(part.role is Role.NORM)
    return values.view(np.uint8)
