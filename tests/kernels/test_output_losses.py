"""Losses over a vocabulary: both implementations against float64 autograd, and what they do at the edges."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from leap_kernels import output_losses as op
from leap_kernels.output_losses import output_losses, output_losses_backward
from torch import Tensor


@pytest.fixture(params=["native", "reference"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "native":
        assert op.native_library() is not None
    else:
        monkeypatch.setattr(op, "native_library", lambda: None)
        monkeypatch.setattr(op, "_CHUNK", 5000)  # several chunks, the last one shorter
    return request.param


def case(rows: int, vocabulary: int, dtype: torch.dtype, size: float = 4.0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(rows * vocabulary)
    student, teacher = ((torch.randn(rows, vocabulary, generator=g) * size).to(dtype) for _ in "st")
    targets = torch.randint(vocabulary, (rows,), generator=g)
    targets[rows // 2] = -100
    return student, targets, teacher


def by_autograd(student: Tensor, targets: Tensor, teacher: Tensor | None, per_target: float, per_row: float):
    """float64: losses [T, 2] and the gradient of their weighted sum."""
    leaf = student.double().requires_grad_()
    of_target = F.cross_entropy(leaf, targets, reduction="none", ignore_index=-100)
    divergence = torch.zeros_like(of_target)
    if teacher is not None:
        log_p, log_q = F.log_softmax(leaf, -1), F.log_softmax(teacher.double(), -1)
        divergence = F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)
    (grad,) = torch.autograd.grad(per_target * of_target.sum() + per_row * divergence.sum(), leaf)
    return torch.stack([of_target, divergence], 1).detach(), grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (7, 1023), (5, 1024), (4, 1025), (6, 3001)])
@pytest.mark.parametrize("with_teacher", [True, False])
def test_losses_and_gradient_are_those_of_autograd(implementation, dtype, shape, with_teacher):
    student, targets, teacher = case(*shape, dtype)
    given_teacher = teacher if with_teacher else None
    expected, expected_grad = by_autograd(student, targets, given_teacher, 0.3, 0.7)
    losses, log_sums = output_losses(student, targets, given_teacher)
    torch.testing.assert_close(losses, expected, rtol=2e-6, atol=1e-5)
    grad = output_losses_backward(student, targets, given_teacher, log_sums, 0.3, 0.7 if with_teacher else 0.0)
    assert grad.dtype == dtype
    spacing = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    torch.testing.assert_close(grad.double(), expected_grad, rtol=spacing, atol=2e-6)


def test_large_and_infinite_logits(implementation):
    student, targets, teacher = case(4, 1500, torch.float32, size=300.0)
    student[:, 100] = teacher[:, 100] = -float("inf")  # a token that neither model can produce
    targets[targets == 100] = 99
    losses, log_sums = output_losses(student, targets, None)
    torch.testing.assert_close(losses, by_autograd(student, targets, None, 1.0, 0.0)[0], rtol=2e-6, atol=1e-4)
    grad = output_losses_backward(student, targets, None, log_sums, 1.0, 0.0)
    assert torch.isfinite(grad).all()
    assert (grad[:, 100] == 0).all()


def test_nan_makes_both_losses_of_its_row_nan(implementation):
    student, targets, teacher = case(3, 1200, torch.float32)
    student[0, 1100], student[1, 7] = float("nan"), float("nan")  # row 1 has no target
    losses, _ = output_losses(student, targets, teacher)
    assert losses[:2].isnan().all()
    assert losses[2].isfinite().all()


def test_what_would_be_read_beyond_the_logits_is_refused(implementation):
    student, targets, teacher = case(3, 10, torch.float32)
    targets[0] = 10
    with pytest.raises(ValueError, match="target 10 lies beyond the vocabulary of 10"):
        output_losses(student, targets, teacher)
    with pytest.raises(ValueError, match="must be"):
        output_losses(student, targets[:2], teacher)
    with pytest.raises(ValueError, match="must be"):
        output_losses(student, targets, teacher[:, :9])


def test_threads_change_nothing():
    student, targets, teacher = case(33, 4097, torch.bfloat16)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            losses, log_sums = output_losses(student, targets, teacher)
            results.append((losses, log_sums, output_losses_backward(student, targets, teacher, log_sums, 1.0, 1.0)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=40), st.floats(-50, 50, width=32))
def test_a_shifted_teacher_diverges_by_nothing_and_a_gradient_sums_to_zero(values, shift):
    student = torch.tensor([values])
    teacher = torch.tensor([[value + shift for value in values]])
    targets = torch.tensor([len(values) - 1])
    losses, log_sums = output_losses(student, targets, teacher)
    assert abs(float(losses[0, 1])) < 1e-4
    assert float(losses[0, 0]) > -1e-5
    grad = output_losses_backward(student, targets, teacher, log_sums, 1.0, 1.0)
    assert abs(float(grad.sum())) < 1e-4
