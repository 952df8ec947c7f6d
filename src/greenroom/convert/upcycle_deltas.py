"""The learned part of a sparse upcycling: which neurons form an expert, routers, small changes.

Reads the file that `tools/distil_demo` writes and checks every array against the others and
against the dense model; knows nothing of GGUF blocks.
"""

import os
import zipfile
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from greenroom.errors import ModelFileError, UnsupportedModelError

Floats = npt.NDArray[np.float32]

# Matrices with a low-rank change, and whether their inputs are the FFN's neurons.
MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
_MAX_BYTES = 64 << 20  # of one array; the shipped file has 5 MB in all


@dataclass(frozen=True, slots=True)
class Deltas:
    """Shared and routed experts of `width` neurons each; arrays have one entry per layer."""

    shared: int
    routed: int
    width: int
    arrays: dict[str, npt.NDArray[Any]]

    @property
    def neurons(self) -> int:
        """Neurons of a layer's FFN: all experts'."""
        return (self.shared + self.routed) * self.width

    @property
    def layers(self) -> int:
        """Layers of the model."""
        return len(self.arrays["order"])

    @property
    def hidden(self) -> int:
        """Channels of the residual stream."""
        return int(self.arrays["router"].shape[2])

    def used(self, percent: float) -> int:
        """Routed experts per token so that `percent` of the FFN's neurons are active.

        Raises:
            UnsupportedModelError: no number of routed experts gives that.
        """
        used = round(percent / 100 * (self.shared + self.routed)) - self.shared
        if not 1 <= used <= self.routed or percent > 100:
            low = 100 * (self.shared + 1) / (self.shared + self.routed)
            raise UnsupportedModelError(
                f"--active {percent:g}: these experts allow {low:.0f} to 100 percent of the FFN"
            )
        return used

    def order(self, layer: int) -> npt.NDArray[np.int64]:
        """(neurons,): the dense model's neuron at each place, shared experts first."""
        return np.asarray(self.arrays["order"][layer], np.int64)

    def router(self, layer: int) -> Floats:
        """(routed, hidden) float32."""
        codes, scale = self.arrays["router"][layer], self.arrays["router_scale"][layer]
        return np.asarray(codes * scale[:, None], np.float32)

    def factor(self, name: str, layer: int | None = None) -> Floats:
        """Factors of a norm's weights, or of neurons' outputs (`gain`); (n,) float32."""
        array = self.arrays[name] if layer is None else self.arrays[name][layer]
        return np.asarray(array, np.float32)

    def change(self, name: str, layer: int) -> Floats:
        """What is added to a matrix, (out, in) float32, its neurons in the new order."""
        a = self.arrays[f"{name}.a"][layer] * self.arrays[f"{name}.a_scale"][layer][:, None]
        b = self.arrays[f"{name}.b"][layer] * self.arrays[f"{name}.b_scale"][layer][:, None]
        product: Floats = (b.T @ a).astype(np.float32)
        return product


def read_deltas(path: str | os.PathLike[str]) -> Deltas:
    """Reads and checks a file of deltas.

    Raises:
        ModelFileError: it is missing, damaged or inconsistent; one line.
    """
    name = os.path.basename(path)
    try:
        with zipfile.ZipFile(path) as archive:
            if max((item.file_size for item in archive.infolist()), default=0) > _MAX_BYTES:
                raise ModelFileError(f"{name}: an array is larger than {_MAX_BYTES >> 20} MiB")
        with np.load(path, allow_pickle=False) as packed:
            arrays = dict(packed)
        shared, routed, width = (int(n) for n in arrays["layout"])
        deltas = Deltas(shared, routed, width, arrays)
        _check(deltas)
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (KeyError, ValueError, TypeError, IndexError, EOFError, zipfile.BadZipFile) as error:
        raise ModelFileError(
            f"{name}: these are no deltas of an upcycling: {str(error).splitlines()[0]}"
        ) from None
    return deltas


def _check(deltas: Deltas) -> None:
    """ValueError or KeyError where an array does not fit the others."""
    layers, hidden, neurons = deltas.layers, deltas.hidden, deltas.neurons
    if min(deltas.shared, deltas.routed - 1, deltas.width) < 1:
        raise ValueError(f"layout {deltas.shared}, {deltas.routed}, {deltas.width}")
    shapes: dict[str, tuple[int, ...]] = {
        "order": (layers, neurons),
        "router": (layers, deltas.routed, hidden),
        "router_scale": (layers, deltas.routed),
        "gain": (layers, neurons),
        "attn_norm": (layers, hidden),
        "ffn_norm": (layers, hidden),
        "output_norm": (hidden,),
    }
    for name in MATRICES:
        rank, into = deltas.arrays[f"{name}.a"].shape[1:]
        out = deltas.arrays[f"{name}.b"].shape[2]
        shapes |= {f"{name}.a": (layers, rank, into), f"{name}.b": (layers, rank, out)}
        shapes |= {f"{name}.{side}_scale": (layers, rank) for side in "ab"}
    for key, shape in shapes.items():
        if deltas.arrays[key].shape != shape:
            raise ValueError(f"{key} has shape {deltas.arrays[key].shape}, not {shape}")
        if deltas.arrays[key].dtype.kind not in "if":
            raise ValueError(f"{key} is of type {deltas.arrays[key].dtype}")
        if not np.isfinite(deltas.arrays[key].astype(np.float32)).all():
            raise ValueError(f"{key} is not finite")
    if (np.sort(deltas.arrays["order"], axis=1) != np.arange(neurons)).any():
        raise ValueError("order is not a permutation of the neurons")
