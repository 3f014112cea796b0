"""Settings of mask learning that follow from a budget."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace

import torch

from leap.settings import LearnSettings

_STEPS = 150
"""Steps for a budget of tokens: fewer learn too little, and more of the same tokens in smaller batches gains little."""
_MOST_TOKENS_A_STEP = 1 << 16
_TOKENS_A_PASS = 4096
"""In one forward and backward pass on a GPU, where small passes take as long as larger ones."""
_MOST_ROWS_UNASKED = 1000 * LearnSettings.batch_rows


@dataclass(frozen=True)
class Budget:
    """How long to learn.

    Args:
        steps: optimiser steps.
        tokens: tokens to learn from, counted again where the text is gone over again.

    Raises:
        ValueError: both are given, or one that is not positive.
    """

    steps: int | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        if self.steps is not None and self.tokens is not None:
            raise ValueError("give steps or tokens, not both")
        for name in ("steps", "tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")

    def tokens_to_read(self, length: int) -> int:
        """As many tokens of a text as learning can use, in rows of ``length``."""
        if self.tokens is not None:
            return self.tokens
        rows = _MOST_ROWS_UNASKED if self.steps is None else self.steps * LearnSettings.batch_rows
        return rows * length

    def settings(self, rows: int, length: int, weights: int, device: torch.device) -> LearnSettings:
        """The settings for so many calibration rows of a length and prunable weights.

        Without a budget the steps follow from the rows, see ``LearnSettings.for_rows``. With tokens there are about 150
        steps of as many rows as that takes, at least the usual 8, and at most 65536 tokens.
        """
        settings = LearnSettings.for_rows(rows, weights)
        if self.steps is not None:
            settings = replace(settings, steps=self.steps)
        elif self.tokens is not None:
            batch = min(round(self.tokens / (_STEPS * length)), _MOST_TOKENS_A_STEP // length)
            batch = max(batch, settings.batch_rows)
            settings = replace(settings, batch_rows=batch, steps=max(1, round(self.tokens / (batch * length))))
        if device.type == "cuda":
            most = max(1, _TOKENS_A_PASS // length)
            size = max(n for n in range(1, most + 1) if settings.batch_rows % n == 0)
            settings = replace(settings, microbatch_rows=size)
        passes = settings.steps * settings.batch_rows / rows
        if passes > 4:
            warnings.warn(
                f"{rows * length:,} tokens of text are few for {settings.steps} steps: they are gone over "
                f"{math.ceil(passes)} times, and more text makes better masks",
                stacklevel=3,
            )
        return settings
