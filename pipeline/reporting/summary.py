"""What the numbers say: the comparisons that the headline, tables and plots share."""

from __future__ import annotations

import math
from typing import Literal

from pipeline.formatting import count, percent, perplexity, points, short_percent
from pipeline.results.schema import JsonRow, RunResults

MeanKey = Literal["mean_accuracy", "mean_above_chance"]

NO_SPEED_NOTE = (
    "Stock inference engines load the export (dense, with zeros) like any other model and gain no speed from its zeros."
)


def dense_variant(results: RunResults) -> JsonRow | None:
    """The unpruned model, if it was measured."""
    return next((v for v in results.get("variants", []) if v.get("target_sparsity") is None), None)


def variants(results: RunResults) -> list[JsonRow]:
    """The variants that were made and measured, without the means over seeds."""
    return [v for v in results.get("variants", []) if "seeds" not in v]


def groups(results: RunResults) -> list[tuple[float, list[JsonRow]]]:
    """The rows of pruned variants by asked sparsity, lowest first; within one, as they were given, learned ones last.

    Variants that differ in their seed alone are represented by their mean.
    """
    by_target: dict[float, list[JsonRow]] = {}
    for variant in results.get("variants", []):
        target = variant.get("target_sparsity")
        if target is not None and "mean" not in variant:
            by_target.setdefault(target, []).append(variant)
    return [(target, sorted(by_target[target], key=lambda v: is_learned(v))) for target in sorted(by_target)]


def pruned(results: RunResults) -> list[JsonRow]:
    """The pruned variants that were made, in the order of ``groups``."""
    made = [v for v in variants(results) if v.get("target_sparsity") is not None]
    return sorted(made, key=lambda v: (v["target_sparsity"], is_learned(v)))


def table_groups(results: RunResults) -> list[list[JsonRow]]:
    """The rows of a table: the dense model, of each run where there are several, then the groups."""
    dense = [v for v in results.get("variants", []) if v.get("target_sparsity") is None]
    return ([dense] if dense else []) + [group for _, group in groups(results)]


def is_learned(variant: JsonRow) -> bool:
    """Whether the mask was trained, with or without new weights made for it."""
    return variant.get("origin") in ("learned", "fitted")


def label(variant: JsonRow) -> str:
    """The variant's name without its sparsity, which its group tells."""
    return title(variant, variant.get("name", "?").rsplit("@", 1)[0])


def title(variant: JsonRow, name: str | None = None) -> str:
    """The variant's name, or ``name``, and of how many seeds it is the mean."""
    seeds = f" ({len(variant['seeds'])} seeds)" if "seeds" in variant else ""
    return f"{name or variant.get('name', '?')}{seeds}"


def datasets(results: RunResults) -> list[str]:
    """The data sets that any variant's perplexity was measured on, in order of appearance."""
    return list(dict.fromkeys(name for v in results.get("variants", []) for name in v.get("perplexity", {})))


def tasks(results: RunResults) -> list[str]:
    """The tasks that any variant was evaluated on, in order of appearance."""
    return list(dict.fromkeys(name for v in results.get("variants", []) for name in v.get("tasks", {})))


def error_nll_of(variant: JsonRow, dataset: str) -> float:
    """What ± means for the mean negative log-likelihood: its standard error; the deviation between several seeds."""
    if "spread" in variant:
        return variant["spread"].get("nll", {}).get(dataset, 0.0)
    return variant.get("perplexity", {}).get(dataset, {}).get("stderr_nll") or 0.0


def error_of_task(variant: JsonRow, task: str) -> float:
    """The same for the accuracy on a task."""
    if "spread" in variant:
        return variant["spread"].get("tasks", {}).get(task, 0.0)
    return variant.get("tasks", {}).get(task, {}).get("acc_stderr") or 0.0


def error_of_mean(variant: JsonRow, key: MeanKey = "mean_accuracy") -> float:
    """The same for a mean over tasks."""
    if "spread" in variant:
        return variant["spread"].get(key, 0.0)
    return (variant.get(key) or {}).get("stderr") or 0.0


def perplexity_of(variant: JsonRow | None, dataset: str) -> float | None:
    """The perplexity, if there is one."""
    return (variant or {}).get("perplexity", {}).get(dataset, {}).get("perplexity")


def mean_accuracy_of(variant: JsonRow | None, key: MeanKey = "mean_accuracy") -> float | None:
    """The mean accuracy over all tasks or over those above chance, if there is one."""
    return ((variant or {}).get(key) or {}).get("acc")


def above_chance(results: RunResults) -> list[str]:
    """The tasks that the mean above chance is over; none where that is no other mean than the one over all tasks."""
    clear = results.get("clear_tasks", [])
    return clear if len(clear) < len(tasks(results)) else []


def prunable_share(results: RunResults) -> float | None:
    """Which share of the decoder blocks' weights is prunable, if that is known."""
    model = results.get("model", {})
    if not model.get("block_parameters") or "prunable_parameters" not in model:
        return None
    return model["prunable_parameters"] / model["block_parameters"]


def notes(results: RunResults) -> str:
    """What has to be known to read the table."""
    parts = ["Bold: best at its sparsity. ±: one standard error."]
    if prunable_share(results) is not None:
        parts.append(
            "Sparsity, asked and real: of the prunable weights; of blocks: of all weights of the decoder blocks."
        )
    if any("seeds" in v for v in results.get("variants", [])):
        parts.append("(3 seeds): mean over that many seeds, ± their standard deviation; perplexity: geometric mean.")
    if clear := above_chance(results):
        parts.append(
            f"“Above chance”: mean over {_and(clear)}, where the dense model is more than two standard errors above "
            "guessing among the choices."
        )
    return " ".join(parts)


def headline(results: RunResults) -> list[str]:
    """What was done, then for each sparsity how the best learned mask compares with the best of the layer-wise."""
    verdicts = [_verdict(results, target, group) for target, group in groups(results)]
    return [_what_was_done(results), *(verdict for verdict in verdicts if verdict)]


def places(results: RunResults) -> list[tuple[str, str]]:
    """What lies where: the variants' directories, then the records."""
    directories = [(v.get("name", "?"), v["directory"]) for v in variants(results) if v.get("directory")]
    tracking = results.get("tracking", {})
    named = (
        ("tracking", tracking.get("uri")),
        ("run", tracking.get("run_id")),
        ("browse it", tracking.get("ui_command")),
        ("records", tracking.get("records")),
        ("note", tracking.get("note")),
    )
    return directories + [(name, value) for name, value in named if value]


def _what_was_done(results: RunResults) -> str:
    model = results.get("model", {})
    name = model.get("name", "The model")
    by_target = groups(results)
    if not by_target:
        return f"{name}: no pruned variant has been measured yet."
    targets = _and([short_percent(target) for target, _ in by_target])
    methods = _and(list(dict.fromkeys(label(v) for _, group in by_target for v in group)))
    prunable = model.get("prunable_parameters")
    of_what = f" of its {count(prunable)} prunable weights" if prunable else ""
    if (share := prunable_share(results)) is not None:
        of_what += f", which are {percent(share)} of the decoder blocks’ weights"
    return f"{name} was pruned to {targets} sparsity{of_what}, by {methods}."


def _verdict(results: RunResults, target: float, group: list[JsonRow]) -> str | None:
    metric = next(iter(datasets(results)), None)
    if metric is None:
        return None
    learned = _best([v for v in group if is_learned(v)], metric)
    prior = _best([v for v in group if not is_learned(v)], metric)
    best = learned or prior
    if best is None:
        return None
    text = f"At {short_percent(target)} sparsity {_named(best)} reaches perplexity {_ppl(best, metric)} on {metric}"
    dense = dense_variant(results)
    if perplexity_of(dense, metric) is not None:
        text += f" (dense {_ppl(dense, metric)})"
    if learned is None or prior is None:
        return f"{text}{_accuracy_clause(best, dense, 'the dense model')}."
    ours, theirs = perplexity_of(learned, metric), perplexity_of(prior, metric)
    assert ours is not None
    assert theirs is not None
    change = ours / theirs - 1
    relation = f"{abs(100 * change):.1f} % {'below' if change < 0 else 'above'}"
    text += f", {relation} the best layer-wise method, {_named(prior)}, at {_ppl(prior, metric)}"
    text += _gap_clause(learned, prior, metric)
    return f"{text}{_accuracy_clause(learned, prior, label(prior))}."


def _gap_clause(variant: JsonRow, base: JsonRow, metric: str) -> str:
    difference = variant.get("against", {}).get(base.get("name", ""))
    gap = difference["nll"].get(metric) if difference else None
    if gap is None or "gap_closed" not in gap:
        return ""
    shares = f"{100 * gap['gap_closed']:.0f} % of its gap to the dense model"
    return f", which is {shares} ({100 * gap['gap_closed_nats']:.0f} % in nats)"


def _accuracy_clause(variant: JsonRow, other: JsonRow | None, other_name: str) -> str:
    ours, theirs = mean_accuracy_of(variant), mean_accuracy_of(other)
    if ours is None:
        return ""
    text = f"; mean accuracy {percent(ours)}"
    if theirs is None or other is None:
        return text
    text += f" against {percent(theirs)} for {other_name}"
    difference = variant.get("against", {}).get(other.get("name", ""))
    paired = difference["mean_accuracy"] if difference else None
    if not paired or paired["stderr"] is None:
        return text
    apart = "a difference within two standard errors"
    if abs(paired["difference"]) > 2 * paired["stderr"]:
        apart = "a difference of more than two standard errors"
    return f"{text}, {apart} ({points(paired['difference'], paired['stderr'])} points, paired)"


def _best(variants: list[JsonRow], dataset: str) -> JsonRow | None:
    values = [(perplexity_of(v, dataset), v) for v in variants]
    measured = [(value, v) for value, v in values if value is not None and math.isfinite(value)]
    return min(measured, key=lambda pair: pair[0])[1] if measured else None


def _named(variant: JsonRow) -> str:
    changed = " (weights updated too)" if variant.get("weights_changed") else ""
    return f"{label(variant)}{changed}"


def _ppl(variant: JsonRow | None, dataset: str) -> str:
    return perplexity(perplexity_of(variant, dataset))


def _and(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
