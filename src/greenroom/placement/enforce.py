"""Holds a process to its VRAM budget, and tells what it really used. Knows PyTorch's allocator
and the driver; not what the memory is for.
"""

import gc
import os
from contextlib import suppress

import torch

from greenroom.placement.gpus import nvml, nvml_handle


def limit(budget: int | None, device: int = 0) -> None:
    """Has the allocator refuse what would exceed `budget` bytes; None lifts the limit.

    The driver's own context does not count; the peak is measured from here on.
    """
    if not torch.cuda.is_available():
        return
    total = torch.cuda.get_device_properties(device).total_memory
    share = 1.0 if budget is None else min(1.0, budget / total)
    give_back()  # what a model closed before still holds would count
    torch.cuda.set_per_process_memory_fraction(share, device)
    torch.cuda.reset_peak_memory_stats(device)


def give_back() -> None:
    """Returns what nobody refers to any more, VRAM and pinned RAM, to the driver."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return
    gc.collect()
    with suppress(RuntimeError):  # of a device that has failed nothing can be given back
        torch.cuda.empty_cache()
        getattr(torch._C, "_host_emptyCache", int)()


def usage(budget: int | None, booked: int, device: int = 0) -> dict[str, int]:
    """Bytes: the budget, what is booked for good, what the allocator holds now and held at most,
    and the driver's context, where it can be told.
    """
    found = {"booked": booked} | ({} if budget is None else {"budget": budget})
    if not torch.cuda.is_available():
        return found
    held = torch.cuda.memory_reserved(device)
    found |= {"reserved": held, "peak_reserved": torch.cuda.max_memory_reserved(device)}
    used = process_bytes(device)
    return found if used is None else found | {"context": max(0, used - held)}


def process_bytes(device: int = 0) -> int | None:
    """VRAM of this process as the driver counts it; None where it does not say."""
    with nvml() as lib:
        if (handle := nvml_handle(lib, device)) is None:
            return None
        try:
            running = lib.nvmlDeviceGetComputeRunningProcesses(handle)
        except lib.NVMLError:
            return None
    # In a container the driver may count by process numbers of its own.
    mine = [process.usedGpuMemory for process in running if process.pid == os.getpid()]
    return int(mine[0]) if mine and mine[0] else None
