"""Everything that decides how masks are learned.

The defaults are the best that is known for budgets of up to some ten million tokens (docs/log.md);
:meth:`LearnSettings.published` gives the published values of a family, which are meant for two billion (LEAP's).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from leap.families import FAMILIES, Family, Leap
from leap.methods import METHODS
from leap.scopes import PriorScope
from leap.validation import NO_UNKNOWN_KEYS, OneOf, check_choices

Optimiser = Literal["adam", "adam8bit", "adam8bit-bf16"]


@dataclass(frozen=True, kw_only=True)
class DensityControl:
    """How training is held to the density that was asked for. Hardening makes it exact in any case.

    Raises:
        ValueError: a value out of its range; the message names the field.
    """

    __pydantic_config__ = NO_UNKNOWN_KEYS

    kind: Literal["penalty", "lagrangian"] = "lagrangian"
    """``penalty``: weight·|density − target|, LEAP's loss. ``lagrangian``: augmented, with a learned multiplier."""
    weight: float = 100.0
    """λ1 of the penalty (published: 7), or c in the augmented Lagrangian λ·gap + c/2·gap²; the latter wants 100."""
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

    family: Family = field(default_factory=Leap)
    """What masks are made of, how they start, and what their sparsity is exact in."""
    steps: int = 300
    """Optimiser steps."""
    batch_rows: int = 8
    """Rows in a global batch."""
    microbatch_rows: int = 1
    """Rows in one forward and backward pass. Each micro-batch draws its own noise."""
    prior: Annotated[str, OneOf(METHODS)] = "admm"
    """Layer-wise method whose mask the logits start from."""
    prior_scope: PriorScope = "row"
    """Within what that method compares weights; ``native``: as its authors have it."""
    weights: Literal["dense", "prior"] = "dense"
    """Weights that masks are learned over: the model's own, or ``prior``: its new values where it keeps a weight.

    The second takes the bytes of one more weight matrix; the dense model stays what is distilled from.
    """
    optimiser: Optimiser = "adam8bit"
    """Adam, with 6 bytes per logit for it and both moments in 16 bits, 4 with bfloat16 logits too, 12 for ``adam``."""
    learning_rate: float = 0.01
    """Peak learning rate of the optimiser of the logits."""
    matrix_rate: float = 0.05
    """Peak learning rate of the step that all logits of a matrix make together. It moves sparsity between matrices.

    The step follows the sum of the matrix's gradient. Families that fix each matrix's sparsity skip it.
    """
    warmup_steps: int = 5
    """Steps of linear warm-up before the cosine."""
    final_rate: float = 0.0
    """Learning rate at the end of the cosine as a share of the peak."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of Adam's moments."""
    clip: float = 0.0
    """Length that the gradient of all logits together is cut down to where it is longer; 0: it is left as it is.

    Holds the gradients of all logits until the end of a step, one number a logit.
    """
    density: DensityControl = field(default_factory=DensityControl)
    """Control of the density during training."""
    weight_reward: float = 0.0
    """λ2: reward, fading linearly over the run, for ‖M⊙W‖_F summed over layers relative to ‖W‖_F."""
    distillation: float = 1.0
    """Share of the loss that is KL(dense ‖ masked) on the output distribution; the rest is cross-entropy."""
    hidden_distillation: float = 0.0
    """Weight of the distance from the dense model's hidden states after each block, squared, by their variance."""
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
        for name in ("weight_reward", "warmup_steps", "hidden_distillation", "matrix_rate", "clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and not negative, not {getattr(self, name)}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive and finite, not {self.learning_rate}")
        for name in ("distillation", "final_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], not {getattr(self, name)}")
        if self.weights == "prior" and not METHODS.changes_weights(self.prior):
            raise ValueError(f"weights prior wants a prior that changes weights, admm say, and {self.prior} does not")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), not {self.betas}")
        if self.optimiser != "adam" and not self.betas[0] ** 2 < self.betas[1] <= 0.99:
            raise ValueError(f"{self.optimiser} wants betas[0]**2 < betas[1] <= 0.99 (adam does not), not {self.betas}")
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed must lie in [0, 2**64), not {self.seed}")

    @classmethod
    def published(cls, kind: str = "leap", **changes: Any) -> LearnSettings:
        """The published values of the family ``kind``, but for ``changes``."""
        return cls(**FAMILIES[kind].published() | changes)

    def with_family(self, **changes: Any) -> LearnSettings:
        """The same with other values of fields of the family."""
        return replace(self, family=replace(self.family, **changes))

    @classmethod
    def for_rows(cls, rows: int, weights: int) -> LearnSettings:
        """The defaults with the steps and the step size that suit a model and its calibration rows.

        Steps go through the rows once, but there are 100 to 1000. A small model's logits want larger steps: 0.1 was
        best with a million weights and 0.01 with a hundred million (docs/log.md), and the rate falls with the root
        between them.

        Args:
            rows: how many calibration rows there are.
            weights: how many weights can be pruned.
        """
        steps = min(max(-(-rows // cls.batch_rows), 100), 1000)
        rate = min(max(0.1 * math.sqrt(1e6 / max(weights, 1)), 0.01), 0.1)
        return cls(steps=steps, learning_rate=rate, matrix_rate=min(5 * rate, 0.1))

    @property
    def microbatches(self) -> int:
        """Micro-batches in a global batch."""
        return self.batch_rows // self.microbatch_rows
