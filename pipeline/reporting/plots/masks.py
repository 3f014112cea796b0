"""Pictures of the masks: a small one for each pruned matrix, a row for each projection, a column for each layer."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from pipeline.reporting.formatting import percent
from pipeline.reporting.plots.layers import place_of
from pipeline.reporting.schema import Variant
from pipeline.reporting.theme import ACCENT, INK, MUTED

PIXELS = 24
GAP = 3
SHARE_SHOWN = 98.0
"""Percent of the tiles that the colour scale tells apart; the rest, at both ends, is cut off."""


def masks_figure(variant: Variant) -> Figure | None:
    """The masks of one variant; opacity stands for the share of kept weights."""
    cells = {place_of(name): np.asarray(tiles) for name, tiles in variant.get("mask_map", {}).items()}
    placed = {place: tiles for place, tiles in cells.items() if place is not None}
    if not placed:
        return None
    projections = list(dict.fromkeys(projection for projection, _ in placed))
    layers = sorted({layer for _, layer in placed})
    values = np.concatenate([tiles.ravel() for tiles in placed.values()])
    low, high = np.percentile(values, [(100 - SHARE_SHOWN) / 2, (100 + SHARE_SHOWN) / 2])
    step = PIXELS + GAP
    sheet = np.zeros((len(projections) * step - GAP, len(layers) * step - GAP, 4))
    sheet[..., :3] = to_rgb(ACCENT)
    for (projection, layer), tiles in placed.items():
        y, x = projections.index(projection) * step, layers.index(layer) * step
        height, width = tiles.shape
        alpha = 0.04 + 0.96 * np.clip((tiles - low) / max(high - low, 1e-6), 0, 1)
        top, left = y + (PIXELS - height) // 2, x + (PIXELS - width) // 2
        sheet[top : top + height, left : left + width, 3] = alpha
    # Wide models fill the page; small ones stay small enough for their tiles to be seen as tiles.
    width = min(10.0, 2.0 + 1.1 * len(layers))
    inches = (width - 2.0) / len(layers)
    figure = Figure(figsize=(10, inches * len(projections) + 0.9), layout="constrained")
    axes = figure.subplots()
    image: AxesImage = axes.imshow(sheet, interpolation="nearest", aspect="equal")
    image.set_rasterized(True)
    centres = [i * step + PIXELS / 2 - 0.5 for i in range(max(len(projections), len(layers)))]
    every = math.ceil(len(layers) / 16)
    axes.set_xticks(centres[: len(layers) : every], [str(layer) for layer in layers[::every]])
    axes.set_yticks(centres[: len(projections)], [name.rsplit(".", 1)[-1] for name in projections])
    axes.set_xlabel("layer")
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set_title(
        f"pale: at most {percent(float(low), 0)} kept · strong: at least {percent(float(high), 0)} kept · "
        "down: outputs, across: inputs",
        fontsize=8.5, fontweight="normal", color=MUTED,
    )  # fmt: skip
    for label in axes.get_yticklabels():
        label.set_color(INK)
    return figure
