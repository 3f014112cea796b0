"""Perplexity of the hard mask against what learning has cost so far: tokens and time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from pipeline.formatting import short_percent
from pipeline.reporting import theme
from pipeline.reporting.plots.labels import spread

COLOURS = (theme.ACCENT, theme.SECOND, theme.MUTED, theme.INK)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One learning run: the perplexity of the hard mask on held-out rows at some of its steps."""

    name: str
    """Runs of the same name differ in their seed alone."""
    tokens: list[int]
    seconds: list[float]
    """Since the beginning, the layer-wise prior included."""
    perplexity: list[float]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """What is compared at one sparsity, all on the same held-out rows."""

    sparsity: float
    curves: list[Curve]
    levels: dict[str, float]
    """Perplexity of what needs no learning, by name."""


def budget_figure(panels: Sequence[Panel], text: str) -> Figure:
    """A row for each sparsity: against tokens at the left, against time at the right.

    A line is the mean over seeds, which are drawn thinly.

    Args:
        text: what the perplexity was measured on.
    """
    names = list(dict.fromkeys(curve.name for panel in panels for curve in panel.curves))
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}
    with matplotlib.rc_context(theme.STYLE):
        figure = Figure(figsize=(10, 3.5 * len(panels)), layout=ConstrainedLayoutEngine(hspace=0.08, wspace=0.06))
        grid = figure.subplots(len(panels), 2, squeeze=False, sharey="row")
        for (left, right), panel in zip(grid, panels, strict=True):
            for axes, over in ((left, "tokens"), (right, "seconds")):
                _draw(axes, panel, over, colours)
            left.set_title(f"{short_percent(panel.sparsity)} sparse")
            left.set_ylabel(f"perplexity, {text}")
            left.set_xlabel("tokens learned from, thousands")
            right.set_xlabel("seconds of computing, the layer-wise start included")
    return figure


def _draw(axes: Axes, panel: Panel, over: str, colours: dict[str, str]) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(6))
    unit = 1000 if over == "tokens" else 1
    ends = []
    by_name: dict[str, list[Curve]] = {}
    for curve in panel.curves:
        by_name.setdefault(curve.name, []).append(curve)
    for name, curves in by_name.items():
        xs = [[x / unit for x in getattr(curve, over)] for curve in curves]
        if len(curves) > 1:
            for x, curve in zip(xs, curves, strict=True):
                axes.plot(x, curve.perplexity, color=colours[name], linewidth=0.7, alpha=0.4)
        x = [fmean(values) for values in zip(*xs, strict=True)]
        y = [fmean(values) for values in zip(*(curve.perplexity for curve in curves), strict=True)]
        axes.plot(x, y, color=colours[name], linewidth=2)
        ends.append((f"{name} {y[-1]:.1f}", x[-1], y[-1], colours[name]))
    right = max(x for _, x, _, _ in ends)
    axes.set_xlim(0, right)
    for name, level in panel.levels.items():
        axes.axhline(level, color=theme.FAINT, linewidth=1.2, linestyle=(0, (3, 3)))
        ends.append((f"{name} {level:.1f}", right, level, theme.MUTED))
    spread(axes, ends)
