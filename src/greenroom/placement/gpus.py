"""What the driver, PyTorch and the bus tell of the GPUs. Measures nothing; NVML is optional."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_NVIDIA = "0x10de"
_DISPLAY = ("0x0300", "0x0302")  # PCI classes of VGA and 3D controllers


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuFacts:
    """One GPU.

    Attributes:
        name: as the driver calls it.
        total, free: bytes of VRAM.
        capability: "9.0", None where PyTorch cannot use it.
        driver: its version.
        link_width, link_most_width: PCIe lanes now and at most.
        link_generation, link_most_generation: PCIe generation now (an idle GPU may go down)
            and at most.
        energy: whether NVML counts energy.
    """

    name: str
    total: int
    free: int
    capability: str | None = None
    driver: str | None = None
    link_width: int | None = None
    link_most_width: int | None = None
    link_generation: int | None = None
    link_most_generation: int | None = None
    energy: bool = False


@contextlib.contextmanager
def nvml() -> Iterator[Any]:
    """The module `pynvml`, initialised; None where it or the driver is missing."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # not installed, no driver, or no permission
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def gpu_facts() -> tuple[tuple[GpuFacts, ...], str | None]:
    """Every GPU, and the CUDA version PyTorch was built for (None: a build without)."""
    import torch  # see `hardware.probe`

    build: str | None = torch.version.cuda
    with nvml() as lib:
        if lib is not None:
            found = tuple(_from_nvml(lib, i) for i in range(lib.nvmlDeviceGetCount()))
            if found:
                return found, build
    if not torch.cuda.is_available():
        return (), build
    return tuple(_from_torch(i) for i in range(torch.cuda.device_count())), build


def nvml_handle(lib: Any, index: int = 0) -> Any:
    """NVML's handle of PyTorch's device `index`, which CUDA_VISIBLE_DEVICES may have moved."""
    import torch

    with contextlib.suppress(Exception):
        bus: Any = torch.cuda.get_device_properties(index)
        name = f"{bus.pci_domain_id:08x}:{bus.pci_bus_id:02x}:{bus.pci_device_id:02x}.0"
        return lib.nvmlDeviceGetHandleByPciBusId(name.encode())
    return lib.nvmlDeviceGetHandleByIndex(index)


def _from_nvml(lib: Any, index: int) -> GpuFacts:
    import torch

    handle = lib.nvmlDeviceGetHandleByIndex(index)
    memory = lib.nvmlDeviceGetMemoryInfo(handle)
    usable = torch.cuda.is_available() and index < torch.cuda.device_count()

    def ask(function: str) -> Any:
        with contextlib.suppress(Exception):  # not every product answers every question
            return getattr(lib, function)(handle)
        return None

    capability = torch.cuda.get_device_capability(index) if usable else None
    return GpuFacts(
        name=_text(lib.nvmlDeviceGetName(handle)),
        total=int(memory.total),
        free=int(memory.free),
        capability=None if capability is None else f"{capability[0]}.{capability[1]}",
        driver=_text(lib.nvmlSystemGetDriverVersion()),
        link_width=ask("nvmlDeviceGetCurrPcieLinkWidth"),
        link_most_width=ask("nvmlDeviceGetMaxPcieLinkWidth"),
        link_generation=ask("nvmlDeviceGetCurrPcieLinkGeneration"),
        link_most_generation=ask("nvmlDeviceGetMaxPcieLinkGeneration"),
        energy=ask("nvmlDeviceGetTotalEnergyConsumption") is not None,
    )


def _from_torch(index: int) -> GpuFacts:
    import torch

    free, total = torch.cuda.mem_get_info(index)
    major, minor = torch.cuda.get_device_capability(index)
    name = torch.cuda.get_device_name(index)
    return GpuFacts(name=name, total=total, free=free, capability=f"{major}.{minor}")


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def display_adapters(bus: Path = Path("/sys/bus/pci/devices")) -> int:
    """NVIDIA GPUs on the PCI bus, whether a driver knows them or not."""
    count = 0
    for device in bus.glob("*"):
        with contextlib.suppress(OSError):
            vendor = (device / "vendor").read_text().strip()
            kind = (device / "class").read_text().strip()
            count += vendor == _NVIDIA and kind.startswith(_DISPLAY)
    return count
