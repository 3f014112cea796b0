"""What sparsity costs: perplexity against sparsity, a line for each method."""

from __future__ import annotations

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from pipeline import formatting
from pipeline.reporting import summary
from pipeline.reporting.plots.labels import spread
from pipeline.reporting.svg import tooltip
from pipeline.reporting.theme import ACCENT, FAINT, INK, MUTED
from pipeline.results.schema import RunResults

Points = list[tuple[float, float]]
PER_ROW = 2


def pareto_figure(results: RunResults) -> Figure | None:
    """One panel for each data set; learned methods in colour, the dense model as a line to measure from."""
    panels = [(name, lines) for name in summary.datasets(results) if (lines := _lines(results, name))]
    if not panels:
        return None
    rows = -(-len(panels) // PER_ROW)
    figure = Figure(figsize=(10, 3.6 * rows), layout="constrained")
    grid = figure.subplots(rows, min(PER_ROW, len(panels)), squeeze=False)
    for index, axes in enumerate(grid.flat):
        if index < len(panels):
            _draw(axes, results, *panels[index])
        else:
            axes.remove()
    return figure


def _lines(results: RunResults, dataset: str) -> dict[str, Points]:
    """(real sparsity, perplexity) by method, in the order of sparsity."""
    lines: dict[str, Points] = {}
    for _, group in summary.groups(results):
        for variant in group:
            value = summary.perplexity_of(variant, dataset)
            if value is not None and math.isfinite(value):
                lines.setdefault(summary.label(variant), []).append((variant.get("real_sparsity", 0.0), value))
    return {name: sorted(points) for name, points in lines.items()}


def _draw(axes: Axes, results: RunResults, dataset: str, lines: dict[str, Points]) -> None:
    learned = {summary.label(v) for _, g in summary.groups(results) for v in g if summary.is_learned(v)}
    axes.set_title(dataset)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:g}"))
    axes.set_xlabel("weights removed, %")
    axes.set_ylabel("perplexity, logarithmic")
    targets = [target for target, _ in summary.groups(results)]
    axes.set_xticks(targets)
    pad = 0.08 * (max(targets) - min(targets)) or 0.02
    axes.set_xlim(min(targets) - pad, max(targets) + pad)
    for name, points in lines.items():
        colour = ACCENT if name in learned else MUTED
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, color=colour, linewidth=2 if name in learned else 1.2)
        for x, y in points:
            (dot,) = axes.plot([x], [y], "o", color=colour, markersize=5, markeredgewidth=0)
            dot.set_gid(tooltip(f"{name}, {formatting.percent(x, 2)}: {formatting.perplexity(y)}"))
    ends = [(name, *points[-1]) for name, points in lines.items()]
    dense = summary.perplexity_of(summary.dense_variant(results), dataset)
    if dense is not None:
        axes.axhline(dense, color=FAINT, linewidth=1, linestyle=(0, (3, 3)))
        ends.append(("dense", max(targets), dense))
    colours = {name: ACCENT if name in learned else MUTED if name == "dense" else INK for name, _, _ in ends}
    spread(axes, [(f"{name} {formatting.perplexity(y)}", x, y, colours[name]) for name, x, y in ends])
