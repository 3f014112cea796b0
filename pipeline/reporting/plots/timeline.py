"""Where the time went."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pipeline.formatting import duration
from pipeline.reporting.theme import ACCENT, INK, MUTED
from pipeline.results.schema import StageTime

UNITS = (("hours", 3600), ("minutes", 60), ("seconds", 1))


def stages_figure(stages: list[StageTime]) -> Figure | None:
    """A bar for each stage, in the order they ran."""
    if not stages:
        return None
    figure = Figure(figsize=(10, 0.6 + 0.25 * len(stages)), layout="constrained")
    axes = figure.subplots()
    longest = max(stage.get("seconds", 0.0) for stage in stages) or 1.0
    unit, size = next((unit, size) for unit, size in UNITS if longest >= 2 * size or size == 1)
    for y, stage in enumerate(stages):
        seconds, cached = stage.get("seconds", 0.0), stage.get("cached", False)
        axes.barh(y, seconds / size, height=0.62, color=ACCENT, alpha=0.25 if cached else 1.0, linewidth=0)
        text = f"{duration(seconds)}, cached" if cached else duration(seconds)
        axes.annotate(
            text, (seconds / size, y), (5, 0), textcoords="offset points",
            va="center", fontsize=8.5, color=MUTED if cached else INK,
        )  # fmt: skip
    axes.set_xlim(0, 1.14 * longest / size)
    axes.set_ylim(len(stages) - 0.4, -0.6)
    axes.set_yticks(range(len(stages)), [stage.get("name", "?") for stage in stages])
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(unit)
    return figure
