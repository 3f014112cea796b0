"""The picture of perplexity against what learning costs, from the results of finished runs."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pipeline.benchmarks.leap_vs_paper import _curves
from pipeline.reporting.plots.budget import Panel, budget_figure


def run() -> dict[str, Any]:
    def training(seconds: float, hard: list[float]) -> dict[str, Any]:
        return {"masks": {"step": [0, 2, 3], "seconds": [seconds, 3 * seconds, 4 * seconds], "hard": hard}}

    def row(name: str, method: str, sparsity: float, seconds: float) -> dict[str, Any]:
        return {"name": name, "method": method, "target_sparsity": sparsity, "seconds": seconds}

    settings = {"prior": "admm", "prior_scope": "native", "batch_rows": 8}
    return {
        "context_length": 16,
        "config": {
            "learn": {"leap": {"settings": settings}, "leap-paper": {"settings": settings | {"prior": "wanda"}}}
        },
        "variants": [
            row("admm@0.5", "admm", 0.5, 4.0),
            row("leap.seed0@0.5", "leap", 0.5, 8.0),
            row("leap.seed1@0.5", "leap", 0.5, 8.0),
            row("leap-paper@0.5", "leap-paper", 0.5, 8.0),
            row("leap.seed0@0.6", "leap", 0.6, 8.0),
        ],
        "training": {
            "leap.seed0@0.5": training(2.0, [3.0, 2.8, 2.6]),
            "leap.seed1@0.5": training(2.5, [3.0, 2.7, 2.7]),
            "leap-paper@0.5": training(1.0, [3.4, 3.2, 3.1]),
            "leap.seed0@0.6": training(2.0, [3.5, 3.3, 3.1]),
        },
    }


def test_a_curve_counts_tokens_and_time_with_its_start() -> None:
    first, second, paper = _curves(run(), 0.5)
    assert [c.name for c in (first, second, paper)] == ["leap", "leap", "leap-paper"]
    assert first.tokens == [128, 384, 512]
    assert first.seconds == [6.0, 10.0, 12.0], "two seconds a step after ADMM's four"
    assert paper.seconds == [1.0, 3.0, 4.0], "its prior has no row in the table"
    assert second.perplexity == pytest.approx([math.exp(loss) for loss in (3.0, 2.7, 2.7)])


def test_the_picture_names_every_line() -> None:
    panels = [
        Panel(sparsity=sparsity, curves=_curves(run(), sparsity), levels={"dense": 10.0, "admm": 20.0})
        for sparsity in (0.5, 0.6)
    ]
    figure = budget_figure(panels, "held-out text")
    figure.draw_without_rendering()
    assert len(figure.axes) == 4
    left, right = figure.axes[:2]
    assert "tokens" in left.get_xlabel()
    assert "seconds" in right.get_xlabel()
    assert left.get_ylabel() == "perplexity, held-out text"
    for axes in (left, right):
        ends = [text.get_text() for text in axes.texts]
        assert [end.split()[0] for end in ends] == ["dense", "leap", "admm", "leap-paper"], "from the lowest up"
        assert f"leap {(math.exp(2.6) + math.exp(2.7)) / 2:.1f}" in ends
