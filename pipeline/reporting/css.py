"""The page's style sheet."""

from __future__ import annotations

from pipeline.reporting.theme import COLOURS


def stylesheet() -> str:
    """The rules, with the theme's colours as variables: light, and dark where the reader's system asks for it."""
    light, dark = (" ".join(f"--{name}: {colours[index]};" for name, colours in COLOURS.items()) for index in range(2))
    return (
        f":root {{ color-scheme: light dark; {light} {FONTS} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n{RULES}"
    )


FONTS = (
    '--font: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; '
    "--mono: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;"
)

RULES = """
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.55 var(--font); }
main { max-width: 1040px; margin: 0 auto; padding: 48px 32px 72px; }
header .origin { color: var(--muted); font-size: 13px; margin: 0 0 6px; }
h1 { font-size: 27px; line-height: 1.25; letter-spacing: -0.01em; margin: 0 0 14px; font-weight: 650; }
header p.verdict { font-size: 17px; line-height: 1.5; margin: 0 0 8px; max-width: 54em; }
header p.done { color: var(--muted); margin: 0 0 8px; max-width: 60em; }
.tiles { display: flex; flex-wrap: wrap; gap: 14px 40px; margin: 24px 0 0; padding: 16px 0;
  border: solid var(--line); border-width: 1px 0; }
.tiles div { font-size: 13px; color: var(--muted); }
.tiles b { display: block; font-size: 19px; font-weight: 600; color: var(--ink); font-variant-numeric: tabular-nums; }
section { margin-top: 44px; }
h2 { font-size: 19px; font-weight: 620; margin: 0 0 12px; }
figure + .wide { margin-top: 18px; }
section > p { margin: 8px 0; max-width: 60em; }
p.note { color: var(--muted); font-size: 13.5px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 500; color: var(--muted); vertical-align: bottom; }
th, td { padding: 5px 0 5px 18px; }
th:first-child, td:first-child { padding-left: 0; }
td { border-top: 1px solid var(--line); white-space: nowrap; }
.number { text-align: right; }
td .error { color: var(--muted); }
tr.first td { border-top: 2px solid var(--faint); }
tr.learned td:first-child { color: var(--accent); font-weight: 600; }
td .best { font-weight: 680; }
figure { margin: 26px 0 0; }
figcaption { font-size: 13.5px; color: var(--muted); margin-bottom: 6px; max-width: 62em; }
svg { display: block; max-width: 100%; min-width: 640px; height: auto; }
.sample { margin: 22px 0 0; }
.sample .prompt { font-family: var(--mono); font-size: 12.5px; white-space: pre-wrap; margin: 0 0 8px;
  padding: 8px 12px; border-left: 3px solid var(--faint); color: var(--muted); }
.texts { display: grid; grid-template-columns: repeat(auto-fit, minmax(270px, 1fr)); gap: 12px; }
.texts div { background: var(--panel); padding: 10px 12px; border-radius: 4px; min-width: 0; }
.texts b { font-size: 13px; color: var(--accent); }
.texts p { font-family: var(--mono); font-size: 12.5px; line-height: 1.5; white-space: pre-wrap; margin: 4px 0 0;
  overflow-wrap: anywhere; }
.warnings { border-left: 3px solid var(--second); background: var(--panel); padding: 10px 16px; margin: 24px 0 0; }
.warnings ul { margin: 0; padding-left: 18px; }
.warnings b { color: var(--second); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 20px; margin: 8px 0; font-size: 13.5px; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; }
code, pre { font-family: var(--mono); font-size: 12.5px; }
pre { background: var(--panel); padding: 14px 16px; overflow-x: auto; margin: 8px 0 0; line-height: 1.5; }
details { margin-top: 14px; }
summary { cursor: pointer; color: var(--accent); font-size: 14px; }
/* Pictures of masks are pixels, which know no variables. */
@media (prefers-color-scheme: dark) { svg image { filter: brightness(1.5) saturate(0.75); } }
@media (max-width: 640px) { main { padding: 24px 16px 48px; } dl { grid-template-columns: 1fr; } }
"""
