"""What sparsity gains: speed-up against sparsity, under the limit that the bytes of the weights set."""

from __future__ import annotations

from leap_kernels.bmp128 import byte_limit
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from pipeline.formatting import percent
from pipeline.reporting.plots.labels import spread
from pipeline.reporting.svg import tooltip
from pipeline.reporting.theme import ACCENT, FAINT, INK, MUTED
from pipeline.results.schema import JsonRow, RunResults

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
STEPS = 60
"""Points that the limit's curve is drawn through."""


def speed_figure(results: RunResults) -> Figure | None:
    """A panel for each number type: a dot for each matrix shape, a diamond for decoding with the whole model."""
    measured = [v for v in results.get("variants", []) if v.get("speed")]
    dtypes = list(dict.fromkeys(dtype for v in measured for dtype in v["speed"]["decode"]))
    if not dtypes:
        return None
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    grid = figure.subplots(1, max(2, len(dtypes)), squeeze=False)[0]
    for axes, dtype in zip(grid, dtypes, strict=False):
        _draw(axes, measured, dtype)
    for axes in grid[len(dtypes) :]:
        axes.remove()
    return figure


def _draw(axes: Axes, measured: list[JsonRow], dtype: str) -> None:
    axes.set_title(dtype)
    axes.set_xlabel("weights removed, %")
    axes.set_ylabel("speed-up over dense")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:g}"))
    sparsities = [m["sparsity"] for v in measured for m in v["speed"]["matrices"] if m["dtype"] == dtype]
    low, high = min(sparsities) - 0.05, min(0.99, max(sparsities) + 0.05)
    xs = [low + (high - low) * i / STEPS for i in range(STEPS + 1)]
    limit = [byte_limit(x, ITEMSIZE[dtype]) for x in xs]
    axes.plot(xs, limit, color=MUTED, linewidth=1.2)
    axes.axhline(1, color=FAINT, linewidth=1, linestyle=(0, (3, 3)))
    ends = [("limit by bytes", high, limit[-1], MUTED), ("dense", high, 1.0, MUTED)]
    for variant in measured:
        name, speed = variant.get("name", "?"), variant["speed"]
        for matrix in speed["matrices"]:
            if matrix["dtype"] == dtype:
                rows, columns = matrix["shape"]
                text = f"{name}, {rows} × {columns}, {percent(matrix['sparsity'])}: {matrix['speedup']:.2f} ×"
                _point(axes, matrix["sparsity"], matrix["speedup"], "o", INK, text)
        decode = speed["decode"][dtype]
        text = f"{name}, decoding: {decode['speedup']:.2f} ×"
        _point(axes, variant.get("real_sparsity", 0.0), decode["speedup"], "D", ACCENT, text)
    axes.set_xlim(low, high)
    axes.set_ylim(bottom=0)
    spread(axes, ends)


def _point(axes: Axes, x: float, y: float, marker: str, colour: str, text: str) -> None:
    (dot,) = axes.plot([x], [y], marker, color=colour, markersize=5, markeredgewidth=0)
    dot.set_gid(tooltip(text))
