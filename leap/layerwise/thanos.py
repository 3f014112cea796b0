"""Thanos: block by block, the mask is ranked anew over all that is left and each row is updated in one solve."""

from __future__ import annotations

import torch
from torch import Tensor

from leap.layerwise.base import LayerResult, Precision, compute_dtype, layer_method
from leap.layerwise.linalg import block_bounds, damped_cholesky, inverse_factor
from leap.layerwise.selection import Target, keep_largest, prune_count, row_counts, select_mask
from leap.layerwise.statistics import InputStatistics

# Shapes: O output rows, I input columns, B columns of a block, R columns not yet done (the block first); in a batch of
# systems, R rows.

# Elements of the row-wise [rows, B, B] systems solved at once: 16 MiB in fp32.
_SYSTEM_ELEMENTS = 2**22


@layer_method(needs="gram", changes_weights=True, steps=43)
def thanos(
    weight: Tensor,
    stats: InputStatistics,
    target: Target,
    *,
    block_size: int = 128,
    damping: float = 0.01,
    precision: Precision = "float32",
) -> LayerResult:
    """Block-wise optimal brain surgeon with adaptive masks (Ilin & Richtárik, arXiv 2504.05346; method.md, section 4).

    Before each block the weights of all remaining columns are ranked by |W|·‖X‖ with the budget that remains; those of
    the block that fall below are removed together, row by row, at the least cost to H = 2XᵀX/tokens, damped, and the
    other remaining weights make up for them. The score is |W|·‖X‖ at the moment the block was done. The paper ranks
    over the layer; scope "row" ranks within each row.

    Args:
        block_size: columns done together; rounded down to whole N:M groups.
        damping: of H, in units of its mean diagonal.
        precision: dtype of the arithmetic.

    Raises:
        ValueError: a bad option.
        torch.linalg.LinAlgError: see ``damped_cholesky``.
    """
    dtype = compute_dtype(precision)
    w_OI = weight.to(dtype, copy=True)
    u_II = inverse_factor(stats.gram.to(dtype) * (2 / stats.tokens), damping)
    norm_I = stats.norm.to(dtype)
    score_OI = torch.empty_like(w_OI)
    mask_OI = torch.empty_like(w_OI, dtype=torch.bool)
    if target.scope == "layer":
        budgets = [prune_count(target.sparsity, weight.numel())]
    else:
        budgets = row_counts(target.sparsity, *weight.shape)
    slices = len(budgets)
    budget = torch.tensor(budgets, device=weight.device)[:, None]
    group = 1 if target.pattern is None else target.pattern[1]

    for start, stop in block_bounds(weight.shape[1], block_size, group):
        w_OR = w_OI[:, start:]
        width = stop - start
        score_OR = w_OR.abs() * norm_I[start:]
        if target.pattern is None:
            ranked = score_OR.reshape(slices, -1)
            keep = ranked.shape[1] - budget
            mask_OB = keep_largest(ranked, keep if slices > 1 else int(keep)).reshape(score_OR.shape)[:, :width]
            budget -= (~mask_OB).reshape(slices, -1).sum(1, keepdim=True)
        else:
            mask_OB = select_mask(score_OR[:, :width], target)
        score_OI[:, start:stop] = score_OR[:, :width]
        mask_OI[:, start:stop] = mask_OB
        # Rows of the block in the inverse of H restricted to the remaining columns.
        inverse_BR = u_II[start:stop, start:stop].T @ u_II[start:stop, start:]
        w_OR -= _multipliers(w_OR[:, :width], ~mask_OB, inverse_BR[:, :width]) @ inverse_BR

    return LayerResult(mask_OI, (w_OI * mask_OI).to(weight.dtype), score_OI.float())


def _multipliers(w_OB: Tensor, pruned_OB: Tensor, inverse_BB: Tensor) -> Tensor:
    """λ [out, B], zero on kept weights, with λ·H⁻¹ = w on the pruned ones: a system of its own for each row.

    P: the most weights that any row of a batch loses.
    """
    lambda_OB = torch.zeros_like(w_OB)
    counts = pruned_OB.sum(1)
    scale = inverse_BB.diagonal().mean()
    # Rows that lose about as many weights are solved together: a system is hardly larger than it has to be.
    for rows in counts.argsort().split(max(1, _SYSTEM_ELEMENTS // w_OB.shape[1] ** 2)):
        size = int(counts[rows].max())
        columns_RP = pruned_OB[rows].byte().argsort(dim=1, descending=True, stable=True)[:, :size]
        filled_RP = torch.arange(size, device=w_OB.device) < counts[rows, None]
        both_RPP = filled_RP[:, :, None] & filled_RP[:, None, :]
        # What a row has less than P is filled up with the identity, scaled like the matrix itself, so that damping
        # means the same for all of a system.
        identity_PP = torch.diag(scale.expand(size))
        system_RPP = torch.where(both_RPP, inverse_BB[columns_RP[:, :, None], columns_RP[:, None, :]], identity_PP)
        _, factor_RPP = damped_cholesky(system_RPP, 0.0)
        right_RP = w_OB[rows].gather(1, columns_RP) * filled_RP
        solved_RP = torch.cholesky_solve(right_RP[:, :, None], factor_RPP)[:, :, 0]
        lambda_OB[rows] = torch.zeros_like(w_OB[rows]).scatter(1, columns_RP, solved_RP)
    return lambda_OB
