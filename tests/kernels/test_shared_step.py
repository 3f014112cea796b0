"""Adam on one number, held in tensors, against the formula."""

import math

import pytest
import torch
from leap_kernels.adam8bit import EPS
from leap_kernels.shared_step import shared_step


def test_it_is_adam_on_one_number():
    moments, m, v = torch.zeros(2, dtype=torch.float64), 0.0, 0.0
    for step, g in enumerate((2.5, -0.125, 0.0, 1e-12)):
        taken = shared_step(torch.tensor(g, dtype=torch.float64), moments, 0.05, (0.9, 0.95), step)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        exact = 0.05 * (m / (1 - 0.9 ** (step + 1))) / (math.sqrt(v / (1 - 0.95 ** (step + 1))) + EPS)
        assert float(taken) == pytest.approx(exact, rel=1e-12)
        assert moments.tolist() == pytest.approx([m, v], rel=1e-12)


def test_a_gradient_of_zero_moves_nothing():
    moments = torch.zeros(2, dtype=torch.float64)
    assert float(shared_step(torch.zeros((), dtype=torch.float64), moments, 0.05, (0.9, 0.95), 0)) == 0
