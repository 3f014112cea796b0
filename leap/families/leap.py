"""Settings of LEAP's masks (arXiv 2605.17289)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from leap.families.base import MaskFamily
from leap.schedules import Schedule
from leap.scopes import Scope
from leap.validation import NO_UNKNOWN_KEYS, check_choices

if TYPE_CHECKING:
    from leap.families.bernoulli import BernoulliGate


@dataclass(frozen=True, kw_only=True)
class Leap(MaskFamily):
    """A gate for each weight, relaxed and independent of the others.

    Raises:
        ValueError: a value out of its range; the message names the field.
    """

    __pydantic_config__ = NO_UNKNOWN_KEYS

    kind: Literal["leap"] = "leap"
    """A gate for each weight."""
    noise: bool = False
    """Logistic noise on the logits (a Bernoulli gate); without it the gate is σ(scale · logit / temperature)."""
    temperature: Schedule = field(default_factory=lambda: Schedule(start=0.3, end=0.02, shape="exponential"))
    """Temperature τ of the gate."""
    scale: Schedule = field(default_factory=lambda: Schedule(start=1.0, end=1.0))
    """Scale κ of the logits."""
    strength: float = 10.0
    """Distance of the first logits from zero, in units of init_std."""
    grading: Literal["sign", "rank"] = "rank"
    """``sign``: one distance for every weight, LEAP's start. ``rank``: graded by the rank of the prior's score."""
    init_std: float = 0.1
    """Standard deviation of the Gaussian that breaks ties among the first logits."""
    scope: Scope = "global"
    """Within what the requested sparsity holds exactly after hardening: the model, each layer or each row."""

    def __post_init__(self) -> None:
        check_choices(self)
        if not 0 <= self.strength < math.inf:
            raise ValueError(f"strength must be finite and not negative, not {self.strength}")
        if not 0 < self.init_std < math.inf:
            raise ValueError(f"init_std must be positive and finite, not {self.init_std}")

    @property
    def shares_sparsity(self) -> bool:
        """See :attr:`MaskFamily.shares_sparsity`."""
        return self.scope == "global"

    @property
    def scope_name(self) -> str:
        """See :attr:`MaskFamily.scope_name`."""
        return self.scope

    def gate(self) -> BernoulliGate:
        """See :meth:`MaskFamily.gate`."""
        from leap.families.bernoulli import BernoulliGate

        return BernoulliGate(self)

    @classmethod
    def published(cls) -> dict[str, Any]:
        """LEAP's published values; they want their 2000 steps of 256 rows of 4096 tokens."""
        from leap.settings import DensityControl

        return {
            "family": cls(
                noise=True,
                temperature=Schedule(start=4.0, end=0.05),
                scale=Schedule(start=25.0, end=350.0),
                strength=3.0,
                grading="sign",
                init_std=0.014,
                scope="global",
            ),
            "steps": 2000,
            "batch_rows": 256,
            "microbatch_rows": 1,
            "prior": "wanda",
            "prior_scope": "row",
            "learning_rate": 1e-3,
            "matrix_rate": 0.0,
            "warmup_steps": 5,
            "final_rate": 0.0,
            "betas": (0.9, 0.95),
            "clip": 1.0,  # what Hugging Face's Trainer, which the authors train with, does unless told otherwise
            "density": DensityControl(kind="penalty", weight=7.0),
            "weight_reward": 10.0,
            "distillation": 0.0,
        }
