"""Matplotlib figures as SVG that belongs to the page: its font, its colours, light or dark, no outside references."""

from __future__ import annotations

import html
import io
import re
from itertools import count
from urllib.parse import quote, unquote

import matplotlib
from matplotlib.figure import Figure

from pipeline.reporting import theme

TOOLTIP = "tooltip-"
FONT = "DejaVu Sans"
"""Ships with matplotlib, which measures texts with it; the page draws them in its own."""
_serial = count()


def tooltip(text: str) -> str:
    """A ``gid`` for an artist, which becomes a text shown when the pointer rests on it."""
    # Quoted, because matplotlib writes ids as they are; numbered, because ids must differ.
    return f"{TOOLTIP}{next(_serial)}-{quote(text, safe='')}"


def inline_svg(figure: Figure, title: str) -> str:
    """``figure`` as an ``<svg>`` element whose colours are the page's CSS variables; ``title`` is read to the blind."""
    buffer = io.StringIO()
    # The salt makes the ids that remain differ between the figures of a page.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.sans-serif": [FONT]}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(rf'<g id="{TOOLTIP}\d+-([^"]*)">', lambda m: f"<g><title>{_text(m[1])}</title>", svg)
    referenced = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', svg))
    kept = {name for pair in referenced for name in pair if name}
    svg = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in kept else "", svg)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = svg.replace(f"'{FONT}', sans-serif", "var(--font)")
    for name, (light, _) in theme.COLOURS.items():
        svg = svg.replace(light, f"var(--{name})")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(title)}" ', 1).strip()


def _text(quoted: str) -> str:
    return html.escape(unquote(quoted))
