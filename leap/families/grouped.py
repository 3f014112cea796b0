"""LEAP's gates under an N:M pattern: one logit a weight, the budget of each group met by every soft mask.

With z = (κ·P + g) / τ, g = 0 or logistic noise, a group of m consecutive inputs has

    M_i = σ(z_i − c),   c such that Σ_i M_i = n,

the entropic projection of z on the masks of n open gates. c moves with the logits, so that the gradient is

    dL/dz_i = s_i (h_i − Σ_j s_j h_j / Σ_j s_j),   s = M(1 − M), h = dL/dM.

As τ falls, M becomes the mask of the n largest logits, which hardening keeps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from leap_kernels.philox import logistic_noise
from torch import Tensor

from leap.families.bernoulli import BernoulliGate
from leap.families.one_logit import OneLogit
from leap.gates import Draw, Hardener, Layout, Logits, Matrix
from leap.harden import PatternHardener
from leap.layerwise.selection import Target

#: Steps of the search for c: six leave a sum within 2e-6 of n, whatever the temperature (a test holds it).
_STEPS = 8
#: Weights that are worked on at a time; temporaries are some fifteen times that.
_CHUNK = 1 << 18


class GroupedGate(BernoulliGate):
    """N of every M consecutive inputs, softly."""

    def __init__(self, settings: OneLogit, pattern: tuple[int, int]) -> None:
        super().__init__(settings)
        self._pattern = pattern

    def logit_shapes(self, matrix: Matrix) -> dict[str, torch.Size]:
        """The shape of the weight.

        Raises:
            ValueError: the groups do not divide the inputs.
        """
        try:
            Target.n_m(*self._pattern).check_columns(matrix.shape[1])
        except ValueError as error:
            raise ValueError(f"{matrix.name}: {error}") from error
        return super().logit_shapes(matrix)

    def _mask(self, logits: Tensor, rows: slice, matrix: Matrix, draw: Draw) -> Tensor:
        """Soft mask of some rows, fp32 [groups, m]."""
        z = logits[rows].detach().float() * draw.scale
        if draw.noise:
            first = rows.start * z.shape[1]
            noise = logistic_noise(
                z.numel(), seed=draw.seed, layer=matrix.number, step=draw.index, offset=first, device=z.device
            )
            z = z + noise.view_as(z)
        return project((z / draw.temperature).view(-1, self._pattern[1]), self._pattern[0])

    def apply(self, weight: Tensor, logits: Sequence[Tensor], matrix: Matrix, draw: Draw, out: Tensor) -> Tensor:
        """See :meth:`leap.gates.Gate.apply`."""
        sums = torch.zeros(2, dtype=torch.float64, device=weight.device)
        for rows in _row_chunks(weight.shape):
            mask = self._mask(logits[0], rows, matrix, draw).view_as(weight[rows])
            masked = mask * weight[rows].detach().float()
            out[rows] = masked
            sums += torch.stack([mask.sum(dtype=torch.float64), masked.square().sum(dtype=torch.float64)])
        return torch.cat([sums, sums[:1]])

    def backward(
        self,
        grad_masked: Tensor,
        weight: Tensor,
        logits: Sequence[Tensor],
        stats_grad: Tensor,
        matrix: Matrix,
        draw: Draw,
    ) -> tuple[Tensor, ...]:
        """See :meth:`leap.gates.Gate.backward`; the sums of M are constant, so they have no gradient."""
        grad = torch.empty_like(logits[0])
        for rows in _row_chunks(weight.shape):
            mask, w = self._mask(logits[0], rows, matrix, draw), weight[rows].detach().float()
            h = (grad_masked[rows].float() + 2 * stats_grad[1].float() * mask.view_as(w) * w) * w
            h, slope = h.view_as(mask), mask * (1 - mask)
            mean = (slope * h).sum(1, keepdim=True) / slope.sum(1, keepdim=True).clamp_min(1e-30)
            grad[rows] = (slope * (h - mean) * (draw.scale / draw.temperature)).view_as(w)
        return (grad,)

    def mean(self, weight: Tensor, logits: Sequence[Tensor], matrix: Matrix, draw: Draw) -> Tensor:
        """``weight`` under the soft mask without noise."""
        out = torch.empty_like(weight)
        self.apply(weight, logits, matrix, replace(draw, noise=False), out)
        return out

    def hardener(
        self,
        layout: Layout,  # noqa: ARG002 - a group is decided by its own logits
        logits: Logits,  # noqa: ARG002
        sparsity: float,
        reduce: Callable[[Tensor], Tensor],  # noqa: ARG002
        exact: bool,  # noqa: ARG002
    ) -> Hardener:
        """See :meth:`leap.gates.Gate.hardener`."""
        return PatternHardener(sparsity, self._pattern)


def project(z: Tensor, keep: int) -> Tensor:
    """σ(z − c) [groups, m] with a c for each group such that the sum is ``keep``."""
    ordered = z.sort(dim=1, descending=True).values
    # Relative to the middle of the two that the mask is to part: near them, the differences are exact.
    middle = (ordered[:, keep - 1 : keep] + ordered[:, keep : keep + 1]) / 2
    z = z - middle
    # Between these two the sum crosses ``keep``: all of a group at its largest value, or all at its smallest.
    shift = math.log(keep / (z.shape[1] - keep))
    low, high = ordered[:, -1:] - middle - shift, ordered[:, :1] - middle - shift
    c = torch.zeros_like(low)
    for _ in range(_STEPS):
        mask = torch.sigmoid(z - c)
        surplus = mask.sum(1, keepdim=True) - keep
        low, high = torch.where(surplus > 0, c, low), torch.where(surplus > 0, high, c)
        newton = c + surplus / (mask * (1 - mask)).sum(1, keepdim=True).clamp_min(1e-30)
        c = torch.where((newton >= low) & (newton <= high), newton, (low + high) / 2)
    return torch.sigmoid(z - c)


def _row_chunks(shape: torch.Size) -> list[slice]:
    """Slices of whole rows [out, in] of about ``_CHUNK`` weights."""
    step = max(1, _CHUNK // shape[1])
    return [slice(first, min(first + step, shape[0])) for first in range(0, shape[0], step)]
