"""``x @ W.T`` for a BMP128 matrix and few rows of x, as in decoding: reads the packed bytes, not the dense matrix."""

import ctypes
import functools
import os

import torch
from torch import Tensor

from leap_kernels import native
from leap_kernels.bmp128 import BMP128

MAX_BATCH = 16
_ISAS = ("scalar", "avx2", "avx512", "avx512_bf16")  # by the numbers in native/gemv_bitmap.cpp
_DTYPES = (torch.float32, torch.bfloat16)


@functools.cache
def native_library() -> ctypes.CDLL | None:
    """``native/gemv_bitmap.cpp``, or None where it cannot be built."""
    library = native.load("gemv_bitmap", tune_for_host=False)
    if library is not None:
        pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        library.leap_gemv_bitmap.argtypes = [*[pointer] * 6, size, size, number, number, number, number]
        library.leap_gemv_bitmap.restype = None
        library.leap_best_isa.restype = number
    return library


def instruction_set(library: ctypes.CDLL) -> int:
    """The best one this CPU has, or the one LEAP_CPU_ISA names. Raises ValueError if that is unknown or missing here."""
    best = library.leap_best_isa()
    name = os.environ.get("LEAP_CPU_ISA")
    if name is None:
        return best
    if name not in _ISAS[: best + 1]:
        raise ValueError(f"LEAP_CPU_ISA={name}; this CPU has {', '.join(_ISAS[: best + 1])}")
    return _ISAS.index(name)


def gemv_bitmap_reference(x: Tensor, weight: BMP128) -> Tensor:
    """``x @ W.T`` in float64, through the dense matrix: what tests compare with."""
    return x.double() @ weight.unpack().double().T


def gemv_bitmap(x: Tensor, weight: BMP128) -> Tensor:
    """``x @ W.T`` with sums in float32.

    x: [..., K] of weight's dtype (float32 or bfloat16), at most MAX_BATCH rows, on the CPU.
    Returns [..., N] of that dtype, the same bits for any number of threads. Raises ValueError for arguments that do
    not fit. Without a compiler the matrix is unpacked at every call, which is slow.
    """
    rows, columns = weight.shape
    if x.dtype not in _DTYPES or x.dtype != weight.vals.dtype or x.shape[-1] != columns:
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}; weight is {weight.vals.dtype} {weight.shape}")
    batch = x.numel() // columns if columns else 0
    if not 1 <= batch <= MAX_BATCH:
        raise ValueError(f"x has {batch} rows; 1 to {MAX_BATCH} allowed")
    library = native_library()
    if library is None:
        return torch.nn.functional.linear(x, weight.unpack())
    x = x.contiguous()
    y = torch.empty(*x.shape[:-1], rows, dtype=x.dtype)
    library.leap_gemv_bitmap(
        weight.bits.data_ptr(),
        weight.off.data_ptr(),
        None if weight.row_base is None else weight.row_base.data_ptr(),
        weight.vals.data_ptr(),
        x.data_ptr(),
        y.data_ptr(),
        rows,
        columns,
        native.DTYPE_CODES[x.dtype],
        batch,
        instruction_set(library),
        torch.get_num_threads(),
    )
    return y
