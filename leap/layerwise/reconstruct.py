"""New values for the kept weights of a given mask, so that the layer's output changes least."""

from __future__ import annotations

import torch
from torch import Tensor

from leap.layerwise.admm import admm_iterations
from leap.layerwise.base import Precision, compute_dtype
from leap.layerwise.linalg import damp


@torch.no_grad()
def reconstruct(
    weight: Tensor,
    mask: Tensor,
    gram: Tensor,
    *,
    damping: float = 0.01,
    iterations: int = 100,
    tolerance: float = 1e-4,
    precision: Precision = "float32",
) -> Tensor:
    """Least squares with a fixed mask: min over Ŵ, zero off the mask, of Σ_rows (ŵ − w) H (ŵ − w)ᵀ.

    H = XᵀX + damping·mean(diag)·I. Every row is a quadratic program of its own, which is OPTIMA's problem for the
    change r = ŵ − w: min rᵀHr with r = −w on the pruned weights (arXiv 2512.13886; method.md, section 4). All rows are
    solved together by conjugate gradients projected on the mask, from ŵ = w on the mask.

    Args:
        weight: [out, in] dense weights, any float dtype.
        mask: bool [out, in], True = keep.
        gram: XᵀX, [in, in].
        damping: pulls kept weights towards their old values, in units of the mean diagonal.
        iterations: at most.
        tolerance: stop when no row's gradient exceeds this fraction of its gradient at ŵ = 0.
        precision: dtype of the arithmetic.

    Returns:
        [out, in] in the dtype of ``weight``, zero where the mask is False.

    Raises:
        ValueError: shapes do not fit together, or a bad precision.
    """
    _check_shapes(weight, mask, gram)
    dtype = compute_dtype(precision)
    w = weight.to(dtype)
    hessian = damp(gram.to(dtype), damping)
    return conjugate_gradient(w, mask, hessian, w, iterations=iterations, tolerance=tolerance).to(weight.dtype)


@torch.no_grad()
def reconstruct_admm(
    weight: Tensor,
    mask: Tensor,
    gram: Tensor,
    *,
    damping: float = 0.1,
    iterations: int = 20,
    rho: float = 1.0,
    precision: Precision = "float32",
) -> Tensor:
    """The problem of ``reconstruct`` by ADMM with a fixed mask (Boža, arXiv 2401.02938; method.md, section 4).

    Its cost is fixed, one factorisation and ``iterations`` products, and so is its distance from the optimum; it damps
    the Gram matrix normalised to unit diagonal, so equal values of ``damping`` mean different problems.

    Args:
        weight, mask, gram: as for ``reconstruct``.
        damping: of the normalised Gram matrix, in units of its mean diagonal.
        iterations: of ADMM.
        rho: ADMM's penalty.
        precision: dtype of the arithmetic.

    Returns:
        [out, in] in the dtype of ``weight``, zero where the mask is False.

    Raises:
        ValueError: shapes do not fit together, or a bad precision.
        torch.linalg.LinAlgError: see ``damped_cholesky``.
    """
    _check_shapes(weight, mask, gram)
    dtype = compute_dtype(precision)
    new = admm_iterations(
        weight.to(dtype),
        gram.to(dtype),
        lambda _step, _candidate: mask,
        iterations=iterations,
        rho=rho,
        damping=damping,
    )
    return new.to(weight.dtype)


def conjugate_gradient(
    weight: Tensor, mask: Tensor, hessian: Tensor, start: Tensor, *, iterations: int, tolerance: float
) -> Tensor:
    """min over x, zero off ``mask``, of Σ_rows (x − weight) H (x − weight)ᵀ by conjugate gradients.

    The diagonal of H serves as the preconditioner.

    Args:
        weight: [out, in], in the dtype to compute in.
        mask: bool [out, in].
        hessian: [in, in], positive definite.
        start: [out, in] first guess; only its values on the mask count.
        iterations, tolerance: see ``reconstruct``.

    Returns:
        [out, in], zero where the mask is False.
    """
    # Zero off the mask, the preconditioner is the projection too.
    precondition = mask / hessian.diagonal()
    x = start * mask
    gradient_at_zero = weight @ hessian
    limit = tolerance**2 * (gradient_at_zero.square() * precondition).sum(1, keepdim=True)
    residual = gradient_at_zero - x @ hessian
    z = residual * precondition
    direction = z
    slope = (residual * z).sum(1, keepdim=True)
    for _ in range(iterations):
        # Rows that are done stay as they are: their steps would divide rounding errors by one another.
        active = slope > limit
        if not active.any():
            break
        curved = direction @ hessian
        step = torch.where(active, slope / (direction * curved).sum(1, keepdim=True), 0)
        x = x + step * direction
        residual = residual - step * curved
        z = residual * precondition
        next_slope = (residual * z).sum(1, keepdim=True)
        direction = z + torch.where(active, next_slope / slope, 0) * direction
        slope = next_slope
    return x


def _check_shapes(weight: Tensor, mask: Tensor, gram: Tensor) -> None:
    columns = weight.shape[-1]
    if mask.shape != weight.shape or gram.shape != (columns, columns):
        raise ValueError(
            f"weight {list(weight.shape)}, mask {list(mask.shape)}, Gram matrix {list(gram.shape)} do not fit together"
        )
