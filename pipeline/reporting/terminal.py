"""The report on a terminal: the verdict, the table of results, warnings, and where everything lies."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.reporting import summary, tables
from pipeline.reporting.schema import RunResults, Variant
from pipeline.reporting.tables import Column

GAP = 2


def print_report(results: RunResults, console: Console) -> None:
    """Print what the run found, in as many columns as the terminal has room for."""
    for sentence in summary.headline(results):
        console.print(Text(sentence))
    if results.get("variants"):
        console.print()
        console.print(results_table(results, console.width))
        console.print()
        console.print(Text(f"Bold: best at its sparsity. ±: one standard error. {summary.NO_SPEED_NOTE}", style="dim"))
    for warning in results.get("warnings", []):
        console.print(Text.assemble(("warning: ", "bold yellow"), warning))
    for name, place in summary.places(results):
        # Never broken over lines: paths and commands are there to be copied.
        console.print(Text.assemble((f"{name}: ", "dim"), place), soft_wrap=True)


def results_table(results: RunResults, width: int) -> Table:
    """The table of results with the columns that fit in ``width``; the variant and its quality always stay."""
    groups = summary.table_groups(results)
    columns = _fitting(results, [variant for group in groups for variant in group], width)
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="dim")
    table.add_column("variant")
    for column in columns:
        table.add_column(column.header, justify="right", no_wrap=True)
    for number, group in enumerate(groups):
        if number:
            table.add_row()
        best = [column.best(group) for column in columns]
        for variant in group:
            cells = [
                Text(column.text(variant), style="bold" if b is not None and column.value(variant) == b else "")
                for column, b in zip(columns, best, strict=True)
            ]
            style = "cyan" if summary.is_learned(variant, results) else ""
            table.add_row(Text(variant.get("name", "?"), style=style), *cells)
    return table


def _fitting(results: RunResults, variants: list[Variant], width: int) -> list[Column]:
    quality, tasks = tables.quality_columns(results), tables.task_columns(results)
    cost = tables.cost_columns(results)
    single = [[column] for column in (*cost, tables.WEIGHTS, tables.ASKED, tables.SCOPE)]
    left = width - max(len(variant.get("name", "?")) for variant in variants)
    chosen = []
    # The most telling first; a part of the tasks would only mislead, so it is all of them or none.
    for group in (quality, [tables.REAL], tasks, *single):
        needs = sum(GAP + max(len(c.header), *(len(c.text(variant)) for variant in variants)) for c in group)
        if group is quality or needs <= left:
            chosen += group
            left -= needs
    shown = [tables.ASKED, tables.REAL, *quality, *tasks, tables.WEIGHTS, tables.SCOPE, *cost]
    return [column for column in shown if column in chosen]
