"""Values that change with the progress of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from leap.validation import NO_UNKNOWN_KEYS, check_choices


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A value that goes from ``start`` to ``end`` while progress goes from 0 to 1.

    Raises:
        ValueError: an end of the path that is not positive and finite, or an unknown shape.
    """

    __pydantic_config__ = NO_UNKNOWN_KEYS

    start: float
    """Value at the first step."""
    end: float
    """Value at the last step."""
    shape: Literal["linear", "exponential", "cosine"] = "linear"
    """Path between the two: linear, exponential (constant ratio per step) or half a cosine."""

    def __post_init__(self) -> None:
        check_choices(self)
        if not (0 < self.start < math.inf and 0 < self.end < math.inf):
            raise ValueError(f"start and end must be positive and finite, not {self.start} and {self.end}")

    def at(self, progress: float) -> float:
        """The value at ``progress`` in [0, 1]."""
        if self.shape == "exponential":
            return float(self.start ** (1 - progress) * self.end**progress)
        if self.shape == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        # Not start + progress·(end − start), which can end at 0 where the two are far apart.
        return (1 - progress) * self.start + progress * self.end


def warmup_then_cosine(step: int, steps: int, warmup: int, floor: float = 0.0) -> float:
    """Factor on the learning rate at ``step`` (from 0): linear warm-up, then half a cosine.

    The cosine would reach ``floor`` at ``step == steps``, one after the last, so that no step is wasted at rate zero.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2
