"""Settings of hard-concrete gates (Louizos, Welling and Kingma, arXiv 1712.01312), one a weight."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from leap.families.one_logit import OneLogit
from leap.schedules import Schedule
from leap.validation import NO_UNKNOWN_KEYS

if TYPE_CHECKING:
    from leap.families.hard_concrete_gate import HardConcreteGate


@dataclass(frozen=True, kw_only=True)
class HardConcrete(OneLogit):
    """Noisy gates, stretched over [−0.1, 1.1] and clipped, so that some are exactly 0 or 1.

    Raises:
        ValueError: a value out of its range; the message names the field.
    """

    __pydantic_config__ = NO_UNKNOWN_KEYS

    kind: Literal["hard-concrete"] = "hard-concrete"
    """``hard-concrete``: noisy gates, stretched over [−0.1, 1.1] and clipped, so that some are exactly 0 or 1."""
    noise: bool = True
    """Logistic noise on the logits; without it the gate is the same in every micro-batch."""
    temperature: Schedule = field(default_factory=lambda: Schedule(start=1 / 3, end=1 / 3))
    """Temperature β of the gate."""

    def gate(self) -> HardConcreteGate:
        """See :meth:`MaskFamily.gate`."""
        from leap.families.hard_concrete_gate import HardConcreteGate

        return HardConcreteGate(self)

    @classmethod
    def published(cls) -> dict[str, Any]:
        """The gates of the paper with ℓ0 controlled to a target: a Lagrangian on the expected density, no distillation.

        β is that of the comparison in arXiv 2603.08065. Nobody has published these gates one a weight; their start is
        this project's.
        """
        from leap.settings import DensityControl

        return {
            "family": cls(temperature=Schedule(start=1 / 3, end=1 / 3), scale=Schedule(start=1.0, end=1.0), noise=True),
            "matrix_rate": 0.0,
            "density": DensityControl(of="expected"),
            "weight_reward": 0.0,
            "distillation": 0.0,
        }
