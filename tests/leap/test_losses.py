"""Chunked losses against PyTorch's own, and what they keep for backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from leap_kernels import output_losses as output_losses_kernel
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from leap.losses import output_losses


def case(rows: int, seq: int, vocabulary: int, dtype=torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        (torch.randn(rows, seq, vocabulary, generator=generator, dtype=torch.float64) * 4).to(dtype) for _ in "st"
    )
    return student, torch.randint(vocabulary, (rows, seq), generator=generator), teacher


def by_torch(student: Tensor, rows: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    cross_entropy = F.cross_entropy(student[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
    p, q = (F.log_softmax(t.flatten(0, 1), dim=-1) for t in (student, teacher))
    return cross_entropy, F.kl_div(p, q, log_target=True, reduction="batchmean")


@pytest.mark.parametrize("shape", [(1, 2, 2), (3, 7, 11), (2, 33, 50)])
@pytest.mark.parametrize("chunk", [1, 130, 1 << 22])  # a position at a time, chunks that end unevenly, all at once
def test_values_and_gradients_are_those_of_torch(shape, chunk, monkeypatch):
    monkeypatch.setattr(output_losses_kernel, "_CHUNK", chunk)
    student, rows, teacher = case(*shape)
    for weights in ((1.0, 0.0), (0.0, 1.0), (0.3, 0.7)):
        results = []
        for function in (output_losses, by_torch):
            leaf = student.clone().requires_grad_()
            parts = function(leaf, rows, teacher)
            loss = weights[0] * parts[0] + weights[1] * parts[1]
            results.append((*(p.detach() for p in parts), torch.autograd.grad(loss, leaf)[0]))
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-14)


def test_without_a_teacher():
    student, rows, teacher = case(2, 5, 9)
    student.requires_grad_()
    cross_entropy, divergence = output_losses(student, rows)
    assert divergence is None
    expected = by_torch(student, rows, teacher)[0]
    torch.testing.assert_close(cross_entropy, expected)
    for ours, theirs in zip(
        torch.autograd.grad(cross_entropy, student), torch.autograd.grad(expected, student), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_bfloat16_logits_are_summed_in_float32():
    student, rows, teacher = case(2, 40, 300, torch.bfloat16)
    student.requires_grad_()
    parts = output_losses(student, rows, teacher)
    assert [p.dtype for p in parts] == [torch.float32, torch.float32]
    leaf = student.detach().double().requires_grad_()
    expected = by_torch(leaf, rows, teacher.double())
    for ours, theirs in zip(parts, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=0)
    (grad,), (grad64,) = torch.autograd.grad(sum(parts), student), torch.autograd.grad(sum(expected), leaf)
    assert grad.dtype == torch.bfloat16
    assert float((grad.double() - grad64).abs().max()) < 2**-8 * float(grad64.abs().max())


def test_identical_distributions_diverge_by_nothing():
    student, rows, _ = case(2, 5, 9)
    student.requires_grad_()
    _, divergence = output_losses(student, rows, student.detach() + 3)  # a shift does not change a softmax
    assert abs(float(divergence.detach())) < 1e-14
    assert float(torch.autograd.grad(divergence, student)[0].abs().max()) < 1e-14


def test_nothing_of_the_size_of_the_output_is_saved_but_the_outputs():
    student, rows, teacher = case(2, 16, 64, torch.float32)
    student.requires_grad_()
    saved: list[Tensor] = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        output_losses(student, rows, teacher)
    large = {t.data_ptr() for t in saved if t.numel() >= student.numel() // 2}
    assert large == {student.data_ptr(), teacher.data_ptr()}


def test_nan_comes_out_as_nan():
    student, rows, teacher = case(1, 4, 5)
    student[0, 1, 2] = float("nan")
    assert all(torch.isnan(p) for p in output_losses(student, rows, teacher))
