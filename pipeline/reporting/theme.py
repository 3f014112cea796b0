"""The colours of the report, once: figures use the light ones, the page exchanges them for CSS variables."""

from __future__ import annotations

from typing import Any

COLOURS = {
    # name: (light, dark). Figures are translated by value, so no two light colours may be equal.
    "ground": ("#ffffff", "#12151a"),
    "panel": ("#f6f7f9", "#1a1e25"),
    "line": ("#dde1e7", "#2d343e"),
    "faint": ("#a9b2bf", "#59636f"),
    "muted": ("#5d6775", "#98a3b1"),
    "ink": ("#1a1f26", "#e7eaee"),
    "accent": ("#2459c2", "#82acff"),
    "second": ("#b0561a", "#eba368"),
}

GROUND, LINE, FAINT, MUTED, INK, ACCENT, SECOND = (
    COLOURS[name][0] for name in ("ground", "line", "faint", "muted", "ink", "accent", "second")
)

STYLE: dict[Any, Any] = {
    "figure.facecolor": GROUND,
    "axes.facecolor": "none",
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlepad": 8,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "text.color": INK,
    "text.parse_math": False,
    "font.size": 9,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
}
