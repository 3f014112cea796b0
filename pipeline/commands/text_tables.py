"""Tables on the terminal, and what stands in several of them."""

from __future__ import annotations

from rich.table import Table

from pipeline.config import RunConfig


def plain_table(*columns: str) -> Table:
    """A table without lines; a column whose header begins with > is set to the right."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for header in columns:
        right = header.startswith(">")
        table.add_column(header.removeprefix(">"), justify="right" if right else "left", no_wrap=right)
    return table


def sparsities(config: RunConfig) -> str:
    """A recipe's sparsities as one cell."""
    return ", ".join(f"{s:g}" for s in config.sparsities)
