"""Settings of the families that learn one logit a weight."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from leap.families.base import MaskFamily
from leap.schedules import Schedule
from leap.scopes import Scope
from leap.validation import NO_UNKNOWN_KEYS, check_choices


@dataclass(frozen=True, kw_only=True)
class OneLogit(MaskFamily):
    """A logit for each weight, which starts from the prior's mask and decides in the end by its rank.

    Raises:
        ValueError: a value out of its range; the message names the field.
    """

    __pydantic_config__ = NO_UNKNOWN_KEYS

    noise: bool = False
    """Logistic noise on the logits; without it the gate is the same in every micro-batch."""
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
        return self.scope == "global" and not self.fixed_density

    @property
    def scope_name(self) -> str:
        """See :attr:`MaskFamily.scope_name`."""
        return self.pattern_name if self.pattern else self.scope
