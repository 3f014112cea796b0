"""The rows of the table of results: every variant, the mean over seeds, and the differences between them."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import fmean, stdev
from typing import Any

from pipeline import comparison
from pipeline.evaluation.scores import ZeroShot
from pipeline.measured import Measured, mean, measured
from pipeline.plan import Plan, Variant

Facts = Callable[[Plan, Variant], dict[str, Any]]
"""What a row says of a variant besides perplexities and accuracies."""


def table_rows(plan: Plan, facts: Facts) -> tuple[list[dict[str, Any]], dict[str, float], list[str]]:
    """The rows of the table, the chance level of each task, and the tasks where the dense model is clearly above it."""
    dense, *pruned = plan.variants
    found = {variant.name: measured(plan, variant) for variant in plan.variants}
    chance = {task: scored["chance"] for task, scored in found[dense.name].tasks.items()}
    clear = comparison.clear_tasks(found[dense.name].tasks)
    rows = [facts(plan, dense) | _scores(found[dense.name], clear)]
    for (method, sparsity), group in _by_method(pruned).items():
        members = [facts(plan, v) | _scores(found[v.name], clear) for v in group]
        if len(members) > 1:
            together = _mean_row(f"{method}@{sparsity:g}", group, members)
            found[together["name"]] = mean([found[v.name] for v in group])
            rows.append(together | _scores(found[together["name"]], clear) | _spread(members))
            members = [row | {"mean": together["name"]} for row in members]
        rows += members
    for row in rows[1:]:
        layer_wise = [v for v in pruned if v.sparsity == row["target_sparsity"] and v.origin == "layer-wise"]
        learned = row["origin"] != "layer-wise"
        row["rival"] = comparison.best({v.name: found[v.name] for v in layer_wise}) if learned else None
        # ADMM is what the published figures are compared with, whether or not it is the best here.
        admm = comparison.best({v.name: found[v.name] for v in layer_wise if v.method.split("-")[0] == "admm"})
        wanted = [base for base in (row["rival"], admm) if base] if learned else []
        row["against"] = {
            base: comparison.difference(
                None if base == dense.name else found[dense.name], found[base], found[row["name"]], clear
            )
            for base in dict.fromkeys([*wanted, dense.name])
            if base in found
        }
    return rows, chance, clear


def _by_method(variants: list[Variant]) -> dict[tuple[str, float | None], list[Variant]]:
    """Variants that differ in their seed alone stand together, where the first of them was."""
    groups: dict[tuple[str, float | None], list[Variant]] = {}
    for variant in variants:
        groups.setdefault((variant.method, variant.sparsity), []).append(variant)
    return groups


def _mean_row(name: str, group: list[Variant], members: list[dict[str, Any]]) -> dict[str, Any]:
    """What is not measured by text or task of the mean over seeds."""
    same = ("method", "origin", "target_sparsity", "training_tokens", "scope", "weights_changed")
    return {
        "name": name,
        **{key: members[0][key] for key in same},
        "seeds": [variant.seed for variant in group],
        **{key: fmean(row[key] for row in members) for key in ("real_sparsity", "seconds")},
    }


def _spread(members: list[dict[str, Any]]) -> dict[str, Any]:
    """Standard deviations between seeds: of the nll by text, of the accuracy by task and of its mean."""
    first = members[0]
    spread: dict[str, Any] = {
        "nll": {t: stdev(math.log(row["perplexity"][t]["perplexity"]) for row in members) for t in first["perplexity"]},
        "tasks": {task: stdev(row["tasks"][task]["acc"] for row in members) for task in first["tasks"]},
    }
    for key in ("mean_accuracy", "mean_above_chance"):
        if first[key]:
            spread[key] = stdev(row[key]["acc"] for row in members)
    return {"spread": spread}


def _scores(found: Measured, clear: list[str]) -> dict[str, Any]:
    """Perplexities and accuracies of a row."""
    return {
        "perplexity": {
            text: {
                "perplexity": scored["perplexity"],
                "stderr_nll": scored["nll_stderr"] or 0.0,
                "tokens": scored["tokens"],
            }
            for text, scored in found.texts.items()
        },
        "tasks": {
            task: {
                "acc": scored["metrics"]["acc"],
                "acc_stderr": scored["metrics"]["acc_stderr"],
                "documents": scored["documents"],
            }
            for task, scored in found.tasks.items()
        },
        "mean_accuracy": _mean_accuracy(list(found.tasks.values())),
        "mean_above_chance": _mean_accuracy([found.tasks[task] for task in clear]),
    }


def _mean_accuracy(tasks: list[ZeroShot]) -> dict[str, float] | None:
    if not tasks:
        return None
    errors = [task["metrics"]["acc_stderr"] or 0.0 for task in tasks]
    mean_of_tasks = fmean(task["metrics"]["acc"] or 0.0 for task in tasks)
    return {"acc": mean_of_tasks, "stderr": math.sqrt(sum(e * e for e in errors)) / len(errors)}
