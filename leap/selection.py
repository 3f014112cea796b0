"""Exact order statistics over tensors that need not fit, or lie, in one place."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from leap_kernels.radix_counts import RadixCounts, value_of
from torch import Tensor


@dataclass(frozen=True)
class Cut:
    """Where the ``pruned`` smallest of ``numel`` values end."""

    value: float
    """The largest pruned value; −inf when nothing is pruned."""
    numel: int
    """How many values there are."""
    pruned: int
    """How many of them are pruned."""
    below: int
    """How many values are smaller than ``value``."""
    equal: int
    """How many values equal ``value``."""

    @property
    def kept_ties(self) -> int:
        """How many of the values equal to ``value`` are kept."""
        return self.equal - (self.pruned - self.below)

    def above(self, values: Tensor) -> Tensor:
        """Where ``values``, taken as fp32, are kept whatever happens to the ties; bool of the same shape."""
        if self.pruned == 0:
            return torch.ones_like(values, dtype=torch.bool)  # the comparison would prune values of −inf
        return values.float() > self.value


def cut(
    tensors: Callable[[], Iterable[Tensor]],
    pruned: Callable[[int], int],
    reduce: Callable[[Tensor], Tensor] = lambda counts: counts,
) -> Cut:
    """The exact place of a cut through all values of ``tensors()``, taken as fp32.

    A radix selection: one pass counts the upper and one the lower 16 bits of the values' ordered keys, so nothing is
    sorted or concatenated.

    Args:
        tensors: gives the same tensors, of any shape, at every call.
        pruned: number of smallest values to prune, from the number of values in all processes.
        reduce: adds up a tensor of counts, on the CPU, over processes that hold parts of the values (an all-reduce).

    Raises:
        ValueError: a value is NaN, or fewer than none or more than all values are to be pruned.
    """
    high = reduce(_counts(tensors(), RadixCounts()))
    numel = int(high.sum())
    k = pruned(numel)
    if not 0 <= k <= numel:
        raise ValueError(f"cannot prune {k} of {numel} values")
    if k == 0:
        return Cut(value=float("-inf"), numel=numel, pruned=0, below=0, equal=0)
    before = high.cumsum(0)
    upper = int(torch.searchsorted(before, k))
    low = reduce(_counts(tensors(), RadixCounts(upper)))
    below = int(before[upper] - high[upper])
    before_low = low.cumsum(0)
    lower = int(torch.searchsorted(before_low, k - below))
    below += int(before_low[lower] - low[lower])
    value = value_of(upper, lower)
    return Cut(value=value, numel=numel, pruned=k, below=below, equal=int(low[lower]))


def _counts(tensors: Iterable[Tensor], counts: RadixCounts) -> Tensor:
    for tensor in tensors:
        counts.add(tensor)
    return counts.total()


def keep_above(values: Tensor, cut_at: Cut, ties_before: int = 0) -> tuple[Tensor, int]:
    """The kept positions of one tensor, and how many ties it holds.

    Ties at the cut are kept in flat order, over all tensors in their order: ``ties_before`` is the number of ties in
    the tensors before this one.
    """
    flat = values.detach().reshape(-1).float()
    keep = cut_at.above(flat)
    tied = (flat == cut_at.value).nonzero().squeeze(1)
    keep[tied[: max(0, cut_at.kept_ties - ties_before)]] = True
    return keep.view(values.shape), len(tied)
