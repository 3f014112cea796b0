"""Wanda: weights times the norms of their inputs."""

from __future__ import annotations

from torch import Tensor

from leap.layerwise.base import LayerResult, layer_method
from leap.layerwise.selection import Target, select_mask
from leap.layerwise.statistics import InputStatistics


@layer_method(needs="norm", changes_weights=False)
def wanda(weight: Tensor, stats: InputStatistics, target: Target) -> LayerResult:
    """Score |W_ij|·‖X_j‖₂ (Sun et al., arXiv 2306.11695; method.md, section 4). Weights are left alone.

    The paper prunes by row. Columns whose input is always zero score zero, so they go first.
    """
    score = weight.float().abs() * stats.norm.float()
    return LayerResult(select_mask(score, target), weight, score)
