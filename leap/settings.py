"""Everything that decides how masks are learned, with the published values of LEAP (arXiv 2605.17289) as defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from leap.schedules import Schedule

Scope = Literal["global", "layer", "row"]


@dataclass(frozen=True, kw_only=True)
class DensityControl:
    """How training is held to the density that was asked for. Hardening makes it exact in any case."""

    __pydantic_config__ = {"extra": "forbid"}

    kind: Literal["penalty", "lagrangian"] = "penalty"
    """``penalty``: weight·|density − target|, LEAP's loss. ``lagrangian``: augmented Lagrangian with a learned multiplier."""
    weight: float = 7.0
    """λ1 of the penalty, or c in the augmented Lagrangian λ·gap + c/2·gap²."""
    relaxation: float = 0.1
    """Lagrangian: share of the run over which λ takes over what c·gap exerts (λ += c·gap / (relaxation·steps) a step)."""
    of: Literal["sampled", "expected"] = "sampled"
    """Density that is controlled: mean of the sampled soft mask, or the probability mean σ(scale · logit)."""

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"weight must not be negative, not {self.weight}")
        if self.relaxation <= 0:
            raise ValueError(f"relaxation must be positive, not {self.relaxation}")


@dataclass(frozen=True, kw_only=True)
class LearnSettings:
    """Mask learning. Lengths are in optimiser steps, batches in rows of the calibration set."""

    __pydantic_config__ = {"extra": "forbid"}

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
    init_std: float = 0.014
    """Standard deviation of the Gaussian that breaks ties among the first logits."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW on the logits."""
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
    scope: Scope = "global"
    """Within what the asked sparsity holds exactly after hardening: the model, each layer or each row."""
    seed: int = 0
    """Seed of the first logits and of the noise."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_rows", "microbatch_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.batch_rows % self.microbatch_rows:
            raise ValueError(f"batch_rows {self.batch_rows} is not a multiple of microbatch_rows {self.microbatch_rows}")
        if not 0 <= self.distillation <= 1:
            raise ValueError(f"distillation must lie in [0, 1], not {self.distillation}")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be positive, not {self.learning_rate}")
        if not 0 <= self.final_rate <= 1:
            raise ValueError(f"final_rate must lie in [0, 1], not {self.final_rate}")
