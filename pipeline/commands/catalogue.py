"""What the command line lists: the recipes, and the fields of a recipe.

These answers cost no import of torch or Ray.
"""

from __future__ import annotations

from typing import Any

import yaml
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from pipeline.commands.text_tables import plain_table, sparsities
from pipeline.config import recipe
from pipeline.config.fields import SECTION, all_fields


def list_recipes() -> None:
    """The recipes with their model, sparsities and purpose."""
    table = plain_table("recipe", "model", "sparsities", "why")
    for column in table.columns[:2]:
        column.no_wrap = True  # names are to be copied
    for name in recipe.names():
        config = recipe.load(name)
        table.add_row(Text(name, style="bold"), config.model.source, sparsities(config), config.why)
    Console().print(table)


def list_fields() -> None:
    """Every field of a recipe: dotted name, type, default and meaning."""
    console = Console()
    for field in all_fields():
        if field.type.startswith(SECTION):
            optional = "" if field.type == SECTION else "  (or null)"
            console.print()
            console.print(Text.assemble((field.name, "bold cyan"), (optional, "dim")))
        else:
            default = yaml.safe_dump(_plain(field.default), default_flow_style=True, width=1000).removesuffix("...\n")
            line = Text.assemble((field.name, "bold"), "  ", (field.type, "green"), (f" = {default.strip()}", "dim"))
            console.print(line, soft_wrap=True)  # one field, one line: so that it can be searched for
        console.print(Padding(Text(field.help.replace("``", "`")), (0, 0, 0, 4), expand=False))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
