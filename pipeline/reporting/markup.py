"""HTML from plain values, everything escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from itertools import zip_longest

__all__ = ["definitions", "details", "escape", "figure", "section", "table"]


def section(title: str, *parts: str) -> str:
    """A titled section, or nothing when it would be empty."""
    body = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>" if body else ""


def table(
    headers: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    text_columns: int = 1,
    row_classes: Iterable[str] = (),
) -> str:
    """A table of cells that are HTML already; the first ``text_columns`` columns are words, the others numbers."""
    kinds = ["" if i < text_columns else ' class="number"' for i in range(len(headers))]

    def line(tag: str, cells: Iterable[str]) -> str:
        return "".join(f"<{tag}{kind}>{cell}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))

    head = line("th", map(escape, headers))
    classes = [f' class="{name}"' if name else "" for name in row_classes]
    body = "\n".join(f"<tr{name}>{line('td', row)}</tr>" for row, name in zip_longest(rows, classes, fillvalue=""))
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def figure(svg: str, caption: str) -> str:
    """A figure with its caption above it, where it is read first."""
    return f'<figure><figcaption>{escape(caption)}</figcaption>\n<div class="wide">{svg}</div></figure>'


def details(summary: str, body: str) -> str:
    """Something folded away; ``body`` is HTML."""
    return f"<details><summary>{escape(summary)}</summary>\n{body}\n</details>"


def definitions(pairs: Iterable[tuple[str, str]]) -> str:
    """Names and values to copy, such as paths and commands."""
    items = "\n".join(f"<dt>{escape(name)}</dt><dd><code>{escape(value)}</code></dd>" for name, value in pairs)
    return f"<dl>\n{items}\n</dl>" if items else ""
