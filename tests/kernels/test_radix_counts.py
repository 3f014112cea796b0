"""Histograms by halves of the ordering key: native against reference, and what they say of the order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from leap_kernels import native, radix_counts
from leap_kernels.radix_counts import BUCKETS, count_high, count_low, value_of

SPECIAL = torch.tensor([0.0, -0.0, 1e-45, -1e-45, float("inf"), -float("inf"), 3.4e38, -3.4e38, 1.0, -1.0])


@pytest.fixture(params=["native", "reference"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "native":
        assert radix_counts.native_library() is not None
    else:
        monkeypatch.setattr(radix_counts, "native_library", lambda: None)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_counts_follow_the_order_of_the_values(implementation: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.cat([torch.randn(5000, generator=generator) * 10 ** torch.randn(5000, generator=generator), SPECIAL])
    values = values.to(dtype)
    high, ranked = count_high(values.view(2, -1)), values.float().sort().values
    assert int(high.sum()) == len(values)
    place = 0
    for upper in high.nonzero().flatten().tolist():
        low = count_low(values, upper)
        assert int(low.sum()) == int(high[upper])
        for lower in low.nonzero().flatten().tolist():
            count = int(low[lower])
            assert (ranked[place : place + count] == value_of(upper, lower)).all()
            place += count


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(allow_nan=False, width=32), max_size=60))
def test_native_code_counts_as_the_reference_does(values: list[float]) -> None:
    assert radix_counts.native_library() is not None
    tensor = torch.tensor(values, dtype=torch.float32)
    ours = [count_high(tensor), *(count_low(tensor, upper) for upper in range(0, BUCKETS, 8191))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(radix_counts, "native_library", lambda: None)
        theirs = [count_high(tensor), *(count_low(tensor, upper) for upper in range(0, BUCKETS, 8191))]
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_more_than_one_threads_share(implementation: str) -> None:
    values = torch.randn(3 * (1 << 20) + 17, generator=torch.Generator().manual_seed(1))
    expected = torch.bincount((values >= 0).long())
    high = count_high(values)
    assert int(high[: BUCKETS // 2].sum()) == int(expected[0])
    assert int(high[BUCKETS // 2 :].sum()) == int(expected[1])


def test_nan_is_refused(implementation: str) -> None:
    with pytest.raises(ValueError, match="NaN"):
        count_high(torch.tensor([1.0, float("nan")]))


def test_other_number_types_go_through_the_reference() -> None:
    assert torch.float64 not in native.DTYPE_CODES
    values = torch.randn(100, dtype=torch.float64)
    assert torch.equal(count_high(values), count_high(values.float()))
