"""What was routed where: a record of the experts each token used in each layer, kept in a file.

Read by whoever wants to know the popular experts (warm starts, precision by heat, statistics);
written by a recorder that the MoE blocks of any backend report to. Knows no model and no policy.
"""

import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from greenroom.errors import ModelFileError

NOBODY = -1  # a layer that did not compute a token: the last one skips rows nobody asked for
ERRORS = 0.05, 0.1  # relative to the outputs: about what six-bit and four-bit weights leave

_VERSION = 1
_FIELDS = ("version", "model", "experts", "layers", "routes", "starts")
_OPTIONAL = "sensitivity"
_MOST_BYTES = 4 << 30  # of one array; a million tokens of 48 layers and 8 routes take 0.8 GB
_MOST_EXPERTS = 1 << 16


@dataclass(frozen=True, slots=True)
class Trace:
    """The routes of some tokens, in the order in which they were computed.

    Args:
        model: name of the model they are of.
        experts: in each MoE layer.
        layers: block numbers of the MoE layers, ascending.
        routes: (tokens, moe_layers, k) int16 or int32, expert ids; -1 (in all k places) where
            a layer did not compute the token.
        starts: (sequences,) int64, ascending, the token with which each sequence begins.
        sensitivity: (moe_layers, experts, 2) float64, nats of divergence that errors of the
            sizes ERRORS in an expert's outputs cause; None where it was not measured.

    Raises:
        ValueError: the parts do not fit together.
    """

    model: str
    experts: int
    layers: tuple[int, ...]
    routes: NDArray[np.signedinteger[Any]]
    starts: NDArray[np.int64]
    sensitivity: NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        routes, starts = self.routes, self.starts
        if routes.ndim != 3 or routes.dtype not in (np.int16, np.int32):
            raise ValueError("routes must be (tokens, moe_layers, k) int16 or int32")
        if routes.shape[1] != len(self.layers) or not self.layers or not routes.shape[2]:
            raise ValueError(f"{len(self.layers)} layers, but routes of {routes.shape[1]}")
        if self.layers[0] < 0 or any(np.diff(self.layers) <= 0):
            raise ValueError("layers are not ascending block numbers")
        if not 0 < self.experts <= _MOST_EXPERTS:
            raise ValueError(f"{self.experts} experts")
        if routes.size and not NOBODY <= routes.min() <= routes.max() < self.experts:
            raise ValueError(f"a route is not one of {self.experts} experts")
        if starts.ndim != 1 or starts.dtype != np.int64 or (np.diff(starts) <= 0).any():
            raise ValueError("starts must be ascending int64")
        if len(starts) and not 0 <= starts[0] <= starts[-1] < len(routes):
            raise ValueError("a sequence starts outside the tokens")
        known = self.sensitivity
        if known is not None and (
            known.shape != (len(self.layers), self.experts, len(ERRORS))
            or known.dtype != np.float64
            or not (np.isfinite(known) & (known >= 0)).all()
        ):
            raise ValueError("a sensitivity must be two finite float64 per expert, 0 or more")

    @property
    def tokens(self) -> int:
        """Tokens recorded."""
        return len(self.routes)

    @property
    def selected(self) -> int:
        """Experts per token and layer."""
        return int(self.routes.shape[2])

    def counts(self) -> NDArray[np.int64]:
        """(moe_layers, experts) int64: how often each expert was used."""
        layers = len(self.layers)
        rows = np.broadcast_to(np.arange(layers)[:, None], self.routes.shape[1:])
        flat = rows * self.experts + self.routes
        used = flat[self.routes != NOBODY]
        return np.bincount(used, minlength=layers * self.experts).reshape(layers, self.experts)

    def heat(self, half_life: float = 256) -> NDArray[np.float64]:
        """(moe_layers, experts): the heat, as `residency` counts it, at which a steady stream of
        tokens like these would settle; a warm start begins with it.
        """
        return steady_heat(self.counts(), self.tokens, half_life)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a NumPy archive under exactly this name; it appears there when it is whole.

        Raises:
            ModelFileError: the file cannot be written.
        """
        path = Path(path)
        part = path.with_name(path.name + ".part")
        values: dict[str, Any] = {
            "version": np.int64(_VERSION),
            "model": np.frombuffer(self.model.encode(), np.uint8),
            "experts": np.int64(self.experts),
            "layers": np.array(self.layers, np.int64),
            "routes": self.routes,
            "starts": self.starts,
        }
        if self.sensitivity is not None:
            values[_OPTIONAL] = self.sensitivity
        try:
            with part.open("wb") as file:
                np.savez_compressed(file, **values)
            part.replace(path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise ModelFileError(f"{path}: cannot be written: {error.strerror}") from None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Trace":
        """Reads what `save` wrote.

        Raises:
            ModelFileError: the file is missing, damaged or something else.
        """
        try:
            with zipfile.ZipFile(path) as archive:
                values = {name: _read(archive, name) for name in _FIELDS}
                there = f"{_OPTIONAL}.npy" in archive.namelist()
                sensitivity = _read(archive, _OPTIONAL) if there else None
            if values["version"] != _VERSION:
                raise ValueError(f"version {values['version']}, known is {_VERSION}")
            return cls(
                bytes(values["model"]).decode(),
                int(values["experts"]),
                tuple(int(layer) for layer in values["layers"]),
                values["routes"],
                values["starts"],
                sensitivity,
            )
        except OSError as error:
            message = f"{path}: cannot be opened: {error.strerror or error}"
            raise ModelFileError(message) from None
        # zlib's and zipfile's errors of damaged members have no common base.
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ModelFileError(
                f"{path}: this is no trace, or it is damaged ({reason}); "
                "'greenroom profile' writes one"
            ) from None

    def fits(self, experts: int, layers: Sequence[int], path: object) -> None:
        """Raises ModelFileError, naming `path`, if the trace is not of such a model.

        Args:
            experts: in each of the model's MoE layers.
            layers: their block numbers.
        """
        if self.experts == experts and self.layers == tuple(layers):
            return
        raise ModelFileError(
            f"{path}: this trace is of {self.model}, {len(self.layers)} layers of "
            f"{self.experts} experts, but the model has {len(layers)} layers of {experts}; "
            "record one with 'greenroom profile'"
        )


def _read(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    """One array of the archive, only if its header and its size agree and are sane."""
    info = archive.getinfo(f"{name}.npy")
    if info.file_size > _MOST_BYTES:
        raise ValueError(f"{name} has {info.file_size} bytes")
    with archive.open(info) as file:
        shape, dtype = _header(file)
        if dtype.hasobject or min(shape, default=1) < 0:
            raise ValueError(f"{name} holds no numbers")
        nbytes = dtype.itemsize
        for dimension in shape:
            nbytes *= dimension
        if nbytes != info.file_size - file.tell():
            raise ValueError(f"{name} is cut off")
        data = np.frombuffer(bytearray(file.read(nbytes)), dtype)
    return data.reshape(shape)


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"array format {version}")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if fortran:
        raise ValueError("array in Fortran order")
    return shape, dtype


def steady_heat(
    counts: NDArray[np.int64], tokens: int, half_life: float = 256
) -> NDArray[np.float64]:
    """Where counts that halve every `half_life` tokens settle, given those of some tokens."""
    return np.asarray(counts / max(tokens, 1) * half_life / np.log(2))


class TraceRecorder:
    """Collects routes while a model runs; one step's routes are copied from a device together.

    Args:
        layers: block numbers of the MoE layers, ascending.
        experts: in each of them.
        limit: tokens after which nothing more is recorded; None for no limit.
    """

    def __init__(self, layers: Sequence[int], experts: int, limit: int | None = None) -> None:
        self.layers = tuple(layers)
        self.experts = experts
        self.limit = limit
        self._place = {layer: index for index, layer in enumerate(self.layers)}
        self._dtype = np.int16 if experts <= 2**15 else np.int32
        self._steps: list[NDArray[Any]] = []
        self._starts: list[NDArray[np.int64]] = []
        self._tokens = 0
        self._step: tuple[Tensor, Tensor] | None = None
        self._ids: dict[int, Tensor] = {}

    @property
    def full(self) -> bool:
        """Whether the limit is reached."""
        return self.limit is not None and self._tokens >= self.limit

    def begin(self, positions: Tensor, output_rows: Tensor) -> None:
        """A step begins; what is added from now on belongs to it.

        Args:
            positions: (tokens,) integers, place of each token in its sequence, in RAM.
            output_rows: (outputs,) int64, the rows the last layer computes, in RAM.
        """
        self.flush()
        if not self.full:
            self._step = positions, output_rows

    def add(self, layer: int, ids: Tensor) -> None:
        """The routes of one layer; must not be called while a graph is captured.

        Args:
            layer: block number.
            ids: (tokens, k) int32, or (outputs, k) of the step's output rows, on any device.
        """
        if self._step is not None:
            self._ids[layer] = ids.clone()  # the router may use its memory again

    def flush(self) -> None:
        """Ends the step; waits for the device that computed it."""
        if self._step is None or not self._ids:
            self._step = None
            return
        (positions, output_rows), self._step = self._step, None
        added, self._ids = self._ids, {}
        tokens, k = len(positions), next(iter(added.values())).shape[1]
        routes = np.full((tokens, len(self.layers), k), NOBODY, self._dtype)
        there = torch.cat(list(added.values())).cpu().numpy()
        begin = 0
        for layer, ids in added.items():
            count = len(ids)
            rows = slice(None) if count == tokens else output_rows.numpy()
            routes[rows, self._place[layer]] = there[begin : begin + count]
            begin += count
        keep = tokens if self.limit is None else min(tokens, self.limit - self._tokens)
        starts = np.flatnonzero(positions[:keep].numpy() == 0)
        self._starts.append(starts + self._tokens)
        self._steps.append(routes[:keep])
        self._tokens += keep

    def trace(self, model: str) -> Trace:
        """Everything recorded so far; `model` names what was running."""
        self.flush()
        empty = np.empty((0, len(self.layers), 1), self._dtype)
        routes = np.concatenate(self._steps) if self._steps else empty
        starts = np.concatenate(self._starts) if self._starts else np.empty(0, np.int64)
        return Trace(model, self.experts, self.layers, routes, starts.astype(np.int64))
