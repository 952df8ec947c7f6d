"""What this machine has for a model: its GPU, if one can be used. Decides nothing."""

import gc
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

# What NVIDIA's driver for Linux, that of WSL and that of Jetson boards put there.
_DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/nvmap", "/dev/nvhost-ctrl")

LEAST_CAPABILITY = (7, 5)  # what current PyTorch and Triton builds support


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU that can be used.

    Attributes:
        name: as the driver calls it.
        free: bytes of VRAM nobody uses, after the driver's own context.
        total: bytes of VRAM.
    """

    name: str
    free: int
    total: int


@dataclass(frozen=True, slots=True)
class Hardware:
    """The machine. `reason` says why there is no GPU; "" if there is one."""

    gpu: Gpu | None
    reason: str = ""


def probe() -> Hardware:
    """Looks for a GPU; creates the driver's context if there is one."""
    if sys.platform == "linux" and not any(Path(name).exists() for name in _DRIVERS):
        return Hardware(None, "there is no driver of an NVIDIA GPU")
    import torch  # a second; who only reads a header on a machine without a GPU need not wait

    if not torch.cuda.is_available():
        return Hardware(None, "PyTorch finds no CUDA GPU")
    if importlib.util.find_spec("triton") is None:
        return Hardware(None, "Triton is not installed")
    capability = torch.cuda.get_device_capability()
    name = torch.cuda.get_device_name()
    if capability < LEAST_CAPABILITY:
        return Hardware(None, f"{name} has compute capability {capability[0]}.{capability[1]}")
    gc.collect()  # what a model closed before, and the allocator, still hold would count
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return Hardware(Gpu(name, free, total))
