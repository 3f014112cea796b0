"""What to prune and how many: targets, counts, and masks of exactly that count from a score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Scope = Literal["row", "layer"]


@dataclass(frozen=True)
class Target:
    """The sparsity asked of one layer.

    Attributes:
        sparsity: fraction of zeros, in [0, 1).
        scope: "row" prunes the same number in every output row, "layer" counts over the whole matrix.
        pattern: (n, m) keeps exactly n of every m consecutive columns in each row; ``scope`` then has no effect.

    Raises:
        ValueError: a value out of range, or a sparsity that is not the pattern's 1 − n/m.
    """

    sparsity: float
    scope: Scope = "row"
    pattern: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity must be in [0, 1), got {self.sparsity}")
        if self.scope not in get_args(Scope):
            raise ValueError(f"scope must be one of {', '.join(get_args(Scope))}, got {self.scope!r}")
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

    Unstructured targets prune ``prune_count(sparsity, size)`` weights of each row or of the layer. Equal scores are
    settled by position: the lowest flat index is kept first.

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
    slices = score.reshape(1, -1) if target.scope == "layer" else score
    size = slices.shape[-1]
    return keep_largest(slices, size - prune_count(target.sparsity, size)).reshape(score.shape)
