"""Cross-entropy and divergence of next-token distributions over large vocabularies, and the gradient of both.

With p the softmax of the student's logits s and q that of the teacher's t, in each row

    −log p_target = log Σ eˢ − s_target          KL(q ‖ p) = Σ q (t − s) − log Σ eᵗ + log Σ eˢ

and the gradients with respect to s are p − 1_target and p − q. What backward needs besides the logits are the two
logarithms of a row. PyTorch's own functions keep half a dozen fp32 copies of the logits, and walk over them as often.

CPU tensors run native C++, which keeps nothing but a tile of a row, CUDA tensors a Triton kernel for each direction,
neither of which the processor waits for; everything else, and CPUs without a compiler, the PyTorch reference, which
takes a bounded number of rows at a time.

Shapes: T rows (positions), V vocabulary.
"""

import ctypes
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from leap_kernels import native

Factor = float | Tensor
_CHUNK = 1 << 22  # elements of the logits at a time in the reference: 16 MB for each of a handful of fp32 temporaries


def output_losses(student: Tensor, targets: Tensor, teacher: Tensor | None) -> tuple[Tensor, Tensor]:
    """Losses of each row and what :func:`output_losses_backward` needs of the pass.

    Args:
        student, teacher: logits [T, V], any float dtype.
        targets: int64 [T], negative in rows without one.

    Returns:
        float64 [T, 2] of −log p(target), 0 without a target, and KL(teacher ‖ student), 0 without a teacher, in nats;
        and [T, 2] of log Σ eˢ and log Σ eᵗ, fp32, or float64 for float64 logits.

    Raises:
        ValueError: a target beyond the vocabulary, or shapes that differ. On CUDA, where looking would stop the
            processor, such a target makes the loss of its row NaN instead.
    """
    if targets.shape != student.shape[:1] or (teacher is not None and teacher.shape != student.shape):
        shapes = [list(t.shape) for t in (student, targets, teacher) if t is not None]
        raise ValueError(f"student and teacher must be [T, V] and targets [T], not {shapes}")
    if has_triton(student, teacher):
        from leap_kernels.output_losses_triton import output_losses_triton  # Triton is not on every platform

        return output_losses_triton(*_contiguous(student, targets, teacher))
    if len(targets) and int(targets.max()) >= student.shape[1]:
        raise ValueError(f"target {int(targets.max())} lies beyond the vocabulary of {student.shape[1]}")
    library = _library(student, teacher)
    if library is None:
        return output_losses_reference(student, targets, teacher)
    student, targets, teacher = _contiguous(student, targets, teacher)
    losses = torch.empty(len(student), 2, dtype=torch.float64)
    log_sums = torch.empty(len(student), 2, dtype=torch.float32)
    library.leap_output_losses(
        *_argument(student), *_argument(teacher), targets.data_ptr(), losses.data_ptr(), log_sums.data_ptr(),
        *student.shape, torch.get_num_threads(),
    )  # fmt: skip
    return losses, log_sums


def output_losses_backward(
    student: Tensor, targets: Tensor, teacher: Tensor | None, log_sums: Tensor, per_target: Factor, per_row: Factor
) -> Tensor:
    """Gradient [T, V] of ``per_target``·Σ −log p(target) + ``per_row``·Σ KL, in the dtype of ``student``.

    On CUDA, factors that are tensors [] there spare the processor the wait for them.
    """
    if has_triton(student, teacher):
        from leap_kernels.output_losses_triton import output_losses_backward_triton

        return output_losses_backward_triton(*_contiguous(student, targets, teacher), log_sums, per_target, per_row)
    library = _library(student, teacher)
    if library is None:
        return output_losses_backward_reference(student, targets, teacher, log_sums, per_target, per_row)
    student, targets, teacher = _contiguous(student, targets, teacher)
    grad = torch.empty_like(student)
    library.leap_output_losses_backward(
        *_argument(student), *_argument(teacher), targets.data_ptr(), log_sums.data_ptr(),
        float(per_target), float(per_row), grad.data_ptr(), *student.shape, torch.get_num_threads(),
    )  # fmt: skip
    return grad


def output_losses_reference(student: Tensor, targets: Tensor, teacher: Tensor | None) -> tuple[Tensor, Tensor]:
    """:func:`output_losses` in plain PyTorch."""
    dtype = torch.promote_types(student.dtype, torch.float32)
    losses = torch.zeros(len(student), 2, dtype=torch.float64, device=student.device)
    log_sums = torch.zeros(len(student), 2, dtype=dtype, device=student.device)
    for rows in _chunks(student):
        s, target = student[rows].to(dtype), targets[rows]
        log_sums[rows, 0] = s.logsumexp(-1)
        log_p = s - log_sums[rows, :1]
        found = log_p.gather(-1, target.clamp_min(0)[:, None])[:, 0]
        # A row of NaN has to be seen, with a target or without.
        losses[rows, 0] = torch.where((target < 0) & ~log_sums[rows, 0].isnan(), 0.0, -found).double()
        if teacher is not None:
            t = teacher[rows].to(dtype)
            log_sums[rows, 1] = t.logsumexp(-1)
            log_q = t - log_sums[rows, 1:]
            losses[rows, 1] = (log_q.exp() * (log_q - log_p)).sum(-1, dtype=torch.float64)
    return losses, log_sums


def output_losses_backward_reference(
    student: Tensor, targets: Tensor, teacher: Tensor | None, log_sums: Tensor, per_target: Factor, per_row: Factor
) -> Tensor:
    """:func:`output_losses_backward` in plain PyTorch."""
    of_target = (targets >= 0).to(log_sums.dtype)[:, None] * per_target  # [T, 1]
    grad = torch.empty_like(student)
    for rows in _chunks(student):
        p = (student[rows].to(log_sums.dtype) - log_sums[rows, :1]).exp_()
        out = p.mul_(of_target[rows] + per_row)
        out.scatter_add_(-1, targets[rows].clamp_min(0)[:, None], -of_target[rows])
        if teacher is not None:
            q = (teacher[rows].to(log_sums.dtype) - log_sums[rows, 1:]).exp_()
            out.sub_(q.mul_(per_row))
        grad[rows] = out
    return grad


@functools.cache
def native_library() -> ctypes.CDLL | None:
    """``native/output_losses.cpp``, or None where it cannot be built."""
    library = native.load("output_losses", tune_for_host=True)
    if library is not None:
        pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
        logits: list[Any] = [pointer, number, pointer, number, pointer]
        library.leap_output_losses.argtypes = [*logits, pointer, pointer, size, size, number]
        library.leap_output_losses.restype = None
        factors: list[Any] = [ctypes.c_float, ctypes.c_float]
        library.leap_output_losses_backward.argtypes = [*logits, pointer, *factors, pointer, size, size, number]
        library.leap_output_losses_backward.restype = None
    return library


def has_triton(student: Tensor, teacher: Tensor | None) -> bool:
    """Whether the Triton kernels take these logits."""
    return student.is_cuda and all(t is None or t.dtype in native.DTYPE_CODES for t in (student, teacher))


def _contiguous(student: Tensor, targets: Tensor, teacher: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    return student.contiguous(), targets.contiguous(), None if teacher is None else teacher.contiguous()


def _library(*logits: Tensor | None) -> ctypes.CDLL | None:
    has_code = all(t is None or (t.device.type == "cpu" and t.dtype in native.DTYPE_CODES) for t in logits)
    return native_library() if has_code else None


def _argument(logits: Tensor | None) -> tuple[int | None, int]:
    return (None, 0) if logits is None else (logits.data_ptr(), native.DTYPE_CODES[logits.dtype])


def _chunks(logits: Tensor) -> Iterator[slice]:
    size = max(1, _CHUNK // logits.shape[-1])
    return (slice(first, first + size) for first in range(0, len(logits), size))
