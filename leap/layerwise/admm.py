"""ADMM pruning: mask and weights of a layer by alternating projections."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from leap.layerwise.base import LayerResult, Precision, compute_dtype, layer_method
from leap.layerwise.linalg import damped_cholesky, safe_norm
from leap.layerwise.selection import Target, keep_largest, prune_count, select_mask
from leap.layerwise.statistics import InputStatistics

Schedule = Literal["native", "constant", "cubic"]


@layer_method(needs="gram", changes_weights=True, steps=28)
def admm(
    weight: Tensor,
    stats: InputStatistics,
    target: Target,
    *,
    schedule: Schedule = "native",
    iterations: int = 20,
    mask_iterations: int = 15,
    rho: float = 1.0,
    damping: float = 0.1,
    precision: Precision = "float32",
) -> LayerResult:
    """ADMM for mask and weights (Boža, arXiv 2401.02938; method.md, section 4).

    The score is |V + U| at the last choice of the mask, in units of weight × input norm; dead columns score zero.

    Args:
        schedule: "constant" asks for the final sparsity from the first iteration; "cubic" for
            s − s(1 − (t+1)/mask_iterations)³, the paper's gradual pruning. "native" is cubic for N:M, constant
            otherwise, as in the authors' code over the layer (its code by row is cubic, too).
        iterations: of ADMM in all.
        mask_iterations: how many of them, from the first, choose the mask anew.
        rho: ADMM's penalty.
        damping: of the normalised Gram matrix, in units of its mean diagonal.
        precision: dtype of the arithmetic.

    Raises:
        ValueError: a bad option.
        torch.linalg.LinAlgError: see ``damped_cholesky``.
    """
    if schedule not in get_args(Schedule):
        raise ValueError(f"schedule must be one of {', '.join(get_args(Schedule))}, got {schedule!r}")
    if not 1 <= mask_iterations <= iterations:
        raise ValueError(f"mask_iterations must be in [1, iterations={iterations}], got {mask_iterations}")
    dtype = compute_dtype(precision)
    gradual = schedule == "cubic" or (schedule == "native" and target.pattern is not None)
    dead = stats.norm == 0
    score = mask = torch.empty(0)

    def choose_mask(step: int, candidate: Tensor) -> Tensor:
        nonlocal score, mask
        if step < mask_iterations:
            score = candidate.abs().masked_fill(dead, 0)
            left = 1 - (step + 1) / mask_iterations if gradual else 0.0
            mask = _partial_mask(score, target, 1 - left**3)
        return mask

    new_weight = admm_iterations(
        weight.to(dtype), stats.gram.to(dtype), choose_mask, iterations=iterations, rho=rho, damping=damping
    )
    return LayerResult(mask, new_weight.to(weight.dtype), score.float())


def _partial_mask(score: Tensor, target: Target, share: float) -> Tensor:
    """Bool [out, in] that prunes ``share`` of what ``target`` does.

    Of N:M groups, the authors' code spares the N best of each and prunes the smallest of all others in the layer.
    """
    sparsity = target.sparsity * share
    if target.pattern is None:
        return select_mask(score, replace(target, sparsity=sparsity))
    spared = select_mask(score, target)
    ranked = score.masked_fill(spared, float("inf")).reshape(1, -1)
    return keep_largest(ranked, score.numel() - prune_count(sparsity, score.numel())).reshape(score.shape)


def admm_iterations(
    weight: Tensor,
    gram: Tensor,
    choose_mask: Callable[[int, Tensor], Tensor],
    *,
    iterations: int,
    rho: float,
    damping: float,
) -> Tensor:
    """The iterations shared by ADMM pruning and reconstruction for a fixed mask.

    Args:
        weight: [out, in], in the dtype to compute in.
        gram: XᵀX, [in, in], same dtype.
        choose_mask: from (iteration, V + U [out, in], in units of weight × input norm) the mask to project on.

    Returns:
        [out, in], zero where the last mask is False.
    """
    norm = safe_norm(gram.diagonal().sqrt())
    damped, factor = damped_cholesky(gram / norm / norm[:, None], damping, ridge=rho)
    # At most in_features / (damping + rho) in condition, so the explicit inverse is accurate, and products with it are
    # far faster on a GPU than triangular solves.
    inverse = torch.cholesky_inverse(factor)
    v = weight * norm
    pull = v @ damped
    u = torch.zeros_like(v)
    mask = torch.ones_like(v, dtype=torch.bool)
    for step in range(iterations):
        candidate = v + u
        mask = choose_mask(step, candidate)
        z = candidate * mask
        u = candidate - z
        v = (pull + rho * (z - u)) @ inverse
    return (v + u) * mask / norm
