"""Pictures of the masks: a small one for each pruned matrix, a row for each projection, a column for each layer."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from pipeline.formatting import percent
from pipeline.reporting.plots.layers import place_of
from pipeline.reporting.theme import ACCENT, INK, MUTED
from pipeline.results.schema import JsonRow

PIXELS = 24
GAP = 3
SHARE_SHOWN = 98.0
"""Percent of the tiles that the colour scale tells apart; the rest, at both ends, is cut off."""


def masks_figure(variant: JsonRow) -> Figure | None:
    """The masks of one variant; opacity stands for the share of kept weights."""
    cells = {place_of(name): np.asarray(tiles) for name, tiles in variant.get("mask_map", {}).items()}
    placed = {place: tiles for place, tiles in cells.items() if place is not None}
    if not placed:
        return None
    projections = list(dict.fromkeys(projection for projection, _ in placed))
    layers = sorted({layer for _, layer in placed})
    # The longer of the two lies across, where the page has room.
    upright = len(layers) < len(projections)
    down, across = (len(layers), len(projections)) if upright else (len(projections), len(layers))
    values = np.concatenate([tiles.ravel() for tiles in placed.values()])
    low, high = np.percentile(values, [(100 - SHARE_SHOWN) / 2, (100 + SHARE_SHOWN) / 2])
    step = PIXELS + GAP
    sheet = np.zeros((down * step - GAP, across * step - GAP, 4))
    sheet[..., :3] = to_rgb(ACCENT)
    for (projection, layer), tiles in placed.items():
        row, column = projections.index(projection), layers.index(layer)
        row, column = (column, row) if upright else (row, column)
        top, left = (at * step + (PIXELS - side) // 2 for at, side in zip((row, column), tiles.shape, strict=True))
        alpha = 0.04 + 0.96 * np.clip((tiles - low) / max(high - low, 1e-6), 0, 1)
        sheet[top : top + tiles.shape[0], left : left + tiles.shape[1], 3] = alpha
    figure = Figure(figsize=(10, min(8.8 / across, 1.25) * down + 0.9), layout="constrained")
    axes = figure.subplots()
    image: AxesImage = axes.imshow(sheet, interpolation="nearest", aspect="equal")
    image.set_rasterized(True)
    every = math.ceil(len(layers) / 16)
    numbers = [(_centre(i), str(layer)) for i, layer in enumerate(layers)][::every]
    names = [(_centre(i), name.rsplit(".", 1)[-1]) for i, name in enumerate(projections)]
    axes.set_xticks(*zip(*(names if upright else numbers), strict=True))
    axes.set_yticks(*zip(*(numbers if upright else names), strict=True))
    (axes.set_ylabel if upright else axes.set_xlabel)("layer")
    axes.tick_params(length=0, labelcolor=INK)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set_title(
        f"pale: at most {percent(float(low), 0)} kept · strong: at least {percent(float(high), 0)} kept · "
        "down: outputs, across: inputs",
        fontsize=8.5, fontweight="normal", color=MUTED,
    )  # fmt: skip
    return figure


def _centre(cell: int) -> float:
    return cell * (PIXELS + GAP) + PIXELS / 2 - 0.5
