"""Collects what the finished stages of a plan hold into the one dict that every form of report is made from."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from typing import Any, cast

from pipeline.model.sizes import Sizes
from pipeline.results.measurements import measured
from pipeline.results.row import Row
from pipeline.results.schema import Calibration, RunResults, StageTime, Training
from pipeline.results.table import Finding, make_table
from pipeline.stages.benchmark import Benchmark
from pipeline.stages.calibrate import Calibrate
from pipeline.stages.evaluate import Samples
from pipeline.stages.learn import Learn
from pipeline.stages.mask_map import MaskMap
from pipeline.stages.planned import Plan
from pipeline.stages.source import variant_name
from pipeline.stages.variant import Variant
from pipeline.tracking.environment import environment


@dataclass(frozen=True)
class Collected:
    """What finished stages hold."""

    rows: list[Row]
    results: RunResults
    """All of it as JSON, from which every form of report is made."""


def collect(plan: Plan, sizes: Sizes, timings: list[StageTime], warnings: list[str]) -> Collected:
    """Results of a plan whose stages are all finished."""
    config = plan.config
    table = make_table([_finding(plan, variant) for variant in plan.variants], sizes.weights.share, config.model.dtype)
    results = RunResults(
        recipe=config.name,
        model={
            "name": config.model.source,
            "parameters": sizes.parameters,
            "prunable_parameters": sizes.prunable,
            "block_parameters": sizes.weights.total,
            "revision": config.model.revision or "",
        },
        created=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        context_length=config.data.context_length,
        variants=[row.as_json() for row in table.rows],
        chance=table.chance,
        clear_tasks=table.clear,
        training={
            variant_name(learn.entry, learn.shown_seed, sparsity): training_curves(learn, sparsity)
            for learn in plan.of(Learn)
            for sparsity in learn.sparsities
        },
        calibration={text.role: cast(Calibration, text.facts) for text in plan.of(Calibrate)},
        stages=timings,
        environment=environment(),
        config=config.model_dump(mode="json"),
        warnings=warnings,
    )
    return Collected(table.rows, results)


def _finding(plan: Plan, variant: Variant) -> Finding:
    """What the stages found of a variant."""
    export = variant.export
    return Finding(
        variant=variant,
        measured=measured(plan, variant),
        export=export.read() if export else None,
        seconds=export.source.seconds() if export else None,
        mask_map=next((map_.read() for map_ in plan.of(MaskMap) if map_.export is export), None),
        samples=next((cell.read() for cell in plan.of(Samples) if cell.variant is variant), None),
        speed=next((speed.read() for speed in plan.of(Benchmark) if speed.export is export), None),
    )


def training_curves(learn: Learn, sparsity: float) -> Training:
    """The curves of a learning run; of a nested one, the steps that trained ``sparsity``."""
    history = learn.history()
    watched = [step for step in history if "mask_loss.hard" in step]
    since = itertools.accumulate(step["seconds"] for step in history)
    suffix = f"-{sparsity:g}" if learn.nested else ""
    trained = [step for step in history if step.get("target_density", 1 - sparsity) == 1 - sparsity]
    tokens = learn.config.settings.batch_rows * learn.calibration.data.context_length
    curves: dict[str, Any] = {
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
    curves |= {
        "target_density": 1 - sparsity,
        "masks": {
            "step": [step["step"] for step in watched],
            "seconds": [spent for step, spent in zip(history, since, strict=True) if "mask_loss.hard" in step],
            **{mode: [step[f"mask_loss.{mode}{suffix}"] for step in watched] for mode in ("sampled", "mean", "hard")},
        },
        "tokens_per_second": tokens * len(history) / sum(step["seconds"] for step in history),
    }
    return cast(Training, curves)
