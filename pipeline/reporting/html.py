"""The report as one page that needs nothing besides itself: no network, no scripts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from pipeline.artifacts.store import write_atomically
from pipeline.reporting import page_parts
from pipeline.reporting.css import stylesheet
from pipeline.reporting.markup import escape
from pipeline.reporting.svg import inline_svg
from pipeline.results.schema import RunResults


def render_page(results: RunResults, figures: Mapping[str, Figure]) -> str:
    """The page as text; ``figures`` are those of ``make_figures``."""
    svgs = {name: inline_svg(figure, name) for name, figure in figures.items()}
    parts = (
        page_parts.header(results),
        page_parts.results_section(results, svgs),
        page_parts.training_section(results, svgs),
        page_parts.speed_section(results, svgs),
        page_parts.layers_section(results, svgs),
        page_parts.masks_section(results, svgs),
        page_parts.samples_section(results),
        page_parts.stages_section(results, svgs),
        page_parts.calibration_section(results),
        page_parts.places_section(results),
        page_parts.provenance_section(results),
    )
    name = results.get("model", {}).get("name", "model")
    return page(f"{name}: pruning report", "\n".join(part for part in parts if part))


def page(title: str, body: str) -> str:
    """A whole page around ``body``, which is HTML."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>
{stylesheet()}
</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def write_page(results: RunResults, figures: Mapping[str, Figure], path: Path) -> Path:
    """Write the page to ``path``, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, render_page(results, figures))
    return path
