"""How learning went: losses, density, schedules and the multiplier over steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from pipeline.reporting.plots.labels import End, spread
from pipeline.reporting.theme import ACCENT, FAINT, INK, MUTED, SECOND
from pipeline.results.schema import Training

COLUMNS = 3
KEPT = "% of weights kept"
NO_UNIT = ""


Curve = tuple[str, list[float] | None, str]
"""Name, values if they were recorded, colour."""


@dataclass(frozen=True, kw_only=True)
class _Line:
    """A named curve."""

    name: str
    steps: list[int]
    values: list[float]
    colour: str


@dataclass(frozen=True, kw_only=True)
class _Panel:
    """One pair of axes and the curves that were recorded for it."""

    title: str
    unit: str
    lines: list[_Line]
    log: bool = False
    smooth: bool = False
    target: float | None = None


def training_figure(curves: Training) -> Figure | None:
    """One panel for each kind of curve that was recorded."""
    panels = [panel for panel in _panels(curves) if panel.lines]
    if not panels:
        return None
    columns = min(len(panels), COLUMNS)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(10, 2.45 * rows), layout=ConstrainedLayoutEngine(hspace=0.09))
    grid = figure.subplots(rows, columns, squeeze=False)
    for index, axes in enumerate(grid.flat):
        if index >= len(panels):
            axes.remove()
            continue
        _draw(axes, panels[index])
        _label_ends(axes, panels[index].lines)
    return figure


def _panels(curves: Training) -> list[_Panel]:
    masks = curves.get("masks", {})

    def over_steps(*named: Curve) -> list[_Line]:
        return _lines(curves.get("step", []), named)

    loss = over_steps(("loss", curves.get("loss"), MUTED), ("LM", curves.get("lm_loss"), ACCENT))
    readings = (
        ("sampled", masks.get("sampled"), MUTED),
        ("mean", masks.get("mean"), SECOND),
        ("hard", masks.get("hard"), ACCENT),
    )
    density = over_steps(
        ("sampled", curves.get("density"), MUTED), ("expected", curves.get("expected_density"), ACCENT)
    )
    schedules = over_steps(("τ", curves.get("temperature"), SECOND), ("κ", curves.get("scale"), ACCENT))
    return [
        _Panel(title="Training loss", unit="nats per token", lines=loss, smooth=True),
        _Panel(title="Held-out loss by mask", unit="nats per token", lines=_lines(masks.get("step", []), readings)),
        _Panel(title="Density", unit=KEPT, lines=density, target=curves.get("target_density")),
        _Panel(title="Temperature τ and scale κ", unit="logarithmic", lines=schedules, log=True),
        _Panel(title="Learning rate", unit=NO_UNIT, lines=over_steps(("", curves.get("learning_rate"), ACCENT))),
        _Panel(title="Sparsity multiplier λ", unit="nats", lines=over_steps(("", curves.get("lagrangian"), ACCENT))),
    ]


def _lines(steps: list[int], curves: Sequence[Curve]) -> list[_Line]:
    return [_Line(name=name, steps=steps, values=values, colour=colour) for name, values, colour in curves if values]


def _draw(axes: Axes, panel: _Panel) -> None:
    axes.set_title(panel.title)
    axes.set_xlabel("step")
    axes.set_ylabel(panel.unit)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if panel.log:
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
    if panel.log or panel.unit in (KEPT, NO_UNIT):
        factor = 100 if panel.unit == KEPT else 1
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{factor * y:g}"))
    for line in panel.lines:
        window = max(len(line.values) // 30, 1) if panel.smooth else 1
        if window > 1:
            axes.plot(line.steps, line.values, color=line.colour, linewidth=0.7, alpha=0.35)
        marker = "o" if len(line.values) <= 12 else ""
        axes.plot(line.steps, _smooth(line.values, window), color=line.colour, marker=marker, markersize=3)
    if panel.target is not None:
        _mark_target(axes, panel.target)


def _smooth(values: list[float], window: int) -> np.ndarray:
    """Mean of the last ``window`` values at each step, of fewer at the start."""
    sums = np.cumsum(np.asarray(values, dtype=float))
    before = np.concatenate([np.zeros(window), sums])[: len(sums)]
    means: np.ndarray = (sums - before) / np.minimum(np.arange(1, len(sums) + 1), window)
    return means


def _mark_target(axes: Axes, target: float) -> None:
    axes.axhline(target, color=FAINT, linewidth=1, linestyle=(0, (3, 3)))
    low, high = axes.get_ylim()
    # With room below, so that the words never lie under the tick labels of a line that ends on the target.
    axes.set_ylim(min(low, target - 0.12 * (high - low)), high)
    axes.annotate(
        f"target {100 * target:.4g} %", (0.02, target), (0, -2), ("axes fraction", "data"), "offset points",
        va="top", fontsize=8, color=MUTED,
    )  # fmt: skip


def _label_ends(axes: Axes, lines: list[_Line]) -> None:
    """The name of each line beside its last point."""
    ends: list[End] = []
    for line in lines:
        # A loss that ended as NaN still has a name, at the last value that can be shown.
        shown = [point for point in zip(line.steps, line.values, strict=True) if math.isfinite(point[1])]
        if line.name and shown:
            ends.append((line.name, *shown[-1], line.colour if line.colour != MUTED else INK))
    spread(axes, ends)
