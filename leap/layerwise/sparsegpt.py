"""SparseGPT: column by column, every pruned weight is made up for by the columns to its right."""

from __future__ import annotations

import torch
from torch import Tensor

from leap.layerwise.base import LayerResult, Precision, compute_dtype, layer_method
from leap.layerwise.linalg import block_bounds, inverse_factor
from leap.layerwise.selection import Target, keep_largest, prune_count, prune_rows, row_counts, select_mask
from leap.layerwise.statistics import InputStatistics

# Shapes: O output rows, I input columns, B columns of a block, G columns of an N:M group.


@layer_method(needs="gram", changes_weights=True, steps=10)
def sparsegpt(
    weight: Tensor,
    stats: InputStatistics,
    target: Target,
    *,
    block_size: int = 128,
    damping: float = 0.01,
    precision: Precision = "float32",
) -> LayerResult:
    """Optimal brain surgeon restricted to the columns on the right (Frantar & Alistarh, arXiv 2301.00774; method.md,
    section 4).

    With H = 2XᵀX/tokens, damped, and UᵀU = H⁻¹, the score is the saliency W²/U_jj² at the moment the mask of the block
    (of the group, for N:M) was chosen; dead columns score zero. Each block prunes its share of the target, so that
    after every block the count over the columns so far is exact, in each row for scope "row". The paper compares over
    all rows of a block, which is scope "layer" here.

    Args:
        block_size: columns whose mask is chosen together; rounded down to whole N:M groups.
        damping: of H, in units of its mean diagonal.
        precision: dtype of the arithmetic.

    Raises:
        ValueError: a bad option.
        torch.linalg.LinAlgError: see ``damped_cholesky``.
    """
    dtype = compute_dtype(precision)
    w_OI = weight.to(dtype, copy=True)
    u_II = inverse_factor(stats.gram.to(dtype) * (2 / stats.tokens), damping)
    # The score of a column is its squared weights times this.
    importance_I = u_II.diagonal().square().reciprocal().masked_fill(stats.norm == 0, 0)
    score_OI = torch.empty_like(w_OI)
    mask_OI = torch.empty_like(w_OI, dtype=torch.bool)
    group = 1 if target.pattern is None else target.pattern[1]

    for start, stop in block_bounds(weight.shape[1], block_size, group):
        w_OB, u_BB = w_OI[:, start:stop], u_II[start:stop, start:stop]
        score_OB, mask_OB = score_OI[:, start:stop], mask_OI[:, start:stop]
        if target.pattern is None:
            score_OB.copy_(w_OB.square() * importance_I[start:stop])
            mask_OB.copy_(_block_mask(score_OB, target, start, weight.shape[1]))
        errors_OB = torch.empty_like(w_OB)
        # Column by column because which of the earlier columns were pruned, and so what they add to this one, differs
        # from row to row.
        for j in range(stop - start):
            if target.pattern is not None and j % group == 0:
                score_OG = w_OB[:, j : j + group].square() * importance_I[start + j : start + j + group]
                score_OB[:, j : j + group] = score_OG
                mask_OB[:, j : j + group] = select_mask(score_OG, target)
            errors_OB[:, j] = w_OB[:, j].masked_fill(mask_OB[:, j], 0) / u_BB[j, j]
            w_OB[:, j:] -= torch.outer(errors_OB[:, j], u_BB[j, j:])
        w_OI[:, stop:] -= errors_OB @ u_II[start:stop, stop:]

    return LayerResult(mask_OI, (w_OI * mask_OI).to(weight.dtype), score_OI.float())


def _block_mask(score_OB: Tensor, target: Target, start: int, columns: int) -> Tensor:
    """The mask of columns ``start`` … of a layer with ``columns`` in all."""
    rows, width = score_OB.shape
    stop = start + width
    if target.scope == "layer":
        pruned = prune_count(target.sparsity, rows * stop) - prune_count(target.sparsity, rows * start)
        return keep_largest(score_OB.reshape(1, -1), score_OB.numel() - pruned).reshape(score_OB.shape)
    of_rows = row_counts(target.sparsity, rows, columns)
    return prune_rows(score_OB, [_so_far(count, stop, columns) - _so_far(count, start, columns) for count in of_rows])


def _so_far(count: int, column: int, columns: int) -> int:
    """How many of the ``count`` weights that a row loses stand before ``column``."""
    return prune_count(count / columns, column)
