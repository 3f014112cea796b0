"""Hard-concrete gates, one a weight.

With z = κ·P, g ~ Logistic(0, 1) or 0, β the temperature and (γ, ζ) = (−0.1, 1.1):

    v = σ((z + g) / β),   M = clip((ζ − γ)·v + γ, 0, 1),   P(M > 0) = σ(z − β·log(−γ / ζ)).

The expected ℓ0 is the sum of the last over the weights. Where M is clipped, its gradient is 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from leap_kernels.philox import logistic_noise
from torch import Tensor

from leap.families.one_logit_gate import OneLogitGate, above_offset
from leap.gates import Draw, Matrix

LOW, HIGH = -0.1, 1.1
"""γ and ζ."""
#: Weights that are worked on at a time.
_CHUNK = 1 << 18


class HardConcreteGate(OneLogitGate):
    """Independent of the other weights' gates."""

    def _chunks(
        self, weight: Tensor, logits: Tensor, matrix: Matrix, draw: Draw
    ) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Part, fp32 weights, v and P(M > 0) of flat slices."""
        flat, w = above_offset(logits, draw).detach().reshape(-1), weight.detach().reshape(-1)
        for first in range(0, flat.numel(), _CHUNK):
            part = slice(first, first + _CHUNK)
            z = flat[part].float() * draw.scale
            opened = torch.sigmoid(z - draw.temperature * math.log(-LOW / HIGH))
            if draw.noise:
                z = z + logistic_noise(
                    z.numel(), seed=draw.seed, layer=matrix.number, step=draw.index, offset=first, device=z.device
                )
            yield part, w[part].float(), torch.sigmoid(z / draw.temperature), opened

    def apply(self, weight: Tensor, logits: Sequence[Tensor], matrix: Matrix, draw: Draw, out: Tensor) -> Tensor:
        """See :meth:`leap.gates.Gate.apply`."""
        sums, flat = torch.zeros(3, dtype=torch.float64, device=weight.device), out.view(-1)
        for part, w, v, opened in self._chunks(weight, logits[0], matrix, draw):
            mask = _stretch(v).clamp(0, 1)
            masked = mask * w
            flat[part] = masked
            sums += torch.stack([term.sum(dtype=torch.float64) for term in (mask, masked.square(), opened)])
        return sums

    def backward(
        self,
        grad_masked: Tensor,
        weight: Tensor,
        logits: Sequence[Tensor],
        stats_grad: Tensor,
        matrix: Matrix,
        draw: Draw,
    ) -> tuple[Tensor, ...]:
        """See :meth:`leap.gates.Gate.backward`."""
        s0, s1, s2 = stats_grad.float().unbind()
        grad, of_masked = torch.empty_like(logits[0]), grad_masked.reshape(-1)
        for part, w, v, opened in self._chunks(weight, logits[0], matrix, draw):
            stretched = _stretch(v)
            of_mask = (of_masked[part].float() + 2 * s1 * stretched.clamp(0, 1) * w) * w + s0
            slope = (HIGH - LOW) * v * (1 - v) / draw.temperature * ((stretched > 0) & (stretched < 1))
            grad.view(-1)[part] = (of_mask * slope + s2 * opened * (1 - opened)) * draw.scale
        return (grad,)


def _stretch(v: Tensor) -> Tensor:
    return (HIGH - LOW) * v + LOW
