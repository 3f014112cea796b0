"""The project's own settings of mask learning for a budget of tokens."""

from __future__ import annotations

import math

from leap.settings import LearnSettings


def settings_for(tokens: int, length: int, learning_rate: float) -> LearnSettings:
    """Settings for a real model and ``tokens`` tokens in rows of ``length``.

    150 steps of 2048 tokens for 300 thousand; beyond, tokens a step grow a little faster than steps do.
    """
    doublings = max(0, round(0.6 * math.log2(tokens / 300_000)))
    rows = max(1, (2048 << doublings) // length)
    steps = max(1, round(tokens / (rows * length)))
    # The step common to a matrix keeps the ratio to the rate that the recipe for SmolLM2 has.
    return LearnSettings(
        steps=steps, batch_rows=rows, microbatch_rows=rows, learning_rate=learning_rate, matrix_rate=5 * learning_rate
    )
