"""Stochastically rounded sums in bfloat16: their mean, their slices, and what is refused."""

from __future__ import annotations

import pytest
import torch
from leap_kernels.add_stochastic import add_stochastic

STREAM = {"seed": 3, "layer": 1 << 30, "step": 5}


def test_what_is_too_small_for_the_nearest_value_adds_up():
    total, term = torch.ones(50_000, dtype=torch.bfloat16), torch.full((50_000,), 2**-12, dtype=torch.bfloat16)
    for step in range(64):
        add_stochastic(total, term, seed=3, layer=1, step=step)
    # 64 · 2⁻¹², where the nearest value would leave 0. Each addition's variance is at most a quarter of 2⁻⁷ squared.
    slack = 5 * (64 * 2**-16 / 50_000) ** 0.5
    assert float(total.double().mean()) - 1 == pytest.approx(64 * 2**-12, abs=slack)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_each_sum_is_one_of_the_two_neighbours(dtype):
    total, term = torch.randn(20_000).bfloat16(), torch.randn(20_000).to(dtype)
    exact = total.double() + term.double()
    add_stochastic(total, term, **STREAM)
    assert bool(((total.double() - exact).abs() <= exact.abs() * 2**-7 + 1e-6).all())


def test_a_slice_gets_what_the_whole_does():
    total, term = torch.randn(1001).bfloat16(), torch.randn(1001).bfloat16()
    parts = [(total[part].clone(), term[part], part.start) for part in (slice(0, 403), slice(403, 1001))]
    add_stochastic(total, term, **STREAM, offset=7)
    for part, of_part, start in parts:
        add_stochastic(part, of_part, **STREAM, offset=7 + start)
    assert torch.equal(total, torch.cat([part for part, _, _ in parts]))


def test_what_does_not_fit_is_refused():
    total = torch.zeros(4, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="bfloat16"):
        add_stochastic(torch.zeros(4), torch.zeros(4), **STREAM)
    with pytest.raises(ValueError, match="contiguous"):
        add_stochastic(torch.zeros(8, dtype=torch.bfloat16)[::2], total, **STREAM)
    with pytest.raises(ValueError, match="one length"):
        add_stochastic(total, torch.zeros(5), **STREAM)
    with pytest.raises(ValueError, match="step"):
        add_stochastic(total, total, seed=0, layer=0, step=-1)
