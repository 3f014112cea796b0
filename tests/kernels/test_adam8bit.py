"""The native step of packed Adam against the PyTorch reference, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from leap_kernels import adam8bit as op
from leap_kernels.adam8bit import NO_MOMENTS, AdamStep, adam8bit, adam8bit_reference, unpack_moments

BETAS = (0.9, 0.95)


@pytest.fixture(autouse=True)
def _native() -> None:
    assert op.native_library() is not None


def both(count: int, steps: int, logits_dtype: torch.dtype, grad_dtype: torch.dtype, seed: int = 0, shift: float = 0.0):
    """(logits, moments) of both implementations after ``steps`` with gradients of many sizes."""
    g = torch.Generator().manual_seed(seed)
    first = torch.randn(count, generator=g).to(logits_dtype)
    size = 10 ** (-6 * torch.rand(count, generator=g))
    grads = [(size * torch.randn(count, generator=g)).to(grad_dtype) for _ in range(steps)]
    results = []
    for function in (adam8bit, adam8bit_reference):
        logits, moments = first.clone(), torch.full((count,), NO_MOMENTS, dtype=torch.int16)
        for step, grad in enumerate(grads):
            function(logits, grad, moments, AdamStep(0.01, BETAS, seed, 7, step, offset=13, shift=shift))
        results.append((logits, moments))
    return results


@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_one_step_is_the_references(logits_dtype, grad_dtype, shift):
    (logits, moments), (expected, expected_moments) = both(70_001, 1, logits_dtype, grad_dtype, shift=shift)
    # A value within rounding of a threshold may go to the other side: to a neighbour on its grid.
    assert (moments == expected_moments).float().mean() > 0.9995
    spacing = 1e-6 if logits_dtype == torch.float32 else 2**-7
    torch.testing.assert_close(logits.float(), expected.float(), rtol=spacing, atol=1e-7)


def test_many_steps_stay_with_the_references():
    (logits, moments), (expected, expected_moments) = both(40_000, 30, torch.float32, torch.float32)
    assert (moments == expected_moments).float().mean() > 0.98
    assert float((logits - expected).abs().mean()) < 2e-5, "a five-hundredth of one update"


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=40), st.integers(0, 3))
def test_whatever_the_gradient_the_state_is_one_of_the_format(values, offset):
    grad = torch.tensor(values)
    logits, moments = torch.zeros(len(grad)), torch.full((len(grad),), NO_MOMENTS, dtype=torch.int16)
    s = AdamStep(0.5, BETAS, 1, 2, 0, offset)
    adam8bit(logits, grad, moments, s)
    m, v = unpack_moments(moments, s.unit)
    assert torch.isfinite(m).all()
    assert torch.isfinite(v).all()
    assert torch.isfinite(logits).all()
    assert bool((logits.abs() <= 0.5 * 1.0001).all()), "a first update is at most the rate"


def test_threads_change_nothing():
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(both(30_000, 2, torch.float32, torch.float32)[0])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradients_in_float64_go_through_the_reference():
    s, grad = AdamStep(0.1, BETAS, 0, 0, 0), torch.randn(100, dtype=torch.float64)
    results = []
    for function in (adam8bit, adam8bit_reference):
        logits, moments = torch.zeros(100), torch.full((100,), NO_MOMENTS, dtype=torch.int16)
        function(logits, grad, moments, s)
        results.append((logits, moments))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert (results[0][0] != 0).all()


def test_what_does_not_fit_is_refused():
    flat, moments = torch.zeros(4), torch.zeros(4, dtype=torch.int16)
    s = AdamStep(0.1, BETAS, 0, 0, 0)
    with pytest.raises(ValueError, match="int16"):
        adam8bit(flat, flat, flat, s)
    with pytest.raises(ValueError, match="one length"):
        adam8bit(flat, torch.zeros(5), moments, s)
    with pytest.raises(ValueError, match="contiguous"):
        adam8bit(torch.zeros(8)[::2], flat, moments, s)
