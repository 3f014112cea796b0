"""Histograms for a radix selection: how many values of a tensor have each upper or lower half of an ordering key.

The key of a value, taken as float32, is a signed 32-bit integer in the order of the values: the bits of a positive
number, those of a negative one flipped; −0 has that of 0. Two passes of 65 536 counters each find any order statistic
exactly, without sorting, copying or bringing together what lies in several tensors or processes.

CPU tensors run native C++, all others, and CPUs without a compiler, the PyTorch reference; both count the same.
"""

import ctypes
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from leap_kernels import native

BUCKETS = 1 << 16
_CHUNK = 1 << 22  # elements at a time in the reference: bounds the temporaries to some tens of MB


def count_high(values: Tensor) -> Tensor:
    """int64 [65536] on the CPU: how many values have each upper half of the key, in rising order.

    Args:
        values: any shape, float32 / bfloat16 / float16.

    Raises:
        ValueError: a value is NaN.
    """
    counts = torch.zeros(BUCKETS, dtype=torch.int64)
    flat, library = _flat(values)
    if library is None:
        for keys in _keys(flat):
            counts += torch.bincount(((keys >> 16) + BUCKETS // 2).long(), minlength=BUCKETS).cpu()
    elif library.leap_count_high(*_argument(flat), counts.data_ptr(), torch.get_num_threads()):
        raise ValueError("a NaN among the values to rank")
    return counts


def count_low(values: Tensor, upper: int) -> Tensor:
    """int64 [65536]: of the values in bucket ``upper`` of :func:`count_high`, how many have each lower half."""
    counts = torch.zeros(BUCKETS, dtype=torch.int64)
    flat, library = _flat(values)
    if library is None:
        for keys in _keys(flat):
            inside = keys[(keys >> 16) == upper - BUCKETS // 2]
            counts += torch.bincount((inside & 0xFFFF).long(), minlength=BUCKETS).cpu()
    else:
        library.leap_count_low(*_argument(flat), upper, counts.data_ptr(), torch.get_num_threads())
    return counts


def value_of(upper: int, lower: int) -> float:
    """The float32 value whose key has these halves, numbered as the counters are."""
    key = torch.tensor(((upper - BUCKETS // 2) << 16) | lower, dtype=torch.int32)
    return float((key ^ ((key >> 31) & 0x7FFFFFFF)).view(torch.float32))


@functools.cache
def native_library() -> ctypes.CDLL | None:
    """``native/radix_counts.cpp``, or None where it cannot be built."""
    library = native.load("radix_counts", tune_for_host=True)
    if library is not None:
        pointer, number = ctypes.c_void_p, ctypes.c_int
        library.leap_count_high.argtypes = [pointer, number, ctypes.c_int64, pointer, number]
        library.leap_count_high.restype = number
        library.leap_count_low.argtypes = [pointer, number, ctypes.c_int64, number, pointer, number]
        library.leap_count_low.restype = None
    return library


def _flat(values: Tensor) -> tuple[Tensor, ctypes.CDLL | None]:
    flat = values.detach().reshape(-1)
    on_cpu = flat.device.type == "cpu" and flat.dtype in native.DTYPE_CODES
    return flat.contiguous(), native_library() if on_cpu else None


def _argument(flat: Tensor) -> tuple[int, int, int]:
    return flat.data_ptr(), native.DTYPE_CODES[flat.dtype], flat.numel()


def _keys(flat: Tensor) -> Iterator[Tensor]:
    """int32 keys, a bounded number at a time."""
    for chunk in flat.split(_CHUNK):
        if torch.isnan(chunk).any():
            raise ValueError("a NaN among the values to rank")
        bits = (chunk.float() + 0.0).view(torch.int32)  # −0 + 0 = 0
        yield bits ^ ((bits >> 31) & 0x7FFFFFFF)
