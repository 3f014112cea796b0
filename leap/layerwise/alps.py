"""ALPS: ADMM with a growing penalty for the mask, conjugate gradients for the weights."""

from __future__ import annotations

import torch
from torch import Tensor

from leap.layerwise.base import LayerResult, Precision, compute_dtype, layer_method
from leap.layerwise.linalg import damp, safe_norm
from leap.layerwise.reconstruct import conjugate_gradient
from leap.layerwise.selection import Target, select_mask
from leap.layerwise.statistics import InputStatistics

_CHECK_EVERY = 3
# How the penalty grows with the share of the kept weights whose membership changed since the last check.
_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))


@layer_method(needs="gram", changes_weights=True)
def alps(
    weight: Tensor,
    stats: InputStatistics,
    target: Target,
    *,
    iterations: int = 300,
    rho: float = 0.1,
    damping: float = 0.01,
    cg_iterations: int = 100,
    cg_tolerance: float = 1e-4,
    precision: Precision = "float32",
) -> LayerResult:
    """ALPS (Meng et al., arXiv 2406.07831; method.md, section 4).

    On columns scaled to unit input norm, with A the damped Gram matrix: B = (A + ρI)⁻¹(AW − V + ρD), D = the largest of
    B + V/ρ, V += ρ(B − D). Every 3 iterations ρ grows by 1.3, 1.2 or 1.1, the less the more settled the mask is, and
    the loop ends when the mask has not changed since the last check. Conjugate gradients then refine the weights of the
    mask found. The score is |B + V/ρ| at the last choice of the mask; dead columns score zero.

    One eigendecomposition serves every ρ; it makes ALPS the slowest method here for layers of many columns.

    Args:
        iterations: at most.
        rho: first penalty.
        damping: of the normalised Gram matrix, in units of its mean diagonal.
        cg_iterations, cg_tolerance: see ``reconstruct``.
        precision: dtype of the arithmetic.

    Raises:
        ValueError: a bad option.
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    dtype = compute_dtype(precision)
    dead = stats.norm == 0
    norm = safe_norm(stats.norm.to(dtype))
    damped = damp(stats.gram.to(dtype) / norm / norm[:, None], damping)
    eigenvalues, vectors = torch.linalg.eigh(damped)
    # Rounding can leave a tiny negative one.
    eigenvalues = eigenvalues.clamp_min(0)
    w = weight.to(dtype) * norm
    pull = w @ damped
    d = w
    v = torch.zeros_like(w)
    last_checked = torch.ones_like(w, dtype=torch.bool)
    for step in range(1, iterations + 1):
        b = ((pull - v + rho * d) @ vectors) / (eigenvalues + rho) @ vectors.T
        candidate = b + v / rho
        score = candidate.abs().masked_fill(dead, 0)
        mask = select_mask(score, target)
        d = candidate * mask
        v = v + rho * (b - d)
        if step % _CHECK_EVERY == 0:
            changed = ((mask ^ last_checked).sum() / mask.sum().clamp_min(1)).item()
            if changed == 0:
                break
            rho *= next(growth for share, growth in _GROWTH if changed >= share)
            last_checked = mask
    refined = conjugate_gradient(w, mask, damped, d, iterations=cg_iterations, tolerance=cg_tolerance)
    return LayerResult(mask, (refined / norm).to(weight.dtype), score.float())
