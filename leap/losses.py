"""Losses on next-token distributions, without copies of the size of the model's output.

Shapes: R rows, S tokens in a row, T = R·S positions, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from leap_kernels import output_losses as kernel
from torch import Tensor
from torch.autograd.function import once_differentiable

_NO_TARGET = -100


def output_losses(student: Tensor, rows: Tensor, teacher: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy of ``student``, and its divergence from ``teacher``, both in nats.

    Args:
        student: logits [R, S, V]; the only argument that gets a gradient.
        rows: token ids [R, S]; position s predicts token s + 1.
        teacher: logits [R, S, V].

    Returns:
        The mean of −log p(next token) over the R·(S − 1) positions that have one, and the mean of KL(teacher ‖ student)
        over all R·S positions, None without a teacher. At least fp32.
    """
    targets = F.pad(rows[:, 1:], (0, 1), value=_NO_TARGET).reshape(-1).to(student.device)
    flat_teacher = None if teacher is None else teacher.detach().flatten(0, 1)
    losses = _OutputLosses.apply(student.flatten(0, 1), targets, flat_teacher)
    cross_entropy, divergence = losses
    return cross_entropy, None if teacher is None else divergence


class _OutputLosses(torch.autograd.Function):
    """(Σ −log p_target / #targets, Σ KL / T) of student [T, V], targets [T] and teacher [T, V] or None."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, targets: Tensor, teacher: Tensor | None) -> tuple[Tensor, Tensor]:
        losses, log_sums = kernel.output_losses(student, targets, teacher)
        count = (targets != _NO_TARGET).sum()
        ctx.save_for_backward(student, targets, teacher, log_sums, count)
        cross_entropy, divergence = losses.sum(0)
        return (cross_entropy / count).to(log_sums.dtype), (divergence / len(student)).to(log_sums.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ce: Tensor, grad_kl: Tensor) -> tuple[Tensor | None, ...]:
        student, targets, teacher, log_sums, count = ctx.saved_tensors
        # Tensors, not numbers: on a GPU the backward pass would wait for those.
        per_target = grad_ce / count
        per_row = 0.0 if teacher is None else grad_kl / len(student)
        return kernel.output_losses_backward(student, targets, teacher, log_sums, per_target, per_row), None, None
