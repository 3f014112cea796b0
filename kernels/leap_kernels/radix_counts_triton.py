"""Histograms by halves of the ordering key on a GPU; see :mod:`leap_kernels.radix_counts` for the contract."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024  # eight elements for each of 128 threads


@triton.jit(do_not_specialize=["upper"])
def radix_counts_kernel(
    values_ptr,
    counts_ptr,  # int64 [65537]
    count,
    upper,
    HIGH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    local = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = local < count
    value = tl.load(values_ptr + local, mask=valid, other=0.0).to(tl.float32)
    bits = value.to(tl.int32, bitcast=True)
    bits = tl.where(bits == -2147483648, 0, bits)  # −0
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    bucket = (key >> 16) + 32768
    if HIGH:
        is_nan = value != value
        bucket = tl.where(is_nan, 65536, bucket)
    else:
        valid = valid & (bucket == upper)
        bucket = key & 0xFFFF
    tl.atomic_add(counts_ptr + bucket, tl.full([BLOCK], 1, tl.int64), mask=valid, sem="relaxed")


def radix_counts_triton(values: Tensor, upper: int | None, counts: Tensor) -> None:
    """Add to ``counts``, int64 [65537] with NaN in the last place, as ``RadixCounts(upper)`` does."""
    with torch.cuda.device_of(values):
        radix_counts_kernel[(triton.cdiv(values.numel(), _BLOCK),)](
            values, counts, values.numel(), 0 if upper is None else upper, HIGH=upper is None, BLOCK=_BLOCK
        )
