"""Histograms for a radix selection: how many values of a tensor have each upper or lower half of an ordering key.

The key of a value, taken as float32, is a signed 32-bit integer in the order of the values: the bits of a positive
number, those of a negative one flipped; −0 has that of 0. Two passes of 65 536 counters each find any order statistic
exactly, without sorting, copying or bringing together what lies in several tensors or processes.

CPU tensors run native C++, CUDA tensors a Triton kernel, all others, and CPUs without a compiler, the PyTorch
reference; all count the same.
"""

from __future__ import annotations

import ctypes
import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from leap_kernels import native

if TYPE_CHECKING:
    from leap_kernels.radix_counts_triton import CopiedCounts

BUCKETS = 1 << 16
_CHUNK = 1 << 22  # elements at a time in the reference: bounds the temporaries to some tens of MB


class RadixCounts:
    """Counters of one pass over many tensors, each kept on the device of the tensors until all are asked for.

    So a pass over tensors on a GPU stops the processor once, however many they are.

    Args:
        upper: count lower halves of the values in this bucket of upper halves; None to count the upper halves.
    """

    def __init__(self, upper: int | None = None) -> None:
        self.upper = upper
        self._counts: dict[torch.device, Tensor] = {}  # int64 [65537], the last one of NaN
        self._copied: dict[torch.device, CopiedCounts] = {}  # those of the Triton kernel, besides

    def add(self, values: Tensor) -> None:
        """Count ``values``: any shape, float32 / bfloat16 / float16."""
        flat = values.detach().reshape(-1).contiguous()
        has_code = flat.dtype in native.DTYPE_CODES
        if flat.is_cuda and has_code:
            self._add_on_gpu(flat)
            return
        if flat.device not in self._counts:
            self._counts[flat.device] = torch.zeros(BUCKETS + 1, dtype=torch.int64, device=flat.device)
        counts = self._counts[flat.device]
        if flat.device.type == "cpu" and has_code and (library := native_library()) is not None:
            _count_natively(library, flat, self.upper, counts)
        else:
            radix_counts_reference(flat, self.upper, counts)

    def _add_on_gpu(self, flat: Tensor) -> None:
        from leap_kernels.radix_counts_triton import CopiedCounts  # Triton is not on every platform

        if flat.device not in self._copied:
            self._copied[flat.device] = CopiedCounts(BUCKETS + 1, flat.device)
        self._copied[flat.device].add(flat, self.upper)

    def total(self) -> Tensor:
        """int64 [65536] on the CPU: how many values have each half, in rising order.

        Raises:
            ValueError: a value was NaN.
        """
        total = torch.zeros(BUCKETS + 1, dtype=torch.int64)
        for counts in (*self._counts.values(), *(copied.total() for copied in self._copied.values())):
            total += counts.cpu()
        if total[BUCKETS]:
            raise ValueError("a NaN among the values to rank")
        return total[:BUCKETS]


def count_high(values: Tensor) -> Tensor:
    """int64 [65536] on the CPU: how many values have each upper half of the key, in rising order.

    Args:
        values: any shape, float32 / bfloat16 / float16.

    Raises:
        ValueError: a value is NaN.
    """
    counts = RadixCounts()
    counts.add(values)
    return counts.total()


def count_low(values: Tensor, upper: int) -> Tensor:
    """int64 [65536]: of the values in bucket ``upper`` of :func:`count_high`, how many have each lower half."""
    counts = RadixCounts(upper)
    counts.add(values)
    return counts.total()


def radix_counts_reference(values: Tensor, upper: int | None, counts: Tensor) -> None:
    """Add to ``counts``, int64 [65537] with NaN in the last place, in plain PyTorch; see :class:`RadixCounts`.

    NaN is counted with the upper halves only, as in native code.
    """
    for chunk in values.split(_CHUNK):
        bits = (chunk.float() + 0.0).view(torch.int32)  # −0 + 0 = 0
        keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        if upper is None:
            buckets = torch.where(chunk.isnan(), BUCKETS, (keys >> 16) + BUCKETS // 2)
        else:
            buckets = keys[(keys >> 16) == upper - BUCKETS // 2] & 0xFFFF
        counts += torch.bincount(buckets.long(), minlength=BUCKETS + 1)


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


def _count_natively(library: ctypes.CDLL, flat: Tensor, upper: int | None, counts: Tensor) -> None:
    values = flat.data_ptr(), native.DTYPE_CODES[flat.dtype], flat.numel()
    if upper is None:
        counts[BUCKETS] += library.leap_count_high(*values, counts.data_ptr(), torch.get_num_threads())
    else:
        library.leap_count_low(*values, upper, counts.data_ptr(), torch.get_num_threads())
