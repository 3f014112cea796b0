"""MaskLLM's masks: of every m consecutive inputs, one of the C = m! / (n! (m − n)!) ways to keep n (arXiv 2409.17481).

With S [C, m] the ways, p [out, in / m, C] the logits and g ~ Gumbel(0, 1), or 0 without noise,

    y = softmax((κ·p + g) / τ),   M = y S,
    dL/dp = κ/τ · y (h − Σ_c y_c h_c),   h = S (dL/dM).

Every M has n open gates a group, softly. A way is drawn with probability softmax(κ·p).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from leap_kernels.philox import gumbel_noise
from torch import Tensor

from leap.families.maskllm import MaskLLM
from leap.gates import Draw, Hardener, Layout, Logits, Matrix, PriorMask
from leap.layerwise.selection import Target

#: Logits that are worked on at a time; temporaries are some ten times that.
_CHUNK = 1 << 18


class CandidateGate:
    """One choice a group."""

    def __init__(self, settings: MaskLLM) -> None:
        self.settings = settings
        self._keep, self._group = settings.pattern
        self.candidates = candidates(*settings.pattern)

    def logit_shapes(self, matrix: Matrix) -> dict[str, torch.Size]:
        """[out, in / m, C].

        Raises:
            ValueError: the groups do not divide the inputs.
        """
        try:
            Target.n_m(*self.settings.pattern).check_columns(matrix.shape[1])
        except ValueError as error:
            raise ValueError(f"{matrix.name}: {error}") from error
        rows, columns = matrix.shape
        return {matrix.name: torch.Size([rows, columns // self._group, len(self.candidates)])}

    def initial(self, name: str, priors: Sequence[PriorMask], generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """N(0, std²) + (overlap − n²/m)·std(p)·strength, overlap = kept weights that a way shares with the prior.

        n²/m is the overlap of a way drawn blindly, 1 for 2:4.
        """
        ((matrix, keep, _),) = priors
        (shape,) = self.logit_shapes(matrix).values()
        p = torch.randn(shape, dtype=torch.float32, generator=generator, device=generator.device).to(keep.device)
        p *= self.settings.init_std
        overlap = keep.float().view(*shape[:2], self._group) @ self.candidates.to(keep.device).t()
        return p + (overlap - self._keep**2 / self._group) * (p.std() * self.settings.strength)

    def draw(self, progress: float, seed: int, index: int) -> Draw:
        """See :meth:`leap.gates.Gate.draw`."""
        s = self.settings
        return Draw(s.scale.at(progress), s.temperature.at(progress), s.noise, seed, index)

    def _choice(self, p: Tensor, first: int, matrix: Matrix, draw: Draw) -> Tensor:
        """y, fp32 [rows, groups, C], of logits of some rows; ``first`` is the flat index of the first of them."""
        z = p.detach().float() * draw.scale
        if draw.noise:
            noise = gumbel_noise(
                z.numel(), seed=draw.seed, layer=matrix.number, step=draw.index, offset=first, device=z.device
            )
            z = z + noise.view_as(z)
        return torch.softmax(z / draw.temperature, -1)

    def _chunks(self, weight: Tensor, p: Tensor, matrix: Matrix, draw: Draw) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Row by row: rows, y, and the fp32 weights [rows, groups, m]."""
        a_row = p[0].numel()
        step = max(1, _CHUNK // a_row)
        for first in range(0, len(p), step):
            rows = slice(first, first + step)
            w = weight[rows].detach().float().view(-1, p.shape[1], self._group)
            yield rows, self._choice(p[rows], first * a_row, matrix, draw), w

    def apply(self, weight: Tensor, logits: Sequence[Tensor], matrix: Matrix, draw: Draw, out: Tensor) -> Tensor:
        """See :meth:`leap.gates.Gate.apply`."""
        ways = self.candidates.to(weight.device)
        sums = torch.zeros(2, dtype=torch.float64, device=weight.device)
        for rows, y, w in self._chunks(weight, logits[0], matrix, draw):
            mask = y @ ways
            masked = mask * w
            out[rows] = masked.view(-1, weight.shape[1])
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
        ways, grad = self.candidates.to(weight.device), torch.empty_like(logits[0])
        for rows, y, w in self._chunks(weight, logits[0], matrix, draw):
            of_mask = (grad_masked[rows].float().view_as(w) + 2 * stats_grad[1].float() * (y @ ways) * w) * w
            h = of_mask @ ways.t()
            grad[rows] = y * (h - (y * h).sum(-1, keepdim=True)) * (draw.scale / draw.temperature)
        return (grad,)

    def mean(self, weight: Tensor, logits: Sequence[Tensor], matrix: Matrix, draw: Draw) -> Tensor:
        """``weight`` under softmax(κ·p) S, the probability that each weight is kept; without noise, under M itself."""
        out = torch.empty_like(weight)
        self.apply(weight, logits, matrix, draw.still(), out)
        return out

    def norm(self, squares: Tensor, total: float) -> Tensor:  # noqa: ARG002
        """Σ over layers of ‖M⊙W‖_F², not relative to anything."""
        return squares.sum()

    def hardener(
        self,
        layout: Layout,  # noqa: ARG002 - a group is decided by its own logits
        logits: Logits,  # noqa: ARG002
        sparsity: float,
        reduce: Callable[[Tensor], Tensor],  # noqa: ARG002
        exact: bool,  # noqa: ARG002
    ) -> Hardener:
        """See :meth:`leap.gates.Gate.hardener`."""
        Target(sparsity, pattern=self.settings.pattern)  # refuses another sparsity
        return CandidateHardener(self.candidates)


@dataclass(frozen=True)
class CandidateHardener:
    """Keeps the way of the largest logit; of equal ones the first."""

    candidates: Tensor
    offset: float = 0.0
    """See :attr:`leap.gates.Hardener.offset`."""

    def mask(self, matrix: Matrix, logits: Sequence[Tensor]) -> Tensor:
        """See :meth:`leap.gates.Hardener.mask`.

        Raises:
            ValueError: a NaN among the logits.
        """
        (p,) = logits
        if p.isnan().any():
            raise ValueError(f"{matrix.name}: the logits hold NaN")
        best = p.detach().float().argmax(-1)
        return self.candidates.to(p.device).bool()[best].view(matrix.shape)


def candidates(keep: int, group: int) -> Tensor:
    """All ways to keep ``keep`` of ``group``, fp32 [C, group] of 0 and 1, those with the first ones kept first."""
    ways = list(itertools.combinations(range(group), keep))
    result = torch.zeros(len(ways), group)
    for number, way in enumerate(ways):
        result[number, list(way)] = 1
    return result
