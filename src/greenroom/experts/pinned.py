"""Memory of our own that the GPU may read and copy at the bus's full rate. Knows nothing of what
lies there."""

import weakref
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


def register(memory: NDArray[np.uint8], owner: object) -> int:
    """Pins memory where it lies until its owner is gone; returns CUDA's error number, 0 if all
    is well."""
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    address = memory.ctypes.data
    result = int(runtime.cudaHostRegister(address, memory.nbytes, 0))
    if result == 0:  # memory that comes to lie at the same address must not pass for pinned
        weakref.finalize(owner, runtime.cudaHostUnregister, address).atexit = False
    return result
