"""The sections of the page; each is empty when its part of the results is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import yaml

from pipeline.formatting import count, duration, percent, perplexity
from pipeline.reporting import pairs, summary, variant_columns
from pipeline.reporting.markup import definitions, details, escape, figure, section, table
from pipeline.reporting.plots.layers import is_uniform
from pipeline.results.schema import JsonRow, RunResults, Training

Figures = Mapping[str, str]
"""SVG by the names that ``make_figures`` gives."""

OPEN_FIGURES, OPEN_MASKS = 3, 1
"""Figures of one kind beyond these are folded away."""


def header(results: RunResults) -> str:
    """What was pruned and what came of it."""
    model = results.get("model", {})
    done, *verdicts = summary.headline(results)
    origin = [f"recipe {results['recipe']}" if "recipe" in results else "", _date(results.get("created", ""))]
    return f"""<header>
<p class="origin">{escape(" · ".join(part for part in origin if part))}</p>
<h1>{escape(model.get("name", "Pruning report"))}</h1>
{"".join(f'<p class="verdict">{escape(text)}</p>' for text in verdicts)}
<p class="done">{escape(done)}</p>
{_tiles(results)}
{_warnings(results.get("warnings", []))}
</header>"""


def results_section(results: RunResults, figures: Figures) -> str:
    """The table, perplexity and accuracy."""
    if not results.get("variants"):
        return ""
    context = f" Every row at context length {results['context_length']}." if "context_length" in results else ""
    note = f"{summary.notes(results)}{context} {summary.NO_SPEED_NOTE}"
    return section(
        "Results",
        results_table(results),
        f'<p class="note">{escape(note)}</p>',
        *differences_table(results),
        _figure(figures, "pareto", "What sparsity costs: perplexity by sparsity, one line a method."),
        _figure(figures, "perplexity", "Perplexity, lower is better. The stem is the distance from the dense model."),
        _figure(figures, "accuracy", "Zero-shot accuracy in percent, higher is better. Whiskers: one standard error."),
        tasks_table(results),
    )


def training_section(results: RunResults, figures: Figures) -> str:
    """The curves of every learned variant."""
    curves = results.get("training", {})
    parts = [(name, _figure(figures, f"training/{name}", _curves_caption(name, curves[name]))) for name in curves]
    return section("Learning the mask", *_folded(parts))


def speed_section(results: RunResults, figures: Figures) -> str:
    """What the zeros gain with our own kernels: the matrices, and decoding token by token."""
    measured = [v for _, group in summary.groups(results) for v in group if v.get("speed")]
    if not measured:
        return ""
    note = (
        f"Packed weights through the project's own kernels (leap.load_sparse), one row of x, in turn with the dense "
        f"model in one process. {summary.NO_SPEED_NOTE}"
    )
    caption = (
        "Speed-up by sparsity, up to the limit that the bytes of the weights set. Dots: the products with the model's "
        "matrices. Diamonds: decoding with the whole model. A dense product that does not keep up with memory can be "
        "beaten by more."
    )
    return section(
        "Speed",
        f'<p class="note">{escape(note)}</p>',
        _decode_table(measured),
        _figure(figures, "speed", caption),
        _matrices_table(measured),
        f'<p class="note">{escape(measured[0]["speed"].get("machine", ""))}</p>',
    )


def _decode_table(measured: list[JsonRow]) -> str:
    """Milliseconds a token and where they go, a row for each model."""
    headers = (
        "variant",
        "weights",
        "tokens/s",
        "ms a token",
        "pruned layers",
        "output head",
        "rest",
        "speed-up",
        "without the head",
    )
    rows = []
    for variant in measured:
        for dtype, found in variant["speed"]["decode"].items():
            for name in ("dense", "sparse"):
                time = found[name]
                gain, without = "", ""
                if name == "sparse":
                    gain = f"{found['speedup']:.2f} ({found['speedup_low']:.2f} to {found['speedup_high']:.2f})"
                    without = f"{found['speedup_without_head']:.2f}"
                parts = (f"{time[part]:.2f}" for part in ("token_ms", "linears_ms", "head_ms", "rest_ms"))
                rows.append(
                    [
                        escape(variant.get("name", "?")),
                        f"{dtype}, {'packed' if name == 'sparse' else name}",
                        f"{time['tokens_per_second']:.1f}",
                        *parts,
                        gain,
                        without,
                    ]
                )
    return table(headers, rows, text_columns=2)


def _matrices_table(measured: list[JsonRow]) -> str:
    headers = (
        "variant",
        "weights",
        "matrix",
        "layers",
        "sparsity",
        "dense, µs",
        "packed, µs",
        "speed-up",
        "limit by bytes",
        "of read bandwidth",
    )
    rows = [
        [
            escape(variant.get("name", "?")),
            m["dtype"],
            f"{m['shape'][0]} × {m['shape'][1]}",
            str(m["layers"]),
            percent(m["sparsity"]),
            f"{m['dense_us']:.1f}",
            f"{m['sparse_us']:.1f}",
            f"{m['speedup']:.2f}",
            f"{m['byte_limit']:.2f}",
            percent(m["bandwidth"], 0),
        ]
        for variant in measured
        for m in variant["speed"]["matrices"]
    ]
    return details("the matrices", table(headers, rows, text_columns=3))


def layers_section(results: RunResults, figures: Figures) -> str:
    """Where the zeros are."""
    pruned = [v for v in summary.pruned(results) if v.get("sparsity_per_layer")]
    # Learned maps first: they are what nobody chose by hand.
    mapped = sorted((v for v in pruned if not is_uniform(v)), key=lambda v: not summary.is_learned(v))
    uniform = [v.get("name", "?") for v in pruned if is_uniform(v)]
    parts = [(v.get("name", "?"), _figure(figures, f"layers/{v.get('name', '?')}", _map_caption(v))) for v in mapped]
    same = f"Equally sparse in every layer: {', '.join(uniform)}." if uniform else ""
    return section("Where the zeros are", f"<p>{escape(same)}</p>" if same else "", *_folded(parts))


def masks_section(results: RunResults, figures: Figures) -> str:
    """The masks themselves, reduced to pictures."""
    pruned = sorted(summary.pruned(results), key=lambda v: not summary.is_learned(v))
    parts = []
    for variant in pruned:
        name = variant.get("name", "?")
        caption = f"{name}: every pruned matrix, reduced to tiles; the stronger the colour, the more weights are kept."
        parts.append((name, _figure(figures, f"masks/{name}", caption)))
    return section("The masks", *_folded(parts, OPEN_MASKS))


def samples_section(results: RunResults) -> str:
    """What the variants make of the same prompts, side by side."""
    shown = [v for v in summary.variants(results) if v.get("samples")]
    if not shown:
        return ""
    # Dense and learned at the top, the rest folded away.
    first = [v for v in shown if v.get("target_sparsity") is None or summary.is_learned(v)]
    rest = [v for v in shown if v not in first]
    parts = []
    for number, sample in enumerate(shown[0]["samples"]):
        prompt = f'<p class="prompt">{escape(sample["prompt"])}</p>'
        others = details("the other variants", _continuations(rest, number)) if rest else ""
        parts.append(f'<div class="sample">{prompt}{_continuations(first, number)}{others}</div>')
    note = "The same prompt and the same draws for every variant; the text is what each model adds."
    return section("Generated text", f'<p class="note">{escape(note)}</p>', *parts)


def _continuations(variants: list[JsonRow], number: int) -> str:
    cards = "".join(
        f"<div><b>{escape(v.get('name', '?'))}</b><p>{escape(v['samples'][number]['continuation'])}</p></div>"
        for v in variants
    )
    return f'<div class="texts">{cards}</div>'


def stages_section(results: RunResults, figures: Figures) -> str:
    """Where the time went."""
    stages = results.get("stages", [])
    fresh = sum(stage.get("seconds", 0.0) for stage in stages if not stage.get("cached"))
    caption = f"The stages of this run took {duration(fresh)}."
    if any(stage.get("cached") for stage in stages):
        caption += " Pale: a result of an earlier run was used, which took that long then."
    return section("Time", _figure(figures, "stages", caption))


def calibration_section(results: RunResults) -> str:
    """The texts that the mask was made from."""
    splits = results.get("calibration", {})
    if not splits:
        return ""
    rows = [
        [
            escape(name),
            escape(split.get("source", "–")),
            *(count(n) for n in (split.get("documents"), split.get("tokens"), split.get("rows"))),
            count(split.get("dropped_tail_tokens")),
            count(split.get("tokens_per_second")),
        ]
        for name, split in splits.items()
    ]
    headers = ("split", "source", "documents", "tokens", "rows", "dropped tail tokens", "tokens/s")
    return section("Calibration data", table(headers, rows, text_columns=2))


def places_section(results: RunResults) -> str:
    """Where to find what was made."""
    return section("Artifacts and records", definitions(summary.places(results)))


def provenance_section(results: RunResults) -> str:
    """Environment and recipe, folded away."""
    folded = (("Environment", results.get("environment")), ("Resolved recipe", results.get("config")))
    return section("Provenance", *(details(name, f"<pre>{escape(_yaml(data))}</pre>") for name, data in folded if data))


def results_table(results: RunResults) -> str:
    """The table of variants, without the single tasks."""
    quality, cost = variant_columns.quality_columns(results), variant_columns.cost_columns(results)
    columns = [
        variant_columns.ASKED,
        variant_columns.REAL,
        variant_columns.OF_BLOCKS,
        *quality,
        variant_columns.WEIGHTS,
        variant_columns.SCOPE,
        *cost,
    ]
    return _variants_table("variant", results, columns)


def differences_table(results: RunResults) -> tuple[str, ...]:
    """The learned variants against layer-wise ones, and what the numbers are."""
    columns, rows = pairs.columns(results), pairs.rows(results)
    if not rows:
        return ()
    cells = [[escape(row.name), escape(row.base), *(_cell(c.text(row), best=False) for c in columns)] for row in rows]
    headers = ("difference of", "and", *(column.header for column in columns))
    return table(headers, cells, text_columns=2), f'<p class="note">{escape(pairs.NOTE)}</p>'


def tasks_table(results: RunResults) -> str:
    """The accuracy of the variants on each of several tasks; that of a single one is the mean already."""
    tasks = variant_columns.task_columns(results)
    return _variants_table("accuracy, %", results, tasks) if len(tasks) > 1 else ""


def _tiles(results: RunResults) -> str:
    model = results.get("model", {})
    dense = summary.dense_variant(results)
    tiles = [("parameters", count(model["parameters"]))] if "parameters" in model else []
    if "prunable_parameters" in model:
        tiles.append(("prunable", count(model["prunable_parameters"])))
    if (share := summary.prunable_share(results)) is not None:
        tiles.append(("of the decoder blocks’ weights prunable", percent(share)))
    if "context_length" in results:
        tiles.append(("tokens of context", str(results["context_length"])))
    dataset = next(iter(summary.datasets(results)), "")
    if (value := summary.perplexity_of(dense, dataset)) is not None:
        tiles.append((f"dense perplexity, {dataset}", perplexity(value)))
    if (accuracy := summary.mean_accuracy_of(dense)) is not None:
        tiles.append(("dense mean accuracy", percent(accuracy)))
    if revision := model.get("revision"):
        tiles.append(("revision", revision[:12]))
    cells = "".join(f"<div><b>{escape(value)}</b>{escape(name)}</div>" for name, value in tiles)
    return f'<div class="tiles">{cells}</div>' if cells else ""


def _warnings(warnings: list[str]) -> str:
    items = "".join(f"<li>{escape(text)}</li>" for text in warnings)
    return f'<div class="warnings"><b>Warnings</b><ul>{items}</ul></div>' if items else ""


def _variants_table(title: str, results: RunResults, columns: list[variant_columns.Column]) -> str:
    groups = summary.table_groups(results)
    variants = [
        (variant, index == 0 and number > 0, group)
        for number, group in enumerate(groups)
        for index, variant in enumerate(group)
    ]
    rows = [
        [
            escape(summary.title(variant)),
            *(_cell(column.text(variant), best=column.is_best(variant, group)) for column in columns),
        ]
        for variant, _, group in variants
    ]
    classes = [
        " ".join(name for name, holds in (("first", first), ("learned", summary.is_learned(variant))) if holds)
        for variant, first, _ in variants
    ]
    return table((title, *(column.header for column in columns)), rows, row_classes=classes)


def _cell(text: str, *, best: bool) -> str:
    value, plus_minus, error = escape(text).partition(" ± ")
    if best:
        value = f'<span class="best">{value}</span>'
    return f'{value}<span class="error">{plus_minus}{error}</span>' if error else value


def _curves_caption(name: str, curves: Training) -> str:
    steps, speed = curves.get("step", []), curves.get("tokens_per_second")
    length = f", {len(steps)} logged steps up to step {steps[-1]}" if steps else ""
    return f"{name}{length}{f', {count(speed)} tokens/s' if speed else ''}."


def _map_caption(variant: JsonRow) -> str:
    values = variant["sparsity_per_layer"].values()
    real = percent(variant.get("real_sparsity"), 2)
    return f"{variant.get('name')}: {real} in all, from {percent(min(values))} to {percent(max(values))} in one matrix."


def _figure(figures: Figures, name: str, caption: str) -> str:
    return figure(figures[name], caption) if name in figures else ""


def _folded(parts: list[tuple[str, str]], opened: int = OPEN_FIGURES) -> list[str]:
    shown = [(name, body) for name, body in parts if body]
    return [body for _, body in shown[:opened]] + [details(name, body) for name, body in shown[opened:]]


def _date(created: str) -> str:
    try:
        return f"{datetime.fromisoformat(created):%-d %B %Y, %H:%M}"
    except ValueError:
        return created


def _yaml(data: Any) -> str:
    # By way of JSON: YAML refuses subclasses of str, such as torch's version.
    return yaml.safe_dump(json.loads(json.dumps(data)), sort_keys=False, allow_unicode=True, width=110)
