"""What to prune and how many: targets, counts, and masks of exactly that count from a score."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from leap.methods import LayerScope


@dataclass(frozen=True)
class Target:
    """The sparsity asked of one layer.

    Attributes:
        sparsity: fraction of zeros, in [0, 1).
        scope: "layer" counts over the whole matrix; "row" prunes as many in every output row, or one more, see
            ``row_counts``. The number over the layer is the same.
        pattern: (n, m) keeps exactly n of every m consecutive columns in each row; ``scope`` then has no effect.

    Raises:
        ValueError: a value out of range, or a sparsity that is not the pattern's 1 − n/m.
    """

    sparsity: float
    scope: LayerScope = "row"
    pattern: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity must be in [0, 1), got {self.sparsity}")
        if self.scope not in get_args(LayerScope):
            raise ValueError(f"scope must be one of {', '.join(get_args(LayerScope))}, got {self.scope!r}")
        if self.pattern is not None:
            keep, group = self.pattern
            if not 1 <= keep <= group:
                raise ValueError(f"pattern (n, m) needs 1 <= n <= m, got {self.pattern}")
            if abs(self.sparsity - (1 - keep / group)) > 1e-6:
                raise ValueError(f"pattern {keep}:{group} has sparsity {1 - keep / group:g}, got {self.sparsity}")

    @classmethod
    def n_m(cls, keep: int, group: int) -> Target:
        """The N:M target that keeps ``keep`` of every ``group`` consecutive columns, with the sparsity it implies."""
        if group < 1:
            raise ValueError(f"pattern (n, m) needs 1 <= n <= m, got {(keep, group)}")
        return cls(sparsity=1 - keep / group, pattern=(keep, group))

    def check_columns(self, in_features: int) -> None:
        """Raises ValueError when rows of ``in_features`` columns do not split into whole N:M groups."""
        if self.pattern is not None and in_features % self.pattern[1]:
            raise ValueError(f"{in_features} columns do not split into groups of {self.pattern[1]}")


def prune_count(sparsity: float, size: int) -> int:
    """How many of ``size`` weights a sparsity prunes: the nearest integer, halves to the even one."""
    return round(sparsity * size)


def row_counts(sparsity: float, rows: int, columns: int) -> list[int]:
    """How many of ``columns`` weights each of ``rows`` rows loses, so that the layer loses ``prune_count`` of its own.

    Counts differ by one at most; the larger ones are spread evenly over the rows.
    """
    before = [prune_count(sparsity, row * columns) for row in range(rows + 1)]
    return [after - at for at, after in itertools.pairwise(before)]


def keep_largest(score: Tensor, keep: int | Tensor) -> Tensor:
    """Mask of the ``keep`` largest scores along the last dimension; among equal scores the lowest index stays.

    Args:
        score: [..., size], no NaN.
        keep: one count for all slices, or a count for each [..., 1].

    Returns:
        bool, the shape of ``score``, with exactly ``keep`` True in each slice.

    Raises:
        ValueError: ``score`` holds NaN, for which no order exists.
    """
    if score.isnan().any():
        raise ValueError("cannot rank scores that hold NaN")
    if isinstance(keep, Tensor):
        index = (keep - 1).clamp_min(0)
        threshold = score.sort(dim=-1, descending=True).values.gather(-1, index)
    elif keep == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    else:
        threshold = score.kthvalue(score.shape[-1] - keep + 1, dim=-1, keepdim=True).values
    above = score > threshold
    tied = score == threshold
    room = keep - above.sum(-1, keepdim=True)
    return above | (tied & (tied.cumsum(-1, dtype=torch.int32) <= room))


def select_mask(score: Tensor, target: Target) -> Tensor:
    """The mask that keeps the highest scores and meets ``target`` exactly.

    Unstructured targets prune ``prune_count(sparsity, size)`` weights of the layer, by row as ``row_counts`` says.
    Equal scores are settled by position: the lowest flat index is kept first.

    Args:
        score: [out, in], higher = keep.

    Returns:
        bool [out, in], True = keep.

    Raises:
        ValueError: NaN in the score, or columns that do not split into the N:M groups.
    """
    out_features, in_features = score.shape
    if target.pattern is not None:
        target.check_columns(in_features)
        keep, group = target.pattern
        return keep_largest(score.reshape(out_features, -1, group), keep).reshape(score.shape)
    if target.scope == "layer":
        flat = score.reshape(1, -1)
        return keep_largest(flat, score.numel() - prune_count(target.sparsity, score.numel())).reshape(score.shape)
    return prune_rows(score, row_counts(target.sparsity, out_features, in_features))


def prune_rows(score: Tensor, counts: Sequence[int]) -> Tensor:
    """Mask [rows, columns] that prunes the ``counts`` smallest scores of each row.

    Raises:
        ValueError: NaN in the score.
    """
    columns = score.shape[1]
    if len(set(counts)) == 1:
        return keep_largest(score, columns - counts[0])
    mask = torch.empty_like(score, dtype=torch.bool)
    pruned = torch.tensor(counts, device=score.device)
    for count in sorted(set(counts)):
        rows = (pruned == count).nonzero().squeeze(1)
        mask[rows] = keep_largest(score[rows], columns - count)
    return mask
