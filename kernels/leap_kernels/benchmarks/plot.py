"""Speed-up against sparsity with the limit that bytes set."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from leap_kernels.bmp128 import byte_limit

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One panel for each (device, shape, batch, dtype) among the harness's rows, a line for each kernel, as a PNG."""
    from matplotlib.figure import Figure  # no dependency of the package; only this needs it

    panels: dict[tuple[Any, ...], dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        key = (row["device"], row["out"], row["in"], row["batch"], row["dtype"], row["mask"])
        if row["kernel"] != "dense F.linear" and row["speedup"] != "":
            points = panels.setdefault(key, {}).setdefault(row["kernel"], [])
            points.append((row["sparsity"], row["speedup"]))
    figure = Figure(figsize=(10, 3.2 * -(-len(panels) // 2)), layout="constrained")
    grid = figure.subplots(-(-len(panels) // 2), 2, squeeze=False)
    for axes, (key, lines) in zip(grid.flat, panels.items(), strict=False):
        device, out, columns, batch, dtype, mask = key
        axes.set_title(f"{out} × {columns}, batch {batch}, {dtype}, {mask} mask\n{device}", fontsize=9)
        for kernel, points in lines.items():
            axes.plot(*zip(*sorted(points), strict=True), "o-", label=kernel, markersize=4)
        highest = max(x for points in lines.values() for x, _ in points)
        xs = [0.4 + (highest - 0.4) * i / 50 for i in range(51)]
        axes.plot(xs, [byte_limit(x, ITEMSIZE[dtype]) for x in xs], "k--", linewidth=1, label="limit by bytes (BMP128)")
        axes.axhline(1, color="0.7", linewidth=0.8)
        axes.set_xlabel("sparsity")
        axes.set_ylabel("speed-up over F.linear")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=7)
    for axes in list(grid.flat)[len(panels) :]:
        axes.remove()
    figure.savefig(path, dpi=120)
