"""Everything that decides how masks are learned, with the published values of LEAP (arXiv 2605.17289) as defaults."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from leap.schedules import Schedule
from leap.validation import NO_UNKNOWN_KEYS, check_choices

Scope = Literal["global", "layer", "row"]
Optimiser = Literal["adam", "adam8bit", "adam8bit-bf16"]
_KEEP_WEIGHTS = ("magnitude", "wanda")  # priors that choose a mask and nothing else


@dataclass(frozen=True, kw_only=True)
class DensityControl:
    """How training is held to the density that was asked for. Hardening makes it exact in any case.

    Raises:
        ValueError: a value out of its range; the message names the field.
    """

    __pydantic_config__ = NO_UNKNOWN_KEYS

    kind: Literal["penalty", "lagrangian"] = "penalty"
    """``penalty``: weight·|density − target|, LEAP's loss. ``lagrangian``: augmented, with a learned multiplier."""
    weight: float = 7.0
    """λ1 of the penalty, or c in the augmented Lagrangian λ·gap + c/2·gap²; the latter wants 100 and more."""
    relaxation: float = 0.1
    """Lagrangian: share of the run in which λ takes over what c·gap exerts; λ += c·gap / (relaxation·steps) a step."""
    of: Literal["sampled", "expected"] = "sampled"
    """Density that is controlled: mean of the sampled soft mask, or the probability mean σ(scale · logit)."""

    def __post_init__(self) -> None:
        check_choices(self)
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"weight must be finite and not negative, not {self.weight}")
        if not 0 < self.relaxation < math.inf:
            raise ValueError(f"relaxation must be positive and finite, not {self.relaxation}")


@dataclass(frozen=True, kw_only=True)
class LearnSettings:
    """Mask learning. Lengths are in optimiser steps, batches in rows of the calibration set.

    Raises:
        ValueError: a value out of its range; the message names the field.
    """

    __pydantic_config__ = NO_UNKNOWN_KEYS

    steps: int = 2000
    """Optimiser steps."""
    batch_rows: int = 256
    """Rows in a global batch."""
    microbatch_rows: int = 1
    """Rows in one forward and backward pass. Each micro-batch draws its own noise."""
    noise: bool = True
    """Logistic noise on the logits (a Bernoulli gate); without it the gate is σ(scale · logit / temperature)."""
    temperature: Schedule = field(default_factory=lambda: Schedule(start=4.0, end=0.05))
    """Temperature τ of the gate."""
    scale: Schedule = field(default_factory=lambda: Schedule(start=25.0, end=350.0))
    """Scale κ of the logits."""
    prior: Literal["magnitude", "wanda", "sparsegpt", "thanos", "admm", "alps"] = "wanda"
    """Layer-wise method whose mask the logits start from."""
    prior_strength: float = 3.0
    """Distance of the first logits from zero, in units of init_std."""
    prior_grading: Literal["sign", "rank"] = "sign"
    """``sign``: one distance for every weight, LEAP's start. ``rank``: graded by the rank of the prior's score."""
    weights: Literal["dense", "prior"] = "dense"
    """Weights that masks are learned over: the model's own, or ``prior``: its new values where it keeps a weight.

    The second takes the bytes of one more weight matrix; the dense model stays what is distilled from.
    """
    init_std: float = 0.014
    """Standard deviation of the Gaussian that breaks ties among the first logits."""
    optimiser: Optimiser = "adam8bit"
    """Adam, with 6 bytes per logit for it and both moments in 16 bits, 4 with bfloat16 logits too, 12 for ``adam``."""
    learning_rate: float = 1e-3
    """Peak learning rate of the optimiser of the logits."""
    matrix_rate: float = 0.0
    """Peak learning rate of a step that all logits of a matrix make together; it moves sparsity between matrices.

    Where ``scope`` fixes the sparsity of each, no such step is made.
    """
    warmup_steps: int = 5
    """Steps of linear warm-up before the cosine."""
    final_rate: float = 0.0
    """Learning rate at the end of the cosine as a share of the peak."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of Adam's moments."""
    density: DensityControl = field(default_factory=DensityControl)
    """Control of the density during training."""
    weight_reward: float = 10.0
    """λ2: reward, fading linearly over the run, for ‖M⊙W‖_F summed over layers relative to ‖W‖_F."""
    distillation: float = 0.0
    """Share of the loss that is KL(dense ‖ masked) on the output distribution; the rest is cross-entropy."""
    hidden_distillation: float = 0.0
    """Weight of the distance from the dense model's hidden states after each block, squared, by their variance."""
    scope: Scope = "global"
    """Within what the asked sparsity holds exactly after hardening: the model, each layer or each row."""
    seed: int = 0
    """Seed of the first logits and of the noise; in the pipeline also of the order of the rows."""

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("steps", "batch_rows", "microbatch_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.batch_rows % self.microbatch_rows:
            raise ValueError(
                f"batch_rows {self.batch_rows} is not a multiple of microbatch_rows {self.microbatch_rows}"
            )
        if self.steps * self.microbatches > 1 << 32:
            raise ValueError(f"steps {self.steps} of {self.microbatches} micro-batches exceed the noise's 2**32 draws")
        for name in ("prior_strength", "weight_reward", "warmup_steps", "hidden_distillation", "matrix_rate"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and not negative, not {getattr(self, name)}")
        for name in ("init_std", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, not {getattr(self, name)}")
        for name in ("distillation", "final_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], not {getattr(self, name)}")
        if self.weights == "prior" and self.prior in _KEEP_WEIGHTS:
            raise ValueError(f"weights prior wants a prior that changes weights, admm say, and {self.prior} does not")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), not {self.betas}")
        if self.optimiser != "adam" and not self.betas[0] ** 2 < self.betas[1] <= 0.99:
            raise ValueError(f"{self.optimiser} wants betas[0]**2 < betas[1] <= 0.99 (adam does not), not {self.betas}")
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed must lie in [0, 2**64), not {self.seed}")

    @property
    def microbatches(self) -> int:
        """Micro-batches in a global batch."""
        return self.batch_rows // self.microbatch_rows
