"""The project's own settings of mask learning for a budget of tokens."""

from __future__ import annotations

from leap.settings import LearnSettings

_MOST_TOKENS = 1 << 16  # a step


def settings_for(tokens: int, length: int, learning_rate: float) -> LearnSettings:
    """Settings for a real model and ``tokens`` tokens in rows of ``length``: about 150 steps, whatever the tokens.

    On a GPU a step of a small model takes the time of starting its kernels, up to some 64 thousand tokens.
    """
    rows = max(1, min(round(tokens / (150 * length)), _MOST_TOKENS // length))
    steps = max(1, round(tokens / (rows * length)))
    # The step common to a matrix keeps the ratio to the rate that the recipe for SmolLM2 has.
    return LearnSettings(
        steps=steps, batch_rows=rows, microbatch_rows=rows, learning_rate=learning_rate, matrix_rate=5 * learning_rate
    )
