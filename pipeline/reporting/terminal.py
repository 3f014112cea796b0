"""The report on a terminal: the verdict, the table of results, warnings, and where everything lies."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.reporting import pairs, summary, variant_columns
from pipeline.reporting.variant_columns import Column
from pipeline.results.schema import JsonRow, RunResults

GAP = 2


def print_report(results: RunResults, console: Console) -> None:
    """Print what the run found, in as many columns as the terminal has room for."""
    for sentence in summary.headline(results):
        console.print(Text(sentence))
    if results.get("variants"):
        console.print()
        console.print(results_table(results, console.width))
        console.print()
        console.print(Text(f"{summary.notes(results)} {summary.NO_SPEED_NOTE}", style="dim"))
    if rows := pairs.rows(results):
        console.print()
        console.print(differences_table(results, rows, console.width))
        console.print()
        console.print(Text(pairs.NOTE, style="dim"))
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
        for variant in group:
            cells = [
                Text(column.text(variant), style="bold" if column.is_best(variant, group) else "") for column in columns
            ]
            style = "cyan" if summary.is_learned(variant) else ""
            table.add_row(Text(summary.title(variant), style=style), *cells)
    return table


def differences_table(results: RunResults, rows: list[pairs.Pair], width: int) -> Table:
    """The table of differences with the columns that fit in ``width``; the single tasks go first."""
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="dim")
    left = width
    for header, texts in (("difference of", [row.name for row in rows]), ("and", [row.base for row in rows])):
        table.add_column(header, no_wrap=True)
        left -= max(map(len, (header, *texts))) + GAP
    columns = []
    for column in pairs.columns(results):
        left -= max(len(column.header), *(len(column.text(row)) for row in rows)) + GAP
        if left >= -GAP:  # nothing follows the last one
            columns.append(column)
    for column in columns:
        table.add_column(column.header, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(Text(row.name, style="cyan"), row.base, *(column.text(row) for column in columns))
    return table


def _fitting(results: RunResults, variants: list[JsonRow], width: int) -> list[Column]:
    quality, tasks = variant_columns.quality_columns(results), variant_columns.task_columns(results)
    cost = variant_columns.cost_columns(results)
    single = [[column] for column in (variant_columns.SCOPE, variant_columns.WEIGHTS, *cost, variant_columns.ASKED)]
    left = width - max(len(summary.title(variant)) for variant in variants)
    chosen = []
    # The most telling first; a part of the tasks would only mislead, so it is all of them or none.
    for group in (quality, [variant_columns.REAL, variant_columns.OF_BLOCKS], tasks, *single):
        needs = sum(GAP + max(len(c.header), *(len(c.text(variant)) for variant in variants)) for c in group)
        if group is quality or needs <= left:
            chosen += group
            left -= needs
    shown = [
        variant_columns.ASKED,
        variant_columns.REAL,
        variant_columns.OF_BLOCKS,
        *quality,
        *tasks,
        variant_columns.WEIGHTS,
        variant_columns.SCOPE,
        *cost,
    ]
    return [column for column in shown if column in chosen]
