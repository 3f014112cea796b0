"""Names at the ends of lines, in place of a legend."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes

GAP = 0.085
"""Least distance between two names, as a fraction of the panel's height."""

End = tuple[str, float, float, str]
"""Name, where its line ends (x, y), colour."""


def spread(axes: Axes, ends: Sequence[End]) -> None:
    """Write the names at the right of ``axes`` at the heights of the ends, moved apart where these meet."""
    axes.autoscale_view()  # Limits are settled only when drawing, too late for the transform below.
    to_axes = axes.transData + axes.transAxes.inverted()
    floor = 0.0
    for height, name, colour in sorted(
        (float(to_axes.transform((x, y))[1]), name, colour) for name, x, y, colour in ends
    ):
        height = max(height, floor)
        axes.annotate(
            name, (1.02, height), xycoords="axes fraction", va="center", fontsize=8.5,
            color=colour, annotation_clip=False,
        )  # fmt: skip
        floor = height + GAP
