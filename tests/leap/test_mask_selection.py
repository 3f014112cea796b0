"""The exact cut through values spread over tensors, against sorting."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from leap_kernels import radix_counts
from torch import Tensor

from leap.selection import Cut, cut, keep_above

DENORMAL = 1e-45
AWKWARD = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, DENORMAL, -DENORMAL, 1e-38, 3.4e38, -3.4e38, 1 + 2**-23]
VALUE = st.one_of(st.sampled_from(AWKWARD), st.floats(width=32, allow_nan=False), st.integers(-3, 3).map(float))


def by_sorting(values: list[float], k: int) -> Cut:
    ordered = np.sort(np.array(values, dtype=np.float32))
    if k == 0:
        return Cut(value=-math.inf, numel=len(ordered), pruned=0, below=0, equal=0)
    value = ordered[k - 1]
    return Cut(
        value=float(value),
        numel=len(ordered),
        pruned=k,
        below=int((ordered < value).sum()),
        equal=int((ordered == value).sum()),
    )


def keep_all(tensors: list[Tensor], at: Cut) -> list[Tensor]:
    masks, ties = [], 0
    for tensor in tensors:
        mask, count = keep_above(tensor, at, ties)
        masks.append(mask)
        ties += count
    return masks


@settings(deadline=None, max_examples=150)
@given(st.lists(st.lists(VALUE, max_size=40), min_size=1, max_size=4), st.floats(0, 1))
def test_the_cut_is_where_sorting_puts_it(groups, share):
    values = [v for group in groups for v in group]
    k = round(share * len(values))
    tensors = [torch.tensor(group, dtype=torch.float32) for group in groups]
    at = cut(lambda: tensors, lambda _: k)
    assert at == by_sorting(values, k)
    masks = keep_all(tensors, at)
    assert [m.shape for m in masks] == [t.shape for t in tensors]
    keep = torch.cat(masks).numpy()
    assert int(keep.sum()) == len(values) - k
    # Kept is what comes last in an order by value in which, among equals, the first in flat order are the largest.
    order = sorted(range(len(values)), key=lambda i: (np.float32(values[i]) + np.float32(0), -i))
    assert np.array_equal(np.flatnonzero(keep), np.sort(np.array(order[k:], dtype=np.int64)))


@pytest.mark.parametrize("k", [0, 1, 4, 5])
@pytest.mark.parametrize("value", [-math.inf, -2.0, -DENORMAL, 0.0, DENORMAL, math.inf])
def test_all_values_equal(value, k):
    tensors = [torch.full((2,), value), torch.full((3, 1), value)]
    masks = keep_all(tensors, cut(lambda: tensors, lambda _: k))
    assert torch.cat([m.flatten() for m in masks]).tolist() == [True] * (5 - k) + [False] * k


@pytest.mark.parametrize("native", [True, False])
def test_chunks_and_dtypes(native, monkeypatch):
    monkeypatch.setattr(radix_counts, "_CHUNK", 7)
    if not native:
        monkeypatch.setattr(radix_counts, "native_library", lambda: None)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        values = torch.randn(3, 101, generator=torch.Generator().manual_seed(0)).to(dtype)
        assert cut(lambda t=values: [t.t()], lambda n: n // 3) == by_sorting(values.flatten().tolist(), 101)


def test_large_random_values():
    values = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    for k in (1, 77_777, 199_999, 200_000):
        assert cut(lambda: values.split(30_000), lambda _, k=k: k).value == float(values.kthvalue(k).values)


@pytest.mark.parametrize("k", [-1, 4])
def test_counts_out_of_range(k):
    with pytest.raises(ValueError, match=f"cannot prune {k} of 3 values"):
        cut(lambda: [torch.zeros(3)], lambda _: k)


def test_nan_has_no_place():
    with pytest.raises(ValueError, match="NaN"):
        cut(lambda: [torch.zeros(3), torch.tensor([1.0, math.nan])], lambda _: 2)


def test_nothing_to_cut():
    assert cut(list, lambda numel: numel).numel == 0
