"""Histograms by halves of the ordering key on a GPU; see :mod:`leap_kernels.radix_counts` for the contract.

Most logits of a model share a thousand upper halves, and additions to one address wait for each other. So programs take
turns over copies of the counters, which together stay in the second-level cache, and the copies are added up at the
end. Counters of 32 bits take half the room; no copy counts more values than there are between two sums.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024  # eight elements for each of 128 threads
_COPIES = 64  # 17 MB
_MOST = (1 << 31) - _BLOCK  # values that fit a counter even if all are equal


@triton.jit(do_not_specialize=["upper"])
def radix_counts_kernel(
    values_ptr,
    counts_ptr,  # int32 [COPIES, 65537]
    count,
    upper,
    HIGH: tl.constexpr,
    COPIES: tl.constexpr,
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
    bucket += tl.program_id(0) % COPIES * 65537
    tl.atomic_add(counts_ptr + bucket, tl.full([BLOCK], 1, tl.int32), mask=valid, sem="relaxed")


class CopiedCounts:
    """Counters on one GPU: a number of copies, and the sums of what was in them before they were emptied.

    Args:
        size: counters, 65537.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self._copies = torch.zeros(_COPIES, size, dtype=torch.int32, device=device)
        self._sums = torch.zeros(size, dtype=torch.int64, device=device)
        self._pending = 0  # values counted in the copies

    def add(self, values: Tensor, upper: int | None) -> None:
        """Count ``values`` [n], contiguous, as ``RadixCounts(upper)`` does, with NaN in the last place."""
        for part in values.split(_MOST):
            if self._pending + part.numel() > _MOST:
                self._empty()
            self._pending += part.numel()
            with torch.cuda.device_of(part):
                radix_counts_kernel[(triton.cdiv(part.numel(), _BLOCK),)](
                    part,
                    self._copies,
                    part.numel(),
                    0 if upper is None else upper,
                    HIGH=upper is None,
                    COPIES=_COPIES,
                    BLOCK=_BLOCK,
                )

    def total(self) -> Tensor:
        """int64 [size] on the GPU."""
        self._empty()
        return self._sums

    def _empty(self) -> None:
        self._sums += self._copies.sum(dim=0, dtype=torch.int64)
        self._copies.zero_()
        self._pending = 0
