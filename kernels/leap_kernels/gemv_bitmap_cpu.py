"""``x @ W.T`` on CPUs for a BMP128 matrix and few rows of x; see :mod:`leap_kernels.sparse_linear` for the contract."""

import ctypes
import functools
import os

import torch
from torch import Tensor

from leap_kernels import native
from leap_kernels.bmp128 import BMP128

ISAS = ("scalar", "avx2", "avx512", "avx512_bf16")  # by the numbers in native/gemv_bitmap.cpp
DTYPES = (torch.float32, torch.bfloat16)


@functools.cache
def native_library() -> ctypes.CDLL | None:
    """``native/gemv_bitmap.cpp``, or None where it cannot be built."""
    library = native.load("gemv_bitmap", tune_for_host=False)
    if library is not None:
        pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        library.leap_gemv_bitmap.argtypes = [*[pointer] * 6, size, size, number, number, number]
        library.leap_gemv_bitmap.restype = number
        library.leap_best_isa.restype = number
    return library


def gemv_bitmap_cpu(x: Tensor, weight: BMP128, library: ctypes.CDLL) -> Tensor:
    """``x @ W.T``, sums in float32. x: [..., K] of weight's dtype, one of DTYPES, on the CPU. Returns [..., N].

    Uses the best instruction set of this CPU, or the one that LEAP_CPU_ISA names. Raises ValueError if that is unknown
    or missing.
    """
    x = x.contiguous()
    rows, columns = weight.shape
    y = torch.empty(*x.shape[:-1], rows, dtype=x.dtype)
    failed = library.leap_gemv_bitmap(
        weight.bits.data_ptr(),
        weight.off.data_ptr(),
        None if weight.row_base is None else weight.row_base.data_ptr(),
        weight.vals.data_ptr(),
        x.data_ptr(),
        y.data_ptr(),
        rows,
        columns,
        native.DTYPE_CODES[x.dtype],
        x.numel() // columns,
        torch.get_num_threads(),
    )
    if failed:
        available = ISAS[: library.leap_best_isa() + 1]
        raise ValueError(f"LEAP_CPU_ISA={os.environ.get('LEAP_CPU_ISA')}; this CPU has {', '.join(available)}")
    return y
