"""Losses over a vocabulary on a GPU; see :mod:`leap_kernels.output_losses` for the contract.

Forward reads each logit once: every lane keeps the greatest logits that it has seen, and sums relative to them that are
scaled when those grow. The lanes are brought together at the end of the row only.

Shapes: T rows (positions), V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from leap_kernels.output_losses import Factor

# Eight 2-byte logits for each of 128 threads; a program reads four times as many before its sums are scaled again.
_LANES = 1024
_BLOCK = 4096  # logits per program of the backward pass


@triton.jit
def load_logits(row_ptr, columns, vocabulary):
    """fp32, −infinity beyond the vocabulary, which adds nothing to a sum of exponentials."""
    return tl.load(row_ptr + columns, mask=columns < vocabulary, other=float("-inf")).to(tl.float32)


@triton.jit
def exponential(x):
    """eˣ in two instructions, 0 where it is below 2**-126; tl.exp takes five to be exact below that."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def product(q, difference):
    """q * difference, 0 for q = 0: not 0 times infinity, where both have a logit of −infinity."""
    return tl.where(q == 0.0, 0.0, q * difference)


@triton.jit
def output_losses_kernel(
    student_ptr,
    teacher_ptr,
    targets_ptr,  # int64 [T]
    losses_ptr,  # float64 [T, 2]
    log_sums_ptr,  # float32 [T, 2]
    vocabulary,
    HAS_TEACHER: tl.constexpr,
    LANES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * vocabulary
    # The lowest finite number: minus infinity less itself would be NaN.
    s_most = tl.full([LANES], -3.4028234663852886e38, tl.float32)
    s_sum = tl.zeros([LANES], tl.float32)
    if HAS_TEACHER:
        teacher_ptr += row * vocabulary
        t_most, t_sum, difference = s_most, s_sum, s_sum  # Σ eᵗ (t − s) is the third
    for first in range(0, vocabulary, 4 * LANES):
        columns = first + tl.arange(0, LANES)
        s0 = load_logits(student_ptr, columns, vocabulary)
        s1 = load_logits(student_ptr, columns + LANES, vocabulary)
        s2 = load_logits(student_ptr, columns + 2 * LANES, vocabulary)
        s3 = load_logits(student_ptr, columns + 3 * LANES, vocabulary)
        most = tl.maximum(s_most, tl.maximum(tl.maximum(s0, s1), tl.maximum(s2, s3)))
        s_sum = s_sum * exponential(s_most - most) + (exponential(s0 - most) + exponential(s1 - most))
        s_sum += exponential(s2 - most) + exponential(s3 - most)
        s_most = most
        if HAS_TEACHER:
            t0 = load_logits(teacher_ptr, columns, vocabulary)
            t1 = load_logits(teacher_ptr, columns + LANES, vocabulary)
            t2 = load_logits(teacher_ptr, columns + 2 * LANES, vocabulary)
            t3 = load_logits(teacher_ptr, columns + 3 * LANES, vocabulary)
            most = tl.maximum(t_most, tl.maximum(tl.maximum(t0, t1), tl.maximum(t2, t3)))
            scale = exponential(t_most - most)
            q0, q1, q2, q3 = (
                exponential(t0 - most),
                exponential(t1 - most),
                exponential(t2 - most),
                exponential(t3 - most),
            )
            t_sum = t_sum * scale + ((q0 + q1) + (q2 + q3))
            difference = difference * scale + (product(q0, t0 - s0) + product(q1, t1 - s1))
            difference += product(q2, t2 - s2) + product(q3, t3 - s3)
            t_most = most

    s_top = tl.max(s_most)
    s_total = tl.sum(s_sum * exponential(s_most - s_top))
    s_log = tl.log(s_total)
    tl.store(log_sums_ptr + 2 * row, s_top + s_log)
    target = tl.load(targets_ptr + row)
    inside = (target >= 0) & (target < vocabulary)
    found = tl.load(student_ptr + tl.where(inside, target, 0)).to(tl.float32)
    # s_log is NaN where any logit is; that has to be seen, with a target or without.
    loss = tl.where(inside, s_log + (s_top - found), tl.where(s_log == s_log, 0.0, s_log))
    loss = tl.where(target < vocabulary, loss, float("nan"))
    tl.store(losses_ptr + 2 * row, loss.to(tl.float64))
    divergence = 0.0
    t_log_sum = 0.0
    if HAS_TEACHER:
        t_top = tl.max(t_most)
        scale = exponential(t_most - t_top)
        t_total = tl.sum(t_sum * scale)
        divergence = tl.sum(difference * scale) / t_total + (s_top - t_top) + tl.log(s_total / t_total)
        t_log_sum = t_top + tl.log(t_total)
    tl.store(losses_ptr + 2 * row + 1, divergence)
    tl.store(log_sums_ptr + 2 * row + 1, t_log_sum)


@triton.jit
def output_losses_backward_kernel(
    student_ptr,
    teacher_ptr,
    targets_ptr,  # int64 [T]
    log_sums_ptr,  # float32 [T, 2]
    per_target,  # a number, or a pointer to one, as per_row
    per_row,
    grad_ptr,
    vocabulary,
    blocks,  # programs for a row
    PER_TARGET_IN_MEMORY: tl.constexpr,
    PER_ROW_IN_MEMORY: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    columns = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    base = row * vocabulary
    target = tl.load(targets_ptr + row)
    if PER_TARGET_IN_MEMORY:
        per_target = tl.load(per_target).to(tl.float32)
    if PER_ROW_IN_MEMORY:
        per_row = tl.load(per_row).to(tl.float32)
    of_target = tl.where(target >= 0, per_target, 0.0)
    s = load_logits(student_ptr + base, columns, vocabulary)
    grad = (of_target + per_row) * exponential(s - tl.load(log_sums_ptr + 2 * row))
    if HAS_TEACHER:
        t = load_logits(teacher_ptr + base, columns, vocabulary)
        grad -= per_row * exponential(t - tl.load(log_sums_ptr + 2 * row + 1))
    grad = tl.where(columns == target, grad - of_target, grad)
    tl.store(grad_ptr + base + columns, grad.to(grad_ptr.dtype.element_ty), mask=columns < vocabulary)


def output_losses_triton(student: Tensor, targets: Tensor, teacher: Tensor | None) -> tuple[Tensor, Tensor]:
    """:func:`leap_kernels.output_losses.output_losses` for contiguous tensors that fit; no float64 logits."""
    rows, vocabulary = student.shape
    losses = torch.empty(rows, 2, dtype=torch.float64, device=student.device)
    log_sums = torch.empty(rows, 2, dtype=torch.float32, device=student.device)
    with torch.cuda.device_of(student):
        output_losses_kernel[(rows,)](
            student,
            student if teacher is None else teacher,
            targets,
            losses,
            log_sums,
            vocabulary,
            HAS_TEACHER=teacher is not None,
            LANES=_LANES,
        )
    return losses, log_sums


def output_losses_backward_triton(
    student: Tensor, targets: Tensor, teacher: Tensor | None, log_sums: Tensor, per_target: Factor, per_row: Factor
) -> Tensor:
    """:func:`leap_kernels.output_losses.output_losses_backward` for contiguous tensors that fit."""
    rows, vocabulary = student.shape
    grad = torch.empty_like(student)
    blocks = triton.cdiv(vocabulary, _BLOCK)
    with torch.cuda.device_of(student):
        output_losses_backward_kernel[(rows * blocks,)](
            student,
            student if teacher is None else teacher,
            targets,
            log_sums,
            per_target,
            per_row,
            grad,
            vocabulary,
            blocks,
            PER_TARGET_IN_MEMORY=isinstance(per_target, Tensor),
            PER_ROW_IN_MEMORY=isinstance(per_row, Tensor),
            HAS_TEACHER=teacher is not None,
            BLOCK=_BLOCK,
        )
    return grad
