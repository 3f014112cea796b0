"""Settings of LEAP's masks (arXiv 2605.17289)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from leap.families.base import check_pattern
from leap.families.one_logit import OneLogit
from leap.schedules import Schedule
from leap.validation import NO_UNKNOWN_KEYS

if TYPE_CHECKING:
    from leap.families.bernoulli import BernoulliGate


@dataclass(frozen=True, kw_only=True)
class Leap(OneLogit):
    """A gate for each weight, σ(scale · logit / temperature); with noise, Bernoulli.

    Raises:
        ValueError: a value out of its range; the message names the field.
    """

    __pydantic_config__ = NO_UNKNOWN_KEYS

    kind: Literal["leap"] = "leap"
    """``leap``: a gate for each weight, σ(scale · logit / temperature)."""
    pattern: tuple[int, int] | None = None
    """N:M, as in ``[2, 4]``: the gates of every M consecutive inputs add up to N, in every soft mask too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern is not None:
            check_pattern(self.pattern)
            if self.scope != "global":
                raise ValueError(f"scope {self.scope} has no meaning with pattern {[*self.pattern]}; leave one out")

    @property
    def fixed_density(self) -> bool:
        """See :attr:`MaskFamily.fixed_density`."""
        return self.pattern is not None

    def gate(self) -> BernoulliGate:
        """See :meth:`MaskFamily.gate`."""
        if self.pattern:
            from leap.families.grouped import GroupedGate

            return GroupedGate(self, self.pattern)
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
                pattern=None,
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
