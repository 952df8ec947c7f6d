"""The driver's facts go to the GPU they belong to, in whatever order PyTorch sees which GPUs."""

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from greenroom.placement import enforce, gpus
from greenroom.placement.gpus import gpu_facts, nvml_handle


class Lost(Exception):
    """What NVML raises."""


class Driver:
    """NVML with three GPUs, one of them cut in parts; it knows nothing of CUDA's order."""

    NVMLError = Lost
    GPUS = ("small", "large", "cut")  # by index; PCI buses 0x10, 0x20, 0x30

    def __init__(self) -> None:
        self.uuids = {f"GPU-{name}": name for name in self.GPUS} | {"MIG-part": "part"}
        self.sizes = {"small": 8 << 30, "large": 80 << 30, "cut": 40 << 30, "part": 5 << 30}

    def nvmlDeviceGetCount(self) -> int:
        return len(self.GPUS)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return self.GPUS[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid not in self.uuids:
            raise Lost
        return self.uuids[uuid]

    def nvmlDeviceGetHandleByPciBusId(self, bus: str) -> str:
        buses = {f"00000000:{16 * (i + 1):02x}:00.0": name for i, name in enumerate(self.GPUS)}
        return buses[bus]

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        return SimpleNamespace(total=self.sizes[handle], free=self.sizes[handle] >> 1)

    def nvmlDeviceGetName(self, handle: str) -> str:
        return handle

    def nvmlSystemGetDriverVersion(self) -> str:
        return "1.0"

    def nvmlDeviceGetCurrPcieLinkWidth(self, handle: str) -> int:
        if handle == "part":
            raise Lost
        return 4 << self.GPUS.index(handle)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:
        return [SimpleNamespace(pid=enforce.os.getpid(), usedGpuMemory=self.sizes[handle] >> 2)]


def seen(monkeypatch: pytest.MonkeyPatch, *devices: Any, driver: Driver | None) -> None:
    """PyTorch sees these devices: their properties, in this order."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(devices))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: devices[index])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, index))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"torch's {index}")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (1 << 30, 2 << 30))

    @contextmanager
    def nvml() -> Any:
        yield driver

    monkeypatch.setattr(gpus, "nvml", nvml)
    monkeypatch.setattr(enforce, "nvml", nvml)


def named(uuid: str) -> Any:
    return SimpleNamespace(uuid=uuid)


def on_bus(number: int) -> Any:
    return SimpleNamespace(pci_domain_id=0, pci_bus_id=number, pci_device_id=0)


@pytest.mark.parametrize("make", [named, {"large": on_bus(0x20), "small": on_bus(0x10)}.get])
def test_facts_follow_the_devices_that_are_visible_in_their_order(monkeypatch, make) -> None:
    seen(monkeypatch, make("large"), make("small"), driver=Driver())
    first, second = gpu_facts()[0]
    assert (first.name, first.capability, first.total, first.link_width) == (
        "large", "8.0", 80 << 30, 8
    )  # fmt: skip
    assert (second.name, second.capability, second.link_width) == ("small", "8.1", 4)
    assert enforce.process_bytes(0) == 20 << 30
    assert enforce.process_bytes(1) == 2 << 30


def test_a_part_of_a_gpu_is_asked_itself(monkeypatch) -> None:
    seen(monkeypatch, named("part"), driver=Driver())
    (found,) = gpu_facts()[0]
    assert (found.name, found.total, found.link_width) == ("part", 5 << 30, None)


@pytest.mark.parametrize("device", [SimpleNamespace(), named("unknown")])
@pytest.mark.parametrize("driver", [Driver(), None])
def test_without_a_way_to_tell_only_pytorch_is_believed(monkeypatch, device, driver) -> None:
    seen(monkeypatch, device, driver=driver)
    (found,) = gpu_facts()[0]
    assert (found.name, found.total, found.free) == ("torch's 0", 2 << 30, 1 << 30)
    assert found.link_width is None
    assert nvml_handle(driver) is None
    assert enforce.process_bytes() is None


def test_gpus_that_pytorch_cannot_use_are_told_all_the_same(monkeypatch) -> None:
    seen(monkeypatch, driver=Driver())
    assert [(gpu.name, gpu.capability) for gpu in gpu_facts()[0]] == [
        ("small", None), ("large", None), ("cut", None)
    ]  # fmt: skip
    seen(monkeypatch, driver=None)
    assert gpu_facts()[0] == ()
