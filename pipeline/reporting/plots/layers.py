"""Where a mask put its zeros: sparsity by layer and projection."""

from __future__ import annotations

import re
from collections import defaultdict
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from pipeline.formatting import percent
from pipeline.reporting.svg import tooltip
from pipeline.reporting.theme import ACCENT, GROUND, INK, MUTED
from pipeline.results.schema import JsonRow, RunResults

UNIFORM_WITHIN = 0.002
LEGEND_CELLS = 8
WRITTEN_LAYERS = 12
"""With more layers than these the cells are too narrow for their numbers."""
Limits = tuple[float, float]


def table(sparsity_per_layer: dict[str, float]) -> dict[str, dict[int, float]]:
    """Sparsity by projection, then layer index. Experts of one layer are averaged."""
    cells: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for name, sparsity in sparsity_per_layer.items():
        if place := place_of(name):
            projection, layer = place
            cells[projection][layer].append(sparsity)
    return {projection: {i: fmean(v) for i, v in row.items()} for projection, row in cells.items()}


def place_of(name: str) -> tuple[str, int] | None:
    """Projection and layer of a module: the first number in its name is the layer, what follows the projection."""
    match = re.search(r"(?:^|\.)(\d+)\.(.+)$", name)
    return (re.sub(r"\.\d+(?=\.|$)", ".*", match[2]), int(match[1])) if match else None


def is_uniform(variant: JsonRow) -> bool:
    """Whether all layers are equally sparse, so that a map would show nothing."""
    values = list(variant.get("sparsity_per_layer", {}).values())
    return not values or max(values) - min(values) < UNIFORM_WITHIN


def limits(results: RunResults) -> Limits:
    """One colour scale for all the maps of a run, so that they can be compared."""
    shown = [v for v in results.get("variants", []) if not is_uniform(v)]
    values = [value for v in shown for value in v["sparsity_per_layer"].values()]
    return (min(values, default=0.0), max(values, default=1.0))


def layers_figure(variant: JsonRow, scale: Limits) -> Figure | None:
    """A map with a row for each projection and a column for each layer; the stronger the colour, the sparser."""
    rows = {} if is_uniform(variant) else table(variant["sparsity_per_layer"])
    if not rows:
        return None
    layers = sorted({index for row in rows.values() for index in row})
    column_of = {index: column for column, index in enumerate(layers)}
    figure = Figure(figsize=(10, 1.0 + 0.25 * len(rows)), layout="constrained")
    legend, axes = figure.subplots(2, 1, height_ratios=(0.6, len(rows)))
    for y, (projection, row) in enumerate(rows.items()):
        for index, sparsity in row.items():
            corner = (column_of[index] + 0.03, y + 0.03)
            cell = Rectangle(corner, 0.94, 0.94, facecolor=ACCENT, alpha=_shade(sparsity, scale))
            cell.set_gid(tooltip(f"layer {index}, {projection}: {percent(sparsity)}"))
            axes.add_patch(cell)
            if len(layers) <= WRITTEN_LAYERS:
                middle = (column_of[index] + 0.5, y + 0.52)
                colour = GROUND if _shade(sparsity, scale) > 0.62 else INK
                axes.annotate(percent(sparsity), middle, ha="center", va="center", fontsize=8, color=colour)
        axes.text(len(layers) + 0.3, y + 0.5, percent(fmean(row.values())), va="center", fontsize=8.5, color=INK)
    axes.text(len(layers) + 0.3, -0.1, "mean", va="bottom", fontsize=8.5, color=MUTED)
    axes.set_xlim(0, len(layers))
    axes.set_ylim(len(rows), 0)
    axes.set_yticks([y + 0.5 for y in range(len(rows))], _short_names(list(rows)))
    every = max(1, len(layers) // 16)
    axes.set_xticks([c + 0.5 for c in range(0, len(layers), every)], [str(i) for i in layers[::every]])
    axes.set_xlabel("layer")
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    _legend(legend, scale)
    return figure


def _shade(sparsity: float, scale: Limits) -> float:
    # Opacity over the ground rather than a colour map: it reads the same on a light and on a dark page.
    low, high = scale
    return 0.06 + 0.94 * (sparsity - low) / (high - low)


def _short_names(projections: list[str]) -> list[str]:
    short = [name.rsplit(".", 1)[-1] for name in projections]
    return short if len(set(short)) == len(short) else projections


def _legend(axes: Axes, scale: Limits) -> None:
    low, high = scale
    for cell in range(LEGEND_CELLS):
        sparsity = low + cell / (LEGEND_CELLS - 1) * (high - low)
        axes.add_patch(Rectangle((cell + 2, 0), 0.94, 1, facecolor=ACCENT, alpha=_shade(sparsity, scale)))
    axes.text(1.8, 0.5, percent(low, 0), ha="right", va="center", fontsize=8.5, color=MUTED)
    axes.text(LEGEND_CELLS + 2.2, 0.5, f"{percent(high, 0)} sparse", va="center", fontsize=8.5, color=MUTED)
    axes.set_xlim(0, 50)
    axes.set_ylim(0, 1)
    axes.set_axis_off()
