"""The measured rates of a machine: `MachineProfile`, kept as JSON in the user's cache folder.

`greenroom doctor` measures and saves one per machine; the planner and `greenroom plan` read it.
A file is checked on load and used only for the machine whose fingerprint it bears. Measures
nothing itself.
"""

import contextlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from greenroom.errors import GreenroomError
from greenroom.placement.folder import cache_folder

KIND = "greenroom machine"
VERSION = 1
# Tokens of a matrix at which kernels are measured besides one; experts share 512 tokens.
FEW, MANY, MANY_EACH = 4, 512, 32
# Operations for each number that those matrices give: of an expert's three, 2,048 x 768, and of one
# of 2,048 columns. Narrower ones give more numbers for the same operations.
EXPERT_DENSITY = 6 * 2048 * 768 / (2 * 768 + 2048)
DENSE_DENSITY = 2 * 2048
KEY_TILE = 64  # keys that the CPU's attention scores at a time
_LARGEST_FILE = 1 << 20  # bytes; a profile has a few thousand
_MOST = 1e7  # no rate of a machine is above this, in any unit used here


class ProfileError(GreenroomError):
    """A machine's profile is missing, damaged or of another version."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineProfile:
    """Rates in GB/s (1e9 bytes) unless said otherwise.

    Attributes:
        fingerprint: of the machine they were measured on; see `Machine.fingerprint`.
        name: of processor and GPU, for people.
        date: when, ISO 8601.
        threads: the kernels used.
        ram: bytes of RAM this process may use.
        gpu: its name, None without one.
        vram_total: bytes.
        dram: read rate by threads.
        experts: weight bytes read by the expert kernel, one token, by format.
        dense: the same of the dense kernel.
        experts_batch: GOP/s of the expert kernel at 512 tokens, 32 for each expert, by format.
        dense_batch: the same of the dense kernel, all tokens for the matrix.
        experts_few, dense_few: the same at 4 tokens for each expert or matrix.
        attention_prompt: GOP/s of attention over a prompt of 512 tokens on the CPU.
        attention_step: GOP/s of attention of one token over 512.
        expert_output_seconds: each number that an expert's matrices give for a token takes,
            besides its products: activation, cutting into planes, sums over experts.
        dense_output_seconds: the same of a dense matrix.
        norm_seconds: each number of a row takes in a norm with its residual sum.
        int8, float32: GOP/s of instructions on registers alone.
        pcie_up, pcie_down: pinned copies to the GPU and back, by MiB of a copy.
        pcie_both: up and down at once, together; 0 without a GPU.
        vram: read rate of VRAM.
        gpu_bf16: GOP/s of a large matrix product.
        disk: direct reads by MiB of a read; empty where the disk has none.
        step_seconds: a short step on the CPU takes whatever the model: scheduling, sampling.
        matrix_seconds: of every matrix such a step uses, whatever its size: handing rows to
            threads, starting to read, what stands between products. Both in seconds.
    """

    fingerprint: str
    name: str
    date: str
    threads: int
    ram: int
    gpu: str | None = None
    vram_total: int = 0
    dram: Mapping[int, float] = field(default_factory=dict)
    experts: Mapping[str, float] = field(default_factory=dict)
    dense: Mapping[str, float] = field(default_factory=dict)
    experts_batch: Mapping[str, float] = field(default_factory=dict)
    dense_batch: Mapping[str, float] = field(default_factory=dict)
    experts_few: Mapping[str, float] = field(default_factory=dict)
    dense_few: Mapping[str, float] = field(default_factory=dict)
    attention_prompt: float = 0.0
    attention_step: float = 0.0
    expert_output_seconds: float = 0.0
    dense_output_seconds: float = 0.0
    norm_seconds: float = 0.0
    int8: float = 0.0
    float32: float = 0.0
    pcie_up: Mapping[int, float] = field(default_factory=dict)
    pcie_down: Mapping[int, float] = field(default_factory=dict)
    pcie_both: float = 0.0
    vram: float = 0.0
    gpu_bf16: float = 0.0
    disk: Mapping[int, float] = field(default_factory=dict)
    step_seconds: float = 0.0
    matrix_seconds: float = 0.0

    def json(self) -> dict[str, Any]:
        """The document that `parse` reads."""
        return {"kind": KIND, "version": VERSION, **asdict(self)}

    @property
    def dram_best(self) -> float:
        """GB/s: the ceiling of whatever the CPU reads."""
        return max(self.dram.values(), default=0.0)

    @property
    def pcie(self) -> float:
        """GB/s to the GPU with large pinned copies."""
        return max(self.pcie_up.values(), default=0.0)

    def expert_rate(self, format: str) -> float:
        """GB/s of the expert kernel; of a format not measured, the slowest measured one's."""
        return _of(self.experts, format, self.dram_best)

    def dense_rate(self, format: str) -> float:
        """GB/s of the dense kernel, likewise."""
        return _of(self.dense, format, self.dram_best)

    def expert_batch_rate(self, format: str) -> float:
        """GOP/s of the expert kernel at many tokens, likewise."""
        return _of(self.experts_batch, format, self.int8)

    def expert_seconds(
        self, sizes: Mapping[str, int], rows: float, values: int, outputs: int = 0
    ) -> float:
        """Seconds of the expert kernel over all of `sizes`, bytes by format and `values` weights
        in all, with `rows` tokens for each expert; `outputs` are the rows of all matrices.
        """
        kernel = (self.expert_rate, self.experts_few, self.experts_batch, MANY_EACH)
        more = max(0.0, outputs - 2 * values / EXPERT_DENSITY) * self.expert_output_seconds
        return self._kernel_seconds(kernel, sizes, rows, values) + rows * more

    def dense_seconds(
        self, sizes: Mapping[str, int], rows: float, values: int, outputs: int = 0
    ) -> float:
        """The same of the dense kernel."""
        kernel = (self.dense_rate, self.dense_few, self.dense_batch, MANY)
        more = max(0.0, outputs - 2 * values / DENSE_DENSITY) * self.dense_output_seconds
        return self._kernel_seconds(kernel, sizes, rows, values) + rows * more

    def prompt_attention_seconds(self, operations: float, first: float) -> float:
        """Seconds of a prompt's attention on the CPU: `operations` in all, and `first` those of
        every query with one key; on average half a tile of keys is scored in vain.
        """
        if not self.attention_prompt:
            return 0.0
        measured = (MANY + 1) / 2
        rate = self.attention_prompt * (measured + KEY_TILE / 2) / measured
        return (operations + first * KEY_TILE / 2) / 1e9 / rate

    def _kernel_seconds(
        self, kernel: "_Kernel", sizes: Mapping[str, int], rows: float, values: int
    ) -> float:
        reading, few, many, most = kernel
        total, seconds = sum(sizes.values()) or 1, 0.0
        for name, size in sizes.items():
            weights = values * size / total
            points = [(1.0, size / 1e9 / max(reading(name), 1e-3))]
            for count, rates in ((FEW, few), (most, many)):
                if rates:
                    rate = max(_of(rates, name, self.int8), 1e-3)
                    points.append((float(count), 2 * count * weights / 1e9 / rate))
            seconds += _along(points, rows)
        return seconds


_Kernel = tuple[Callable[[str], float], Mapping[str, float], Mapping[str, float], int]


def _along(points: Sequence[tuple[float, float]], x: float) -> float:
    """The value at x of the line through (x, y) points, none smaller than the one before; what
    is outside goes on like the nearest piece, but not below the first value."""
    rising = [points[0]]
    for point in points[1:]:
        rising.append((point[0], max(point[1], rising[-1][1])))
    if x <= 1 or len(rising) == 1:
        return rising[0][1]
    i = next((i for i in range(1, len(rising)) if x <= rising[i][0]), len(rising) - 1)
    (x0, y0), (x1, y1) = rising[i - 1], rising[i]
    return y0 + (x - x0) * (y1 - y0) / (x1 - x0)


def _of(rates: Mapping[str, float], format: str, otherwise: float) -> float:
    return rates.get(format) or min(rates.values(), default=otherwise)


def profile_path(fingerprint: str) -> Path:
    """Where this machine's profile is kept."""
    return cache_folder() / f"machine-{fingerprint}.json"


def save_profile(profile: MachineProfile, path: Path | None = None) -> Path:
    """Writes a profile; the file appears whole. OSError if the folder cannot be written."""
    path = path or profile_path(profile.fingerprint)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(profile.json(), indent=1) + "\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def load_profile(path: Path) -> MachineProfile:
    """Reads a profile; ProfileError says in one line what is wrong with the file."""
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise ProfileError(f"{path}: too large for a machine's profile")
        document = json.loads(path.read_text())
    except OSError as error:
        raise ProfileError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise ProfileError(f"{path}: this is no JSON; run 'greenroom doctor' again") from None
    try:
        return parse(document)
    except (TypeError, ValueError, AttributeError) as error:
        raise ProfileError(f"{path}: {error}; run 'greenroom doctor' again") from None


def saved_profile(fingerprint: str) -> MachineProfile | None:
    """What was measured on the machine with this fingerprint; None if nothing usable was."""
    with contextlib.suppress(ProfileError):
        profile = load_profile(profile_path(fingerprint))
        if profile.fingerprint == fingerprint:
            return profile
    return None


def parse(document: Any) -> MachineProfile:
    """A profile from its document; ValueError names the field that is wrong."""
    if isinstance(document, dict) and isinstance(document.get("profile"), dict):
        document = document["profile"]  # what `greenroom doctor --json` prints
    if not isinstance(document, dict) or document.get("kind") != KIND:
        raise ValueError(f"this is not a document of the kind {KIND!r}")
    if document.get("version") != VERSION:
        raise ValueError(f"version {document.get('version')!r} is not {VERSION}")
    known = {f.name: _type_name(f.type) for f in fields(MachineProfile)}
    unknown = sorted(set(document) - set(known) - {"kind", "version"})
    if unknown:
        raise ValueError(f"field {unknown[0]!r:.40} is unknown")
    missing = {"fingerprint", "name", "date", "threads", "ram"} - set(document)
    if missing:
        raise ValueError(f"field {min(missing)!r} is missing")
    values = {name: _value(name, known[name], document[name]) for name in known if name in document}
    return MachineProfile(**values)


def _type_name(annotation: Any) -> str:
    text = getattr(annotation, "__name__", "") if isinstance(annotation, type) else ""
    return text or str(annotation).removeprefix("collections.abc.")


def _value(name: str, kind: str, value: Any) -> Any:
    if kind.startswith("Mapping"):
        if not isinstance(value, dict) or len(value) > 100:
            raise ValueError(f"{name} must be a table of rates")
        whole = kind.startswith("Mapping[int")
        return {int(key) if whole else str(key): _rate(name, rate) for key, rate in value.items()}
    if kind == "float":
        return _rate(name, value)
    if kind == "int":
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 50:
            raise ValueError(f"{name} must be a whole number, not {value!r:.40}")
        return value
    if not (isinstance(value, str) and len(value) < 500) and not (value is None and "None" in kind):
        raise ValueError(f"{name} must be a text, not {value!r:.40}")
    return value


def _rate(name: str, value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not 0 <= value < _MOST:
        raise ValueError(f"{name} must be a rate, not {value!r:.40}")
    return float(value)
