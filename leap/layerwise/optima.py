"""OPTIMA: Wanda's mask, and the best weights for it."""

from __future__ import annotations

from torch import Tensor

from leap.layerwise.base import LayerResult, Precision, layer_method
from leap.layerwise.reconstruct import reconstruct
from leap.layerwise.selection import Target
from leap.layerwise.statistics import InputStatistics
from leap.layerwise.wanda import wanda


@layer_method(needs="gram", changes_weights=True, steps=40)
def optima(
    weight: Tensor,
    stats: InputStatistics,
    target: Target,
    *,
    damping: float = 0.01,
    iterations: int = 100,
    tolerance: float = 1e-4,
    precision: Precision = "float32",
) -> LayerResult:
    """Per row, min rᵀHr subject to r = −w on the pruned weights (arXiv 2512.13886; method.md, section 4).

    OPTIMA leaves the choice of the mask open; here mask and score are Wanda's. The authors solve the quadratic programs
    with a general solver; as their only constraints fix variables, conjugate gradients reach the same optimum.

    Args:
        damping, iterations, tolerance, precision: see ``reconstruct``.

    Raises:
        ValueError: a bad precision.
    """
    chosen = wanda(weight, stats, target)
    new_weight = reconstruct(
        weight,
        chosen.mask,
        stats.gram,
        damping=damping,
        iterations=iterations,
        tolerance=tolerance,
        precision=precision,
    )
    return chosen._replace(weight=new_weight)
