"""Collects what the finished stages of a plan hold into the one dict that every form of report is made from."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from typing import Any, cast

from pipeline import preflight
from pipeline.estimate import training_tokens
from pipeline.learning.checkpoint import FOLDER, Checkpoint
from pipeline.plan import LearnWork, Plan, Variant, variant_name
from pipeline.reporting import RunResults
from pipeline.sizes import Sizes
from pipeline.stages import benchmark, evaluate, harden, mask_map
from pipeline.storage import StageDir
from pipeline.table_rows import table_rows


def collect(plan: Plan, sizes: Sizes, timings: list[dict[str, Any]], warnings: list[str]) -> RunResults:
    """Results of a plan whose stages are all finished."""
    config = plan.config
    rows, chance, clear = table_rows(plan, _variant)
    _add_speeds(rows, [(work.variant, benchmark.result(work.stage)) for work in plan.speeds], config.model.dtype)
    for row in rows:
        row["block_sparsity"] = row["real_sparsity"] * sizes.weights.share
    results: dict[str, Any] = {
        "recipe": config.name,
        "model": {
            "name": config.model.source,
            "parameters": sizes.parameters,
            "prunable_parameters": sizes.prunable,
            "block_parameters": sizes.weights.total,
            "revision": config.model.revision or "",
        },
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "context_length": config.data.context_length,
        "variants": rows,
        "chance": chance,
        "clear_tasks": clear,
        "training": {
            variant_name(work.name, work.seed, sparsity): training_curves(plan, work, sparsity)
            for work in plan.learns
            for sparsity in work.sparsities
        },
        "calibration": {role: stage.manifest() or {} for role, (stage, _, _) in plan.corpora.items()},
        "stages": timings,
        "environment": preflight.environment(),
        "config": config.model_dump(mode="json"),
        "warnings": warnings,
    }
    return cast(RunResults, results)


def _variant(plan: Plan, variant: Variant) -> dict[str, Any]:
    """What a row says besides perplexities and accuracies."""
    row: dict[str, Any] = {
        "name": variant.name,
        "method": variant.method,
        "origin": variant.origin,
        "target_sparsity": variant.sparsity,
        "real_sparsity": 0.0,
        "training_tokens": _training_tokens(plan, variant),
        "scope": variant.scope,
        "weights_changed": False,
    }
    if variant.export and variant.made_by:
        exported = variant.export.manifest() or {}
        row |= {
            "real_sparsity": exported["real_sparsity"],
            "weights_changed": exported["weights_changed"],
            "seconds": _seconds(plan, variant.made_by),
            "directory": variant.export.uri_of(),
            "sparsity_per_layer": json.loads((variant.export.path() / harden.LAYERS).read_text()),
        }
    if work := plan.learned(variant):
        row["seed"] = work.config.settings.seed
    for m in plan.measurements:
        if m.variant is variant and m.kind == "map":
            row["mask_map"] = mask_map.densities(m.stage)
        elif m.variant is variant and m.kind == "samples":
            row["samples"] = evaluate.result(m.stage)
    return row


def _add_speeds(rows: list[dict[str, Any]], speeds: list[tuple[Variant, dict[str, Any]]], dtype: str) -> None:
    """Give each measured variant what was found, and its tokens a second, in ``dtype`` where that was measured.

    A mean over seeds gets what was found of the seed that was measured. The dense model was measured beside each
    variant: its row gets the median.
    """
    dense = []
    for row in rows:
        for found in (speed for variant, speed in speeds if _stands_for(row, variant)):
            decode = found["decode"].get(dtype) or next(iter(found["decode"].values()))
            dense.append(decode["dense"]["tokens_per_second"])
            row |= {"speed": found, "decode_tokens_per_second": decode["sparse"]["tokens_per_second"]}
    if dense:
        rows[0]["decode_tokens_per_second"] = statistics.median(dense)


def _stands_for(row: dict[str, Any], variant: Variant) -> bool:
    """Whether a row is that of the variant; where that is one of several seeds, the one of their mean."""
    return "mean" not in row and (row["method"], row["target_sparsity"]) == (variant.method, variant.sparsity)


def _training_tokens(plan: Plan, variant: Variant) -> int:
    """Tokens that the mask was learned from; zero where it was not learned."""
    work = plan.learned(variant)
    return training_tokens(plan.config, work.config) if work else 0


def _seconds(plan: Plan, made_by: StageDir) -> float:
    """Time to make a variant. Learning counts its steps: what a restart or the start-up of workers took does not."""
    if made_by.stage == "learn":
        history = Checkpoint(made_by.uri_of(FOLDER)).facts["history"]
        return round(sum(step["seconds"] for step in history), 1)
    before = sum(_seconds(plan, fit.learned.stage) for fit in plan.reconstructions if fit.stage is made_by)
    return round(before + (made_by.manifest() or {})["seconds"], 1)


def training_curves(plan: Plan, work: LearnWork, sparsity: float) -> dict[str, Any]:
    """The curves of a learning run; of a nested one, the steps that trained ``sparsity``."""
    history = Checkpoint(work.stage.uri_of(FOLDER)).facts["history"]
    watched = [step for step in history if "mask_loss.hard" in step]
    since = itertools.accumulate(step["seconds"] for step in history)
    suffix = f"-{sparsity:g}" if len(work.sparsities) > 1 else ""
    trained = [step for step in history if step.get("target_density", 1 - sparsity) == 1 - sparsity]
    tokens = work.config.settings.batch_rows * plan.config.data.context_length
    curves = {
        name: [step[name] for step in trained]
        for name in (
            "step",
            "loss",
            "lm_loss",
            "density",
            "expected_density",
            "temperature",
            "scale",
            "learning_rate",
        )
    }
    if "multiplier" in history[0]:
        curves["lagrangian"] = [step["multiplier"] for step in trained]
    return curves | {
        "target_density": 1 - sparsity,
        "masks": {
            "step": [step["step"] for step in watched],
            "seconds": [spent for step, spent in zip(history, since, strict=True) if "mask_loss.hard" in step],
            **{mode: [step[f"mask_loss.{mode}{suffix}"] for step in watched] for mode in ("sampled", "mean", "hard")},
        },
        "tokens_per_second": tokens * len(history) / sum(step["seconds"] for step in history),
    }
