"""LEAP's mask: an independent Bernoulli gate per weight, relaxed with logistic noise (arXiv 2605.17289).

M = σ((κ·P + g) / τ) with P the logit and g ~ Logistic(0, 1); the gate is open with probability σ(κ·P).
"""

from __future__ import annotations

import torch
from torch import Tensor

from leap.gates import Draw
from leap.settings import LearnSettings
from leap_kernels.mask_ops import mask_backward, mask_forward


class BernoulliGate:
    """One logit per weight."""

    def __init__(self, settings: LearnSettings) -> None:
        self.strength = settings.prior_strength
        self.std = settings.init_std
        self.grading = settings.prior_grading

    def initial(self, keep: Tensor, score: Tensor, generator: torch.Generator) -> Tensor:
        """N(0, std²) ± strength·std, by the prior's mask; graded by the rank of the score if so set.

        Graded, the distance from zero grows linearly with the rank of the score, among the kept and among the pruned
        weights of the matrix, from none at the prior's threshold to twice ``strength·std``: the mean stays the same.
        """
        logits = torch.randn(keep.shape, generator=generator) * self.std
        sign = keep.float() * 2 - 1
        if self.grading == "sign":
            return logits + self.strength * self.std * sign
        distance = torch.empty(keep.numel())
        flat_keep, flat_score = keep.reshape(-1), score.reshape(-1).float()
        for part, order_sign in ((flat_keep, 1.0), (~flat_keep, -1.0)):
            order = torch.argsort(flat_score[part] * order_sign, stable=True)
            ranks = torch.empty(len(order))
            ranks[order] = (torch.arange(len(order)) + 0.5) / max(1, len(order))
            distance[part] = ranks
        return logits + 2 * self.strength * self.std * distance.view(keep.shape) * sign

    def apply(self, weight: Tensor, logits: Tensor, layer: int, draw: Draw, out: Tensor) -> Tensor:
        _, stats = mask_forward(
            weight,
            logits,
            scale=draw.scale,
            temperature=draw.temperature,
            seed=draw.seed,
            layer=layer,
            step=draw.index,
            noise=draw.noise,
            out=out,
        )
        return stats

    def backward(
        self, grad_masked: Tensor, weight: Tensor, logits: Tensor, stats_grad: Tensor, layer: int, draw: Draw
    ) -> Tensor:
        return mask_backward(
            grad_masked,
            weight,
            logits,
            stats_grad,
            scale=draw.scale,
            temperature=draw.temperature,
            seed=draw.seed,
            layer=layer,
            step=draw.index,
            noise=draw.noise,
        )

    def mean(self, logits: Tensor, draw: Draw) -> Tensor:
        sharpness = draw.scale if draw.noise else draw.scale / draw.temperature
        return torch.sigmoid(logits.float() * sharpness)
