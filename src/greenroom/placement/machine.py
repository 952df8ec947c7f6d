"""What this machine is: processor, memory, GPUs, disks, versions, as the system tells them.

Measures nothing, judges nothing; what cannot be found out is None. Cheap but for the GPU's
driver, which takes a second to wake.
"""

import contextlib
import hashlib
import json
import os
import platform
import resource
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from greenroom import native
from greenroom.placement.gpus import GpuFacts, display_adapters, gpu_facts

PACKAGES = ("greenroom", "torch", "triton", "numpy", "gguf", "nvidia-ml-py", "matplotlib")


@dataclass(frozen=True, slots=True, kw_only=True)
class Processor:
    """The processor and what of it this process may use.

    Attributes:
        name, architecture: as the system gives them.
        tiers: instruction-set builds that run here, and those the processor could run.
        runnable: see `tiers`.
        cores: physical ones in the affinity mask.
        allowed: logical ones in the affinity mask.
        logical: of the whole machine.
        quota: processors the control group grants, None for all.
        threads, reason: what the engine uses when it is not told, and why.
        numa_nodes: memory nodes.
        governor: of the frequency, None where there is none.
    """

    name: str
    architecture: str
    tiers: tuple[str, ...]
    runnable: tuple[str, ...]
    cores: int
    allowed: int
    logical: int
    quota: float | None
    threads: int
    reason: str
    numa_nodes: int
    governor: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """RAM in bytes. `limit` is the container's, `memlock` the most this process may lock, each
    None for no limit; `huge_pages` is the kernel's setting for transparent ones.
    """

    total: int
    available: int
    limit: int | None
    swap_used: int
    huge_pages: str | None
    memlock: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """The device behind a folder; sizes in bytes."""

    folder: str
    device: str | None
    model: str | None
    rotational: bool | None
    total: int
    free: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Everything together; `adapters` are NVIDIA devices on the bus, usable or not."""

    processor: Processor
    memory: Memory
    gpus: tuple[GpuFacts, ...]
    adapters: int
    disks: tuple[Disk, ...]
    system: str
    versions: Mapping[str, str | None]
    cuda_build: str | None  # CUDA version PyTorch was built for

    def json(self) -> dict[str, Any]:
        """For a report."""
        return asdict(self)

    @property
    def fingerprint(self) -> str:
        """The same as long as measured rates stay comparable: processor, what of it may be
        used, RAM in whole GiB, GPUs and the build of the kernels.
        """
        cpu, ram = self.processor, self.memory.limit or self.memory.total
        parts = [
            cpu.name, cpu.tiers, cpu.threads, cpu.quota, ram >> 30,
            [(gpu.name, gpu.total >> 30) for gpu in self.gpus], self.versions["greenroom"],
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def machine(folders: Sequence[Path] = ()) -> Machine:
    """Looks at this machine.

    Args:
        folders: whose disks to describe.
    """
    gpus, cuda_build = gpu_facts()
    return Machine(
        processor=processor(),
        memory=memory(),
        gpus=gpus,
        adapters=display_adapters(),
        disks=tuple(disk(folder) for folder in folders),
        system=f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        versions={name: _version(name) for name in PACKAGES},
        cuda_build=cuda_build,
    )


def processor() -> Processor:
    """The processor; see `Processor`."""
    advice = native.lib().default_threads()
    return Processor(
        name=processor_name(),
        architecture=platform.machine(),
        tiers=native.usable_tiers(),
        runnable=tuple(native.module("portable").runnable_tiers()),
        cores=int(advice["cores"]),
        allowed=int(advice["allowed"]),
        logical=os.cpu_count() or int(advice["allowed"]),
        quota=advice["quota"],
        threads=int(advice["threads"]),
        reason=str(advice["reason"]),
        numa_nodes=max(1, len(list(Path("/sys/devices/system/node").glob("node[0-9]*")))),
        governor=read_text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
    )


def processor_name() -> str:
    """The processor's name as the system gives it."""
    for line in (read_text("/proc/cpuinfo") or "").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def memory() -> Memory:
    """The RAM; see `Memory`."""
    virtual = psutil.virtual_memory()
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return Memory(
        total=int(virtual.total),
        available=int(virtual.available),
        limit=container_limit(),
        swap_used=int(psutil.swap_memory().used),
        huge_pages=chosen(read_text("/sys/kernel/mm/transparent_hugepage/enabled")),
        memlock=None if soft == resource.RLIM_INFINITY else int(soft),
    )


def container_limit() -> int | None:
    """Bytes of RAM the control group grants, None for no limit (versions 2 and 1)."""
    for place in ("memory.max", "memory/memory.limit_in_bytes"):
        text = read_text(f"/sys/fs/cgroup/{place}")
        if text is not None and text.isdigit() and int(text) < psutil.virtual_memory().total:
            return int(text)
    return None


def container_free(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes of RAM the control group still grants (versions 2 and 1), None for no limit. Cached
    files count as free, a model's own among them: the kernel drops them when it needs the room.
    """
    for folder, limit, used, prefix in (
        (root, "memory.max", "memory.current", ""),
        (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        most, taken = read_text(folder / limit), read_text(folder / used)
        if most is None or taken is None or not (most.isdigit() and taken.isdigit()):
            continue
        lines = (read_text(folder / "memory.stat") or "").splitlines()
        stat = dict(line.split(maxsplit=1) for line in lines if " " in line)
        cached = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
        return max(0, int(most) - max(0, int(taken) - cached))
    return None


def chosen(text: str | None) -> str | None:
    """ "always" of "[always] madvise never"."""
    if text is None or "[" not in text:
        return text
    return text.split("[", 1)[1].split("]", 1)[0]


def disk(folder: Path) -> Disk:
    """The device a folder, or the nearest one above it that exists, is on."""
    while not folder.exists():
        folder = folder.parent
    usage = psutil.disk_usage(str(folder))
    number = os.stat(folder).st_dev
    block = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
    if (block / "partition").exists():
        block = block.parent
    known = (block / "queue").is_dir()
    rotational = read_text(block / "queue/rotational") if known else None
    return Disk(
        folder=str(folder),
        device=block.name if known else None,
        model=read_text(block / "device/model"),
        rotational=None if rotational is None else rotational == "1",
        total=int(usage.total),
        free=int(usage.free),
    )


def read_text(path: str | Path) -> str | None:
    """A small file of the system, stripped; None if it cannot be read."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return Path(path).read_text().strip()
    return None


def _version(package: str) -> str | None:
    if package == "greenroom":
        from greenroom import __version__

        return __version__
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None
