"""LEAP's mask: an independent Bernoulli gate per weight, relaxed with logistic noise (arXiv 2605.17289).

M = σ((κ·P + g) / τ) with P the logit and g ~ Logistic(0, 1); the gate is open with probability σ(κ·P). Formulas of the
forward and backward pass: :mod:`leap_kernels.mask_reference`. Where one set of logits serves several densities, P is
the logit above the offset of one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from leap_kernels.mask_ops import mask_backward, mask_forward
from torch import Tensor

from leap.families.leap import Leap
from leap.gates import Draw, Hardener, Layout, Logits, Matrix, PriorMask
from leap.harden import ranked


class BernoulliGate:
    """One logit per weight."""

    def __init__(self, settings: Leap) -> None:
        self.settings = settings

    def logit_shapes(self, matrix: Matrix) -> dict[str, torch.Size]:
        """The shape of the weight."""
        return {matrix.name: matrix.shape}

    def initial(self, name: str, priors: Sequence[PriorMask], generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """N(0, std²) ± strength·std, by the prior's mask; graded by the rank of the score if so set.

        Graded, the distance from zero grows linearly with the rank of the score, among the kept and among the pruned
        weights of the matrix, from none at the prior's threshold to twice ``strength·std``: the mean stays the same.

        Args:
            name: of the matrix.
            priors: of the matrix; ``sign`` does not read the score.
            generator: of the Gaussian, on any device. Each kind of device has Gaussians of its own; on that of ``keep``
                a large model is drawn in a second where a CPU takes a minute.

        Returns:
            fp32 [out, in] on the device of the prior's mask.
        """
        ((_, keep, score),) = priors
        distance = self.settings.strength * self.settings.init_std
        noise = torch.randn(keep.shape, dtype=torch.float32, generator=generator, device=generator.device)
        noise = noise.to(keep.device) * self.settings.init_std
        sign = keep.float() * 2 - 1
        graded = self._ranks(keep, score) * 2 if self.settings.grading == "rank" else 1.0
        return noise + distance * graded * sign

    @staticmethod
    def _ranks(keep: Tensor, score: Tensor) -> Tensor:
        """Ranks in (0, 1) [out, in], rising away from the threshold among the kept and among the pruned; mean ½."""
        ranks = torch.empty(keep.numel(), dtype=torch.float32, device=keep.device)
        flat_keep, flat_score = keep.reshape(-1), score.reshape(-1).float()
        for part, outwards in ((flat_keep, 1.0), (~flat_keep, -1.0)):
            order = torch.argsort(flat_score[part] * outwards, stable=True)
            rank = torch.empty(len(order), dtype=torch.float32, device=keep.device)
            rank[order] = (torch.arange(len(order), device=keep.device).float() + 0.5) / max(1, len(order))
            ranks[part] = rank
        return ranks.view(keep.shape)

    def draw(self, progress: float, seed: int, index: int) -> Draw:
        """See :meth:`leap.gates.Gate.draw`."""
        s = self.settings
        return Draw(s.scale.at(progress), s.temperature.at(progress), s.noise, seed, index)

    def apply(self, weight: Tensor, logits: Sequence[Tensor], matrix: Matrix, draw: Draw, out: Tensor) -> Tensor:
        """See :meth:`leap.gates.Gate.apply`."""
        _, stats = mask_forward(
            weight,
            _above_offset(logits[0], draw),
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
        shifted = _above_offset(logits[0], draw)
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

    def mean(self, weight: Tensor, logits: Sequence[Tensor], matrix: Matrix, draw: Draw) -> Tensor:
        """W under σ(κ·P), the probability that M > ½; without noise under M itself, σ(κ·P / τ)."""
        out = torch.empty_like(weight)
        still = replace(draw, noise=False, temperature=1.0 if draw.noise else draw.temperature)
        self.apply(weight, logits, matrix, still, out)
        return out

    def norm(self, squares: Tensor, total: float) -> Tensor:
        """Σ over layers of ‖M⊙W‖_F relative to ``total``."""
        # The clamp keeps the slope of the root finite for a layer whose weights are all zero.
        return squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt().sum() / total

    def hardener(
        self,
        layout: Layout,  # noqa: ARG002 - the logits say it all
        logits: Logits,
        sparsity: float,
        reduce: Callable[[Tensor], Tensor],
        exact: bool,
    ) -> Hardener:
        """See :meth:`leap.gates.Gate.hardener`."""
        return ranked(lambda: (tensor for _, tensor in logits()), sparsity, self.settings.scope, reduce, exact)


def _above_offset(logits: Tensor, draw: Draw) -> Tensor:
    # In fp32: a bfloat16 difference would round away what separates neighbours of the offset.
    return logits if draw.offset == 0 else logits.detach().float() - draw.offset
