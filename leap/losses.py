"""Losses on next-token distributions, without copies of the size of the model's output.

Over a vocabulary of 49 k, a straightforward cross-entropy with a KL divergence keeps half a dozen fp32 copies of the
logits for backward. Here both passes walk over chunks of positions, and backward computes the softmax again.

Shapes: R rows, S tokens in a row, T = R·S positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_CHUNK = 1 << 22  # elements of the logits at a time: 16 MB for each of the handful of fp32 temporaries
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
    cross_entropy, divergence = _OutputLosses.apply(student.flatten(0, 1), targets, flat_teacher)
    return cross_entropy, None if teacher is None else divergence


class _OutputLosses(torch.autograd.Function):
    """(Σ −log p_target / #targets, Σ KL / T) of student [T, V], targets [T] and teacher [T, V] or None.

    With p the student's and q the teacher's distribution, d(−log p_target)/dz = p − 1_target and dKL/dz = p − q.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, targets: Tensor, teacher: Tensor | None) -> tuple[Tensor, Tensor]:
        dtype = _compute_dtype(student)
        sums = torch.zeros(2, dtype=torch.float64, device=student.device)
        for chunk in _chunks(student):
            log_p = F.log_softmax(student[chunk].to(dtype), dim=-1)
            sums[0] += F.nll_loss(log_p, targets[chunk], ignore_index=_NO_TARGET, reduction="sum")
            if teacher is not None:
                log_q = F.log_softmax(teacher[chunk].to(dtype), dim=-1)
                sums[1] += F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1).sum(dtype=torch.float64)
        ctx.save_for_backward(student, targets, teacher)
        cross_entropy = sums[0] / (targets != _NO_TARGET).sum()
        return cross_entropy.to(dtype), (sums[1] / len(student)).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ce: Tensor, grad_kl: Tensor) -> tuple[Tensor | None, ...]:
        student, targets, teacher = ctx.saved_tensors
        dtype = _compute_dtype(student)
        has_target = targets != _NO_TARGET
        per_target = torch.where(has_target, grad_ce / has_target.sum(), 0).to(dtype).unsqueeze(-1)  # [T, 1]
        per_position = grad_kl / len(student)
        grad = torch.empty_like(student)
        for chunk in _chunks(student):
            of_p = per_target[chunk] if teacher is None else per_target[chunk] + per_position
            out = F.softmax(student[chunk].to(dtype), dim=-1).mul_(of_p)
            out.scatter_add_(-1, targets[chunk].clamp_min(0).unsqueeze(-1), -per_target[chunk])
            if teacher is not None:
                out.sub_(F.softmax(teacher[chunk].to(dtype), dim=-1).mul_(per_position))
            grad[chunk] = out
        return grad, None, None


def _compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _chunks(logits: Tensor) -> Iterator[slice]:
    size = max(1, _CHUNK // logits.shape[-1])
    return (slice(first, first + size) for first in range(0, len(logits), size))
