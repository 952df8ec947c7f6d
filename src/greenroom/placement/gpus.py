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
    """The GPUs PyTorch can use, in its order, or else those the driver has; and the CUDA version
    PyTorch was built for (None: a build without)."""
    import torch  # see `hardware.probe`

    build: str | None = torch.version.cuda
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    with nvml() as lib:
        if count:
            return tuple(_facts(lib, i) for i in range(count)), build
        there = 0 if lib is None else lib.nvmlDeviceGetCount()
        handles = [lib.nvmlDeviceGetHandleByIndex(i) for i in range(there)]
        return tuple(_from_nvml(lib, handle, None) for handle in handles), build


def nvml_handle(lib: Any, index: int = 0) -> Any:
    """NVML's handle of PyTorch's device `index`, or None where it cannot be told: the two count
    in different orders, and CUDA_VISIBLE_DEVICES hides devices from one of them only."""
    import torch

    if lib is None or not torch.cuda.is_available():
        return None
    device: Any = torch.cuda.get_device_properties(index)
    with contextlib.suppress(AttributeError, lib.NVMLError):
        return lib.nvmlDeviceGetHandleByUUID(f"GPU-{device.uuid}")
    with contextlib.suppress(AttributeError, lib.NVMLError):  # a part of a GPU (MIG)
        return lib.nvmlDeviceGetHandleByUUID(f"MIG-{device.uuid}")
    with contextlib.suppress(AttributeError, lib.NVMLError):
        bus = f"{device.pci_domain_id:08x}:{device.pci_bus_id:02x}:{device.pci_device_id:02x}.0"
        return lib.nvmlDeviceGetHandleByPciBusId(bus)
    return None


def _facts(lib: Any, index: int) -> GpuFacts:
    """Of PyTorch's device `index`."""
    import torch

    major, minor = torch.cuda.get_device_capability(index)
    handle = nvml_handle(lib, index)
    if handle is not None:
        return _from_nvml(lib, handle, f"{major}.{minor}")
    free, total = torch.cuda.mem_get_info(index)
    name = torch.cuda.get_device_name(index)
    return GpuFacts(name=name, total=total, free=free, capability=f"{major}.{minor}")


def _from_nvml(lib: Any, handle: Any, capability: str | None) -> GpuFacts:
    memory = lib.nvmlDeviceGetMemoryInfo(handle)

    def ask(function: str) -> Any:
        with contextlib.suppress(Exception):  # not every product answers every question
            return getattr(lib, function)(handle)
        return None

    return GpuFacts(
        name=_text(lib.nvmlDeviceGetName(handle)),
        total=int(memory.total),
        free=int(memory.free),
        capability=capability,
        driver=_text(lib.nvmlSystemGetDriverVersion()),
        link_width=ask("nvmlDeviceGetCurrPcieLinkWidth"),
        link_most_width=ask("nvmlDeviceGetMaxPcieLinkWidth"),
        link_generation=ask("nvmlDeviceGetCurrPcieLinkGeneration"),
        link_most_generation=ask("nvmlDeviceGetMaxPcieLinkGeneration"),
        energy=ask("nvmlDeviceGetTotalEnergyConsumption") is not None,
    )


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
