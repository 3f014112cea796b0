"""Factorisations of damped Gram matrices."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_ATTEMPTS = 8
_SMALLEST_RETRY_DAMPING = 1e-6


def safe_norm(norm: Tensor) -> Tensor:
    """``norm`` [in] with 1 in place of the zeros of dead columns, so that dividing by it leaves them at zero."""
    return norm.masked_fill(norm == 0, 1.0)


def damp(matrix: Tensor, damping: float) -> Tensor:
    """matrix + damping · mean(diag) · I, [..., n, n], a new tensor; an all-zero one is damped as if its mean were 1."""
    mean = matrix.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    damped = matrix.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(damping * torch.where(mean > 0, mean, 1.0))
    return damped


def damped_cholesky(matrix: Tensor, damping: float, ridge: float = 0.0) -> tuple[Tensor, Tensor]:
    """The damped matrix A = damp(matrix, damping), and lower L with LLᵀ = A + ridge·I; [n, n] or a batch [..., n, n].

    When the factorisation fails, for any matrix of a batch, the damping grows ten-fold and all are tried again, with a
    warning in the log.

    Raises:
        torch.linalg.LinAlgError: it failed at every damping tried.
    """
    for _ in range(_ATTEMPTS):
        damped = damp(matrix, damping)
        shifted = damped
        if ridge:
            shifted = damped.clone()
            shifted.diagonal(dim1=-2, dim2=-1).add_(ridge)
        factor, failed_at = torch.linalg.cholesky_ex(shifted)
        if not failed_at.any() and factor.diagonal(dim1=-2, dim2=-1).isfinite().all():
            return damped, factor
        larger = max(10 * damping, _SMALLEST_RETRY_DAMPING)
        logger.warning(
            "Cholesky of a %d×%d matrix failed at damping %g; trying %g", *matrix.shape[-2:], damping, larger
        )
        damping = larger
    raise torch.linalg.LinAlgError(f"Cholesky factorisation failed up to damping {damping:g}; are the inputs finite?")


def inverse_factor(matrix: Tensor, damping: float) -> Tensor:
    """Upper triangular U with UᵀU = damp(matrix, damping)⁻¹, [in, in].

    The trailing block U[j:, j:] is the same factor for the inverse of the trailing block of the matrix, which is why
    methods that go through the columns left to right need just one factorisation.

    Raises:
        torch.linalg.LinAlgError: see ``damped_cholesky``.
    """
    # Reversing rows and columns turns LLᵀ into RRᵀ with R upper, and then U = R⁻¹; unlike a Cholesky factor of the
    # explicit inverse this never squares the condition number.
    _, lower = damped_cholesky(matrix.flip(0, 1), damping)
    upper = lower.flip(0, 1)
    identity = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
    inverse: Tensor = torch.linalg.solve_triangular(upper, identity, upper=True)
    return inverse


def block_bounds(in_features: int, block_size: int, group: int) -> list[tuple[int, int]]:
    """(start, stop) of consecutive blocks of columns, each of whole groups of ``group`` columns.

    Raises:
        ValueError: ``block_size`` is not positive.
    """
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    width = max(group, block_size // group * group)
    return [(start, min(start + width, in_features)) for start in range(0, in_features, width)]
