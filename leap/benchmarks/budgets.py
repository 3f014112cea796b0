"""The project's own settings of mask learning for a budget of tokens."""

from __future__ import annotations

from typing import Any

from leap.schedules import Schedule
from leap.settings import DensityControl, LearnSettings

_MOST_TOKENS = 1 << 16  # a step


def own_settings(**fields: Any) -> LearnSettings:
    """No noise, distillation alone, ADMM's scores as first logits, a Lagrangian; ``fields`` on top."""
    chosen: dict[str, Any] = {
        "noise": False,
        "distillation": 1.0,
        "prior": "admm",
        "prior_grading": "rank",
        "prior_strength": 10.0,
        "init_std": 0.1,
        "temperature": Schedule(start=0.3, end=0.02, shape="exponential"),
        "scale": Schedule(start=1.0, end=1.0),
        "weight_reward": 0.0,
        "density": DensityControl(kind="lagrangian", weight=100.0, of="sampled"),
    }
    return LearnSettings(**chosen | fields)


def settings_for(tokens: int, length: int, learning_rate: float) -> LearnSettings:
    """Settings for a real model and ``tokens`` tokens in rows of ``length``: about 150 steps, whatever the tokens.

    On a GPU a step of a small model takes the time of starting its kernels, up to some 64 thousand tokens.
    """
    rows = max(1, min(round(tokens / (150 * length)), _MOST_TOKENS // length))
    steps = max(1, round(tokens / (rows * length)))
    # The step common to a matrix keeps the ratio to the rate that the recipe for SmolLM2 has.
    return own_settings(
        steps=steps, batch_rows=rows, microbatch_rows=rows, learning_rate=learning_rate, matrix_rate=5 * learning_rate
    )
