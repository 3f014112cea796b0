"""What the gates of one logit a weight have in common: their start, their schedules and how they harden."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from leap.families.one_logit import OneLogit
from leap.gates import Draw, Hardener, Layout, Logits, Matrix, PriorMask
from leap.harden import ranked


class OneLogitGate(ABC):
    """Of the shape of the weight; a higher logit is kept longer."""

    def __init__(self, settings: OneLogit) -> None:
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

    @abstractmethod
    def apply(self, weight: Tensor, logits: Sequence[Tensor], matrix: Matrix, draw: Draw, out: Tensor) -> Tensor:
        """See :meth:`leap.gates.Gate.apply`."""

    def mean(self, weight: Tensor, logits: Sequence[Tensor], matrix: Matrix, draw: Draw) -> Tensor:
        """W under M without noise: with noise at τ = 1, for LEAP σ(κ·P), the probability that M > ½."""
        out = torch.empty_like(weight)
        self.apply(weight, logits, matrix, draw.still(), out)
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


def above_offset(logits: Tensor, draw: Draw) -> Tensor:
    """The logits [out, in] relative to where the gates of a draw open."""
    # In fp32: a bfloat16 difference would round away what separates neighbours of the offset.
    return logits if draw.offset == 0 else logits.detach().float() - draw.offset
