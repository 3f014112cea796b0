"""LEAP's mask: an independent Bernoulli gate per weight, relaxed with logistic noise (arXiv 2605.17289).

M = σ((κ·P + g) / τ) with P the logit and g ~ Logistic(0, 1); the gate is open with probability σ(κ·P). Formulas of the
forward and backward pass: :mod:`leap_kernels.mask_reference`. Where one set of logits serves several densities, P is
the logit above the offset of one of them.
"""

from __future__ import annotations

from collections.abc import Sequence

from leap_kernels.mask_ops import mask_backward, mask_forward
from torch import Tensor

from leap.families.one_logit_gate import OneLogitGate, above_offset
from leap.gates import Draw, Matrix


class BernoulliGate(OneLogitGate):
    """Independent of the other weights' gates."""

    def apply(self, weight: Tensor, logits: Sequence[Tensor], matrix: Matrix, draw: Draw, out: Tensor) -> Tensor:
        """See :meth:`leap.gates.Gate.apply`."""
        _, stats = mask_forward(
            weight,
            above_offset(logits[0], draw),
            scale=draw.scale,
            temperature=draw.temperature,
            seed=draw.seed,
            layer=matrix.number,
            step=draw.index,
            noise=draw.noise,
            out=out,
        )
        return stats

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
        shifted = above_offset(logits[0], draw)
        grad = mask_backward(
            grad_masked,
            weight,
            shifted,
            stats_grad,
            scale=draw.scale,
            temperature=draw.temperature,
            seed=draw.seed,
            layer=matrix.number,
            step=draw.index,
            noise=draw.noise,
            out=grad_masked if grad_masked.dtype == shifted.dtype else None,
        )
        return (grad.to(logits[0].dtype),)
