"""The measured rates of a machine: `MachineProfile`, kept as JSON in the user's cache folder.

`greenroom doctor` measures and saves one per machine; the planner and `greenroom plan` read it.
A file is checked on load and used only for the machine whose fingerprint it bears. Measures
nothing itself.
"""

import contextlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from greenroom.errors import GreenroomError
from greenroom.placement.folder import cache_folder

KIND = "greenroom machine"
VERSION = 1
KEY_TILE = 64  # keys that the CPU's attention scores at a time
SCORED = 512  # tokens of the prompts whose attention is measured
_LARGEST_FILE = 1 << 20  # bytes; a profile has a few thousand
# Measured once; files have them still.
_FORMER = ("experts_few", "dense_few", "dense_batch")
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
        reads: read rate of all threads by MiB read over and over, small ones from the cache.
        experts: weight bytes read by the expert kernel, one token, by format.
        dense: the same of the dense kernel.
        experts_batch: GOP/s of the expert kernel at 512 tokens, 32 for each expert, by format.
        tile_one, tile_four, tile_wide: GOP/s of a matrix in the cache with 1, 4 and 16 tokens.
        tile_two, tile_eight: with 2 and 8, where kernels have tiles of them; empty elsewhere.
        tile_further: the same of the 17th to 128th token.
        attention_prompt: GOP/s of attention over a prompt of 512 tokens on the CPU, heads of 64.
        attention_wide: the same with heads of 128.
        attention_step: GOP/s of attention of one token over 512 that are read from RAM, 4 heads
            of 64 to a key.
        attention_step_wide: the same with heads of 128.
        expert_output_seconds: each number that an expert gives for a token takes, besides its
            products: cutting the input into planes, activation, sums over experts.
        dense_output_seconds: the same of a dense matrix narrower than `DENSITY` says.
        norm_seconds: each number of a row takes in a norm with its residual sum.
        int8, float32: GOP/s of instructions on registers alone.
        pcie_up, pcie_down: pinned copies to the GPU and back, by MiB of a copy.
        pcie_both: up and down at once, together; 0 without a GPU.
        vram: read rate of VRAM.
        gpu_bf16: GOP/s of a large matrix product.
        disk: direct reads by MiB of a read; empty where the disk has none.
        step_seconds: a short step on the CPU takes whatever the model: scheduling, sampling.
        matrix_seconds: of every matrix such a step uses, whatever its size: handing rows to
            threads, starting to read, what stands between products.
        sequence_seconds: of every further sequence of a step.
        prompt_seconds, token_seconds: of the step of a prompt that has waited for nothing, and of
            each of its tokens. All five in seconds.
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
    reads: Mapping[int, float] = field(default_factory=dict)
    tile_one: Mapping[str, float] = field(default_factory=dict)
    tile_two: Mapping[str, float] = field(default_factory=dict)
    tile_four: Mapping[str, float] = field(default_factory=dict)
    tile_eight: Mapping[str, float] = field(default_factory=dict)
    tile_wide: Mapping[str, float] = field(default_factory=dict)
    tile_further: Mapping[str, float] = field(default_factory=dict)
    attention_prompt: float = 0.0
    attention_wide: float = 0.0
    attention_step: float = 0.0
    attention_step_wide: float = 0.0
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
    sequence_seconds: float = 0.0
    prompt_seconds: float = 0.0
    token_seconds: float = 0.0

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

    def rate(self, rates: Mapping[str, float], format: str) -> float:
        """One of its tables' rate; of a format not measured, the slowest measured one's, but for
        float32, which is slower than all."""
        others = [rate for name, rate in rates.items() if name != "F32"] or [*rates.values()]
        return rates.get(format) or min(others, default=self.dram_best)

    def expert_batch_rate(self, format: str) -> float:
        """GOP/s of the expert kernel at many tokens, likewise."""
        return self.rate(self.experts_batch, format) if self.experts_batch else self.int8

    def read_rate(self, size: float) -> float:
        """GB/s of `size` bytes read over and over; between measured ones, by logarithms."""
        points = sorted((math.log(mib << 20), 1 / rate) for mib, rate in self.reads.items() if rate)
        if not points:
            return self.dram_best
        x = min(max(math.log(max(size, 1)), points[0][0]), points[-1][0])
        for (x0, y0), (x1, y1) in pairwise(points):
            if x <= x1:
                return 1 / (y0 + (x - x0) * (y1 - y0) / (x1 - x0))
        return 1 / points[-1][1]

    @property
    def score_seconds(self) -> tuple[float, float]:
        """Each operation of attention takes, and each query and key of a head besides; half a
        tile of keys was scored in vain for each query."""
        if not self.attention_prompt:
            return 0.0, 0.0
        useful = (SCORED + 1) / (SCORED + 1 + KEY_TILE)
        narrow = 256 * useful / 1e9 / self.attention_prompt
        if not self.attention_wide:
            return narrow / 256, 0.0
        fixed, each = _line((256, narrow), (512, 512 * useful / 1e9 / self.attention_wide))
        return each, fixed

    @property
    def key_seconds(self) -> tuple[float, float]:
        """In a step, finding a key and its value takes, and each of their bytes in RAM."""
        if not self.attention_step:
            return 0.0, 0.0
        each, fixed = self.score_seconds
        rates = (256, self.attention_step), (512, self.attention_step_wide)
        taken = [
            (size, max(0.0, 4 * (size / 1e9 / rate - size * each - fixed)))
            for size, rate in rates  # bytes, and operations of a query
            if rate
        ]
        if len(taken) == 1:
            return 0.0, taken[0][1] / taken[0][0]
        return _line(*taken)


def _line(small: tuple[int, float], large: tuple[int, float]) -> tuple[float, float]:
    """Start and slope of the line through two points, neither negative."""
    slope = max(0.0, (large[1] - small[1]) / (large[0] - small[0]))
    start = small[1] - slope * small[0]
    return (start, slope) if start > 0 else (0.0, large[1] / large[0])


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
    unknown = sorted(set(document) - set(known) - {"kind", "version", *_FORMER})
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
