"""Magnitude pruning: the smallest weights go."""

from __future__ import annotations

from torch import Tensor

from leap.layerwise.base import LayerResult, layer_method
from leap.layerwise.selection import Target, select_mask
from leap.layerwise.statistics import InputStatistics


@layer_method(needs="none", changes_weights=False)
def magnitude(weight: Tensor, stats: InputStatistics | None, target: Target) -> LayerResult:  # noqa: ARG001
    """Score |W_ij| (method.md, section 4). Weights are left alone; ``stats`` is not read."""
    score = weight.float().abs()
    return LayerResult(select_mask(score, target), weight, score)
