"""Values that change with the progress of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A value that goes from ``start`` to ``end`` while progress goes from 0 to 1."""

    __pydantic_config__ = {"extra": "forbid"}

    start: float
    """Value at the first step."""
    end: float
    """Value at the last step."""
    shape: Literal["linear", "exponential", "cosine"] = "linear"
    """Path between the two: linear, exponential (constant ratio per step) or half a cosine."""

    def __post_init__(self) -> None:
        if self.start <= 0 or self.end <= 0:
            raise ValueError(f"start and end must be positive, not {self.start} and {self.end}")

    def at(self, progress: float) -> float:
        """The value at ``progress`` in [0, 1]."""
        if self.shape == "exponential":
            return self.start * (self.end / self.start) ** progress
        if self.shape == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return self.start + (self.end - self.start) * progress


def warmup_then_cosine(step: int, steps: int, warmup: int, floor: float = 0.0) -> float:
    """Factor on the learning rate at ``step`` (from 0): linear warm-up, then half a cosine down to ``floor``."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2
