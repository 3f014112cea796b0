"""The dense matrix of a BMP128 matrix on CPUs, natively; ``BMP128.unpack`` is the reference and the fallback."""

import ctypes
import functools

import torch
from torch import Tensor

from leap_kernels import native
from leap_kernels.bmp128 import BMP128


@functools.cache
def native_library() -> ctypes.CDLL | None:
    """``native/unpack_bitmap.cpp``, or None where it cannot be built."""
    library = native.load("unpack_bitmap", tune_for_host=False)
    if library is not None:
        pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        library.leap_unpack_bitmap.argtypes = [*[pointer] * 5, size, size, number, number]
        library.leap_unpack_bitmap.restype = None
    return library


def unpack_bitmap_cpu(weight: BMP128) -> Tensor:
    """The dense matrix [N, K]: the kept values bit for bit, +0 elsewhere. weight: on the CPU."""
    library = native_library()
    if library is None:
        return weight.unpack()
    dense = torch.empty(weight.shape, dtype=weight.vals.dtype)
    library.leap_unpack_bitmap(
        weight.bits.data_ptr(),
        weight.off.data_ptr(),
        None if weight.row_base is None else weight.row_base.data_ptr(),
        weight.vals.data_ptr(),
        dense.data_ptr(),
        *weight.shape,
        weight.vals.element_size(),
        torch.get_num_threads(),
    )
    return dense
