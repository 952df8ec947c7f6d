"""Memory of our own that the GPU may read and copy at the bus's full rate. Knows nothing of what
lies there."""

import ctypes
import sys
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from greenroom.errors import NativeError

Upload = Callable[[int, int, int, int], None]


def register(memory: NDArray[np.uint8], owner: object) -> int:
    """Pins memory where it lies until its owner is gone; returns CUDA's error number, 0 if all
    is well."""
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    address = memory.ctypes.data
    result = int(runtime.cudaHostRegister(address, memory.nbytes, 0))
    if result == 0:  # memory that comes to lie at the same address must not pass for pinned
        weakref.finalize(owner, runtime.cudaHostUnregister, address).atexit = False
    return result


@cache
def driver_upload() -> Upload | None:
    """CUDA's own way to begin a copy to the device, told the address there, that in RAM, bytes and
    the stream; less work for the host than `Tensor.copy_`. None where there is no such driver.

    Raises:
        NativeError: by the function, if a copy cannot begin.
    """
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        copy = driver.cuMemcpyHtoDAsync_v2
    except (OSError, AttributeError):
        return None
    copy.argtypes = [ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    copy.restype = ctypes.c_int

    def upload(there: int, here: int, nbytes: int, stream: int) -> None:
        if error := copy(there, here, nbytes, stream):
            raise NativeError(f"experts: a copy to the GPU failed (CUDA error {error})")

    return upload
