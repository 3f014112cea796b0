"""ALPS: ADMM with a growing penalty for the mask, conjugate gradients for the weights."""

from __future__ import annotations

import torch
from torch import Tensor

from leap.layerwise.base import LayerResult, Precision, compute_dtype, layer_method
from leap.layerwise.linalg import damp
from leap.layerwise.reconstruct import conjugate_gradient
from leap.layerwise.selection import Target, select_mask
from leap.layerwise.statistics import InputStatistics

_CHECK_EVERY = 3
# How the penalty grows where the mask changed since the last check in more than this share of the kept weights.
_FAST, _MEDIUM = (0.1, 1.3), (0.005, 1.2)
_SLOW_GROWTH = 1.1
_RESTART_DIVISOR = 5.0
_LARGEST_RHO = 1e6
# From this iteration on, a mask that changes by no more than this share has settled.
_SETTLED_FROM, _SETTLED = 31, 3e-4


@layer_method(needs="gram", changes_weights=True, steps=100)
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

    With A the damped Gram matrix, scaled to a unit diagonal, and D first the largest of W: B = (A + ρI)⁻¹(AW − V + ρD),
    D = the largest of B + V/ρ, V += ρ(B − D). Every 3 iterations the change of the mask is looked at, and ρ grows by
    1.3, 1.2 or 1.1, the less the more settled the mask is. While it has never changed much, ρ is too large: it falls to
    a fifth, and the iterations start again where the mask changed at all. They end when the mask does not change, or
    hardly after the 31st. Conjugate gradients then refine the weights of the largest of B. The score is |B|; dead
    columns score zero. Where the paper is silent, this follows the authors' code.

    One eigendecomposition serves every ρ; it makes ALPS the slowest method here for layers of many columns.

    Args:
        iterations: at most.
        rho: first penalty.
        damping: of the Gram matrix before it is scaled, in units of its mean diagonal.
        cg_iterations, cg_tolerance: see ``reconstruct``.
        precision: dtype of the arithmetic.

    Raises:
        ValueError: a bad option.
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    dtype = compute_dtype(precision)
    dead = stats.norm == 0
    damped = damp(stats.gram.to(dtype), damping)
    norm = damped.diagonal().sqrt()
    damped = damped / norm / norm[:, None]
    eigenvalues, vectors = torch.linalg.eigh(damped)
    # Rounding can leave a tiny negative one.
    eigenvalues = eigenvalues.clamp_min(0)
    w = weight.to(dtype) * norm
    pull = w @ damped
    last_checked = select_mask(w.abs().masked_fill(dead, 0), target)
    first_d = d = w * last_checked
    v = torch.zeros_like(w)
    has_moved = False
    for step in range(1, iterations + 1):
        b = ((pull - v + rho * d) @ vectors) / (eigenvalues + rho) @ vectors.T
        candidate = b + v / rho
        mask = select_mask(candidate.abs().masked_fill(dead, 0), target)
        d = candidate * mask
        v = v + rho * (b - d)
        if step % _CHECK_EVERY:
            continue
        changed = ((mask ^ last_checked).sum() / mask.sum().clamp_min(1)).item()
        last_checked = mask
        growth = next((growth for share, growth in (_FAST, _MEDIUM) if changed > share), None)
        if growth is not None:
            has_moved = True
            rho *= growth
        elif has_moved:
            if changed == 0:
                break
            rho *= _SLOW_GROWTH
        else:
            rho /= _RESTART_DIVISOR
            if changed > 0:
                d, v = first_d, torch.zeros_like(w)
        rho = min(rho, _LARGEST_RHO)
        if step >= _SETTLED_FROM and changed < _SETTLED:
            break
    score = b.abs().masked_fill(dead, 0)
    mask = select_mask(score, target)
    refined = conjugate_gradient(w, mask, damped, b, iterations=cg_iterations, tolerance=cg_tolerance)
    return LayerResult(mask, (refined / norm).to(weight.dtype), score.float())
