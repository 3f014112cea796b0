"""How good each variant is: a dot for each, tied to the dense model's line by a stem as long as the loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from pipeline import formatting
from pipeline.reporting import summary
from pipeline.reporting.svg import tooltip
from pipeline.reporting.theme import ACCENT, INK, MUTED
from pipeline.results.schema import JsonRow, RunResults

COLUMNS = 4
ROW_INCHES = 0.24
FIRST_LINE = 0.55
LOG_ABOVE = 6.0
"""A panel whose largest value is this many times its smallest gets a logarithmic axis."""


@dataclass(frozen=True, kw_only=True)
class _Panel:
    """One axis: what is measured, as (value, standard error) of a variant, and how a value is written.

    Perplexities may span decades and have small errors: they get stems, and a logarithmic axis where they need it.
    Accuracies have large errors: they get whiskers, and their values stand in a column, clear of them.
    """

    title: str
    measure: Callable[[JsonRow], tuple[float, float] | None]
    write: Callable[[float], str]
    stems: bool


def perplexity_figure(results: RunResults) -> Figure | None:
    """One panel for each data set."""
    panels = [
        _Panel(
            title=dataset,
            measure=lambda variant, dataset=dataset: _perplexity(variant, dataset),  # type: ignore[misc]
            write=formatting.perplexity,
            stems=True,
        )
        for dataset in summary.datasets(results)
    ]
    return _figure(results, panels)


def accuracy_figure(results: RunResults) -> Figure | None:
    """The mean of several tasks, then one panel for each; whiskers of one standard error."""
    measures: dict[str, Callable[[JsonRow], tuple[float, float] | None]] = {}
    if len(summary.tasks(results)) != 1 and any(v.get("mean_accuracy") for v in results.get("variants", [])):
        measures["mean of tasks"] = _mean_accuracy
    for task in summary.tasks(results):
        measures[task] = lambda variant, task=task: _task_accuracy(variant, task)  # type: ignore[misc]
    panels = [
        _Panel(title=title, measure=measure, write=lambda v: f"{100 * v:.1f}", stems=False)
        for title, measure in measures.items()
    ]
    return _figure(results, panels)


def _perplexity(variant: JsonRow, dataset: str) -> tuple[float, float] | None:
    value = summary.perplexity_of(variant, dataset)
    if value is None or not math.isfinite(value):
        return None
    return value, value * summary.error_nll_of(variant, dataset)


def _mean_accuracy(variant: JsonRow) -> tuple[float, float] | None:
    value = summary.mean_accuracy_of(variant)
    return None if value is None else (value, summary.error_of_mean(variant))


def _task_accuracy(variant: JsonRow, task: str) -> tuple[float, float] | None:
    measured = variant.get("tasks", {}).get(task, {})
    return (measured["acc"], summary.error_of_task(variant, task)) if "acc" in measured else None


def _figure(results: RunResults, panels: list[_Panel]) -> Figure | None:
    groups = summary.groups(results)
    if not panels or not groups:
        return None
    # Rows from the top; a group begins with a row for its heading.
    rows: list[tuple[float, str, JsonRow | None]] = []
    for target, variants in groups:
        rows.append((len(rows), f"{formatting.short_percent(target)} sparse", None))
        for variant in variants:
            rows.append((len(rows), summary.label(variant), variant))
    columns = min(len(panels), COLUMNS)
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(10, lines * (0.95 + ROW_INCHES * len(rows))), layout=ConstrainedLayoutEngine(hspace=0.06))
    grid = figure.subplots(lines, columns, squeeze=False)
    for index, axes in enumerate(grid.flat):
        if index >= len(panels):
            axes.remove()
            continue
        _draw(axes, panels[index], rows, results)
        _label_rows(axes, rows, shown=index % columns == 0)
    return figure


def _draw(axes: Axes, panel: _Panel, rows: list[tuple[float, str, JsonRow | None]], results: RunResults) -> None:
    dense_variant = summary.dense_variant(results)
    dense = panel.measure(dense_variant) if dense_variant else None
    measured = [(y, v, m) for y, _, v in rows if v is not None and (m := panel.measure(v)) is not None]
    spans = [m for _, _, m in measured] + ([dense] if dense else [])
    low, high = min((v - e for v, e in spans), default=0), max((v + e for v, e in spans), default=1)
    _scale(axes, panel, low, high)
    axes.set_ylim(len(rows) - 0.5, -0.6)
    axes.set_title(panel.title)
    if dense:
        _draw_dense(axes, panel, *dense)
    for y, variant, (value, error) in measured:
        colour = ACCENT if summary.is_learned(variant) else MUTED
        if dense and panel.stems:
            axes.plot([dense[0], value], [y, y], color=colour, linewidth=1.4, alpha=0.35, solid_capstyle="butt")
        if error:
            axes.plot([value - error, value + error], [y, y], color=colour, linewidth=1.1, solid_capstyle="butt")
        (dot,) = axes.plot([value], [y], "o", color=colour, markersize=5.5, markeredgewidth=0)
        dot.set_gid(tooltip(f"{variant.get('name')}, {panel.title}: {panel.write(value)} ± {panel.write(error)}"))
        text: dict[str, Any] = {"fontsize": 8.5, "color": colour if colour == ACCENT else INK, "va": "center"}
        if panel.stems:
            axes.annotate(panel.write(value), (value + error, y), (5, 0), textcoords="offset points", **text)
        else:
            axes.text(0.99, y, panel.write(value), transform=axes.get_yaxis_transform(), ha="right", **text)


def _scale(axes: Axes, panel: _Panel, low: float, high: float) -> None:
    """Limits with room for values at the right, and ticks."""
    if panel.stems and low > 0 and high / low > LOG_ABOVE:
        axes.set_xscale("log")
        axes.set_xlim(low / (high / low) ** 0.06, high * (high / low) ** 0.2)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        unit = "perplexity, logarithmic"
    else:
        pad = (high - low) or abs(high) or 1
        axes.set_xlim(low - 0.06 * pad, high + (0.2 if panel.stems else 0.3) * pad)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        unit = "perplexity" if panel.stems else "accuracy, %"
    factor = 1 if panel.stems else 100
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{factor * x:g}"))
    axes.set_xlabel(unit)


def _draw_dense(axes: Axes, panel: _Panel, value: float, error: float) -> None:
    """The line that the variants are compared with; its value stands in the first heading's row, above the line."""
    bottom = axes.get_ylim()[0]
    axes.plot([value, value], [FIRST_LINE, bottom], color=MUTED, linewidth=1, linestyle=(0, (3, 3)), zorder=1)
    text: dict[str, Any] = {"va": "center", "fontsize": 8.5, "color": MUTED}
    words = f"dense {panel.write(value)}"
    if panel.stems:
        axes.annotate(words, (value, 0), (-3, 0), textcoords="offset points", **text)
    else:
        band = Rectangle(
            (value - error, FIRST_LINE), 2 * error, bottom - FIRST_LINE, color=MUTED, alpha=0.1, linewidth=0
        )
        axes.add_patch(band)
        axes.text(0.99, 0, words, transform=axes.get_yaxis_transform(), ha="right", **text)


def _label_rows(axes: Axes, rows: list[tuple[float, str, JsonRow | None]], *, shown: bool) -> None:
    axes.set_yticks([y for y, _, _ in rows], [text if shown else "" for _, text, _ in rows])
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    for tick, (_, _, variant) in zip(axes.get_yticklabels(), rows, strict=True):
        if variant is None:
            tick.set(color=INK, fontweight="bold")
        elif summary.is_learned(variant):
            tick.set(color=ACCENT, fontweight="bold")
