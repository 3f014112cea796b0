"""What a searched field may be: a range or a list of values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)


@dataclass(frozen=True)
class Choice:
    """One of some values."""

    values: tuple[Any, ...]

    def __contains__(self, value: object) -> bool:
        return value in self.values

    def __str__(self) -> str:
        return f"one of {', '.join(map(str, self.values))}"

    def including(self, value: Any) -> Choice:
        """The same with ``value``."""
        return self if value in self else Choice((*self.values, value))

    def distribution(self) -> BaseDistribution:
        """The domain as Optuna knows it."""
        return CategoricalDistribution(self.values)

    def position(self, value: Any) -> float:
        """Where ``value`` lies between the first (0) and the last (1) of the domain, for plots."""
        return self.values.index(value) / max(1, len(self.values) - 1)


@dataclass(frozen=True)
class Span:
    """A number from ``low`` to ``high``, both included."""

    low: float
    high: float
    log: bool = False
    """Even in the logarithm rather than in the value."""
    whole: bool = False
    """Integers only."""

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int | float) and self.low <= value <= self.high

    def __str__(self) -> str:
        return f"{self.low:g} … {self.high:g}"

    def including(self, value: float) -> Span:
        """The same, wide enough for ``value``.

        Raises:
            ValueError: a logarithmic scale has no place for it.
        """
        if self.log and value <= 0:
            raise ValueError(f"{value} has no place on a logarithmic scale")
        return Span(min(self.low, value), max(self.high, value), self.log, self.whole)

    def distribution(self) -> BaseDistribution:
        """The domain as Optuna knows it."""
        if self.whole:
            return IntDistribution(int(self.low), int(self.high), log=self.log)
        return FloatDistribution(self.low, self.high, log=self.log)

    def position(self, value: float) -> float:
        """Where ``value`` lies between the low (0) and the high (1) end on the domain's scale, for plots."""
        low, high, at = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        return (at - low) / (high - low)


Domain = Choice | Span
