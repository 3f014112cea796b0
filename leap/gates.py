"""The state that all masked layers of a model share, and the interface of a mask parameterisation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from leap.harden import Hardener

Mode = Literal["dense", "sampled", "mean", "hard"]


@dataclass(frozen=True)
class Draw:
    """What one sampled forward pass and its backward pass have to agree on."""

    scale: float
    """κ, multiplies the logits."""
    temperature: float
    """τ, divides the noisy logits."""
    noise: bool
    """Whether logistic noise is added to the scaled logits."""
    seed: int
    """Key of the noise."""
    index: int
    """Number of the micro-batch over the whole run and all workers; the step in the counter of the noise."""
    offset: float = 0.0
    """Taken from the logits before they are scaled: where the gate is open with probability ½."""


@dataclass
class GateState:
    """Mode of the masked layers of one model, and what they leave behind in a sampled forward pass.

    ``dense`` ignores the masks, ``sampled`` draws soft masks and can be differentiated, ``mean`` takes the probability
    that a gate is open, ``hard`` keeps what ``harden`` keeps. The modes ``sampled`` and ``mean`` read ``draw``.
    """

    mode: Mode = "dense"
    draw: Draw | None = None
    harden: Hardener | None = None
    layers: int = 0
    """How many masked layers share this state."""
    stats: list[Tensor] = field(default_factory=list)
    """Per layer float64 [Σ M, Σ (M·W)², Σ P(open)] of the last sampled forward pass, part of the graph."""
    collecting: bool = False
    """Whether a sampled forward pass adds to ``stats``."""


class Gate(Protocol):
    """A way to make a mask out of one logit tensor per weight matrix [out, in]."""

    def initial(self, keep: Tensor, score: Tensor, generator: torch.Generator) -> Tensor:
        """First fp32 logits [out, in] from a prior's mask (bool) and score (float, higher is kept longer)."""

    def apply(self, weight: Tensor, logits: Tensor, layer: int, draw: Draw, out: Tensor) -> Tensor:
        """Write M⊙W into ``out``; returns float64 [Σ M, Σ (M·W)², Σ P(open)]."""

    def backward(
        self, grad_masked: Tensor, weight: Tensor, logits: Tensor, stats_grad: Tensor, layer: int, draw: Draw
    ) -> Tensor:
        """Gradient with respect to the logits, from those with respect to M⊙W and to the three sums.

        It may lie where ``grad_masked`` was.
        """

    def mean(self, weight: Tensor, logits: Tensor, draw: Draw) -> Tensor:
        """``weight`` [out, in] times the probability that each gate is open."""
