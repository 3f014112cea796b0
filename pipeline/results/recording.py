"""What a pipeline run tells its tracker: names and tags to filter by, parameters and metrics to plot."""

from __future__ import annotations

import getpass
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.artifacts.store import fingerprint
from pipeline.config import RunConfig
from pipeline.evaluation import matrix_speed
from pipeline.evaluation.speed import Speed
from pipeline.results.row import Row
from pipeline.results.schema import Difference
from pipeline.stages.evaluate import Cell, TextPerplexity
from pipeline.stages.learn import Learn
from pipeline.stages.planned import Plan
from pipeline.stages.variant import Variant
from pipeline.tracking.registry import MEASURED_ON, SCORE
from pipeline.tracking.tracker import Run

MEAN, MEAN_ABOVE_CHANCE = "mean", "mean_above_chance"
"""Names among the metrics of the means over tasks."""


def recipe_fingerprint(config: RunConfig) -> str:
    """What tells a recipe from others: all settings but what it is called and where its results go."""
    return fingerprint(config.model_dump(mode="json", exclude={"name", "base", "why", "output", "tracking"}))


def run_name(config: RunConfig) -> str:
    """The same for every start of a recipe, so that a restart continues the run."""
    return f"{config.name}-{recipe_fingerprint(config)[:8]}"


def tags(plan: Plan) -> dict[str, str]:
    """Tags of a run, which all runs below it inherit."""
    config, revision = plan.config, commit()
    dense = [stage.key for stage in plan.stages if isinstance(stage, Cell) and stage.variant.export is None]
    return {
        "model": config.model.source,
        "recipe": config.name,
        "recipe_fingerprint": recipe_fingerprint(config),
        "dataset_fingerprint": plan.corpus("calibration").key,
        MEASURED_ON: fingerprint(dense),
        "seed": str(config.seed),
        "git_commit": revision,
        # What MLflow's own columns show.
        "mlflow.source.git.commit": revision,
        "mlflow.source.name": "pipeline/run.py",
        "mlflow.source.type": "LOCAL",
        "mlflow.user": getpass.getuser(),
    }


def variant_tags(variant: Variant) -> dict[str, str]:
    """Tags of a variant's run."""
    sparsity = {} if variant.sparsity is None else {"sparsity": f"{variant.sparsity:g}", "scope": variant.scope}
    return {"stage": "variant", "method": variant.method, **sparsity}


def learn_tags(learn: Learn) -> dict[str, str]:
    """Tags of a learning run."""
    return {
        "stage": "learn",
        "method": learn.entry,
        **sparsity_of(learn),
        "scope": learn.scope,
        "seed": str(learn.config.settings.seed),
    }


def sparsity_of(learn: Learn) -> dict[str, str]:
    """The sparsity of a learning run as a tag or parameter; those of a nested run with commas between."""
    return {"sparsity": ",".join(f"{sparsity:g}" for sparsity in learn.sparsities)}


def log_variant(run: Run, plan: Plan, row: Row) -> None:
    """Record a row of the table, of a variant or of the mean over several seeds, as a run below ``run``."""
    alike = [v for v in plan.variants if (v.method, v.sparsity) == (row.method, row.target_sparsity)]
    variant = next((v for v in alike if v.name == row.name), alike[0])
    learn, tags = variant.learned, variant_tags(variant)
    if learn:
        tags["seed"] = ",".join(map(str, row.seeds or [learn.config.settings.seed]))
    methods = {v.name: v.method for v in plan.variants}
    with run.child(row.name, tags) as child:
        child.log_params(
            {
                "method": row.method,
                "origin": row.origin,
                "target_sparsity": row.target_sparsity,
                "scope": row.scope,
                "weights_changed": row.weights_changed,
                "model": plan.config.model.source,
                "seed": plan.config.seed,
                "context_length": plan.config.data.context_length,
                **(learn.config.model_dump(mode="json") if learn else {}),
            }
        )
        child.log_metrics(variant_metrics(row, methods))


def variant_metrics(row: Row, methods: Mapping[str, str]) -> dict[str, float]:
    """Metrics of a row of the table: ``perplexity.TEXT``, ``acc.TASK`` and so on.

    Args:
        methods: of the variants that it is compared with, by their names.
    """
    metrics: dict[str, float] = {
        "real_sparsity": row.real_sparsity,
        "block_sparsity": row.block_sparsity,
        "seconds": row.seconds or 0.0,
        "training_tokens": row.training_tokens,
    }
    for text, score in row.perplexity.items():
        metrics |= {f"perplexity.{text}": score["perplexity"], f"stderr_nll.{text}": score["stderr_nll"] or 0.0}
    for task, accuracy in row.tasks.items():
        metrics |= {f"acc.{task}": accuracy["acc"], f"acc_stderr.{task}": accuracy["acc_stderr"] or 0.0}
    for name, mean in ((MEAN, row.mean_accuracy), (MEAN_ABOVE_CHANCE, row.mean_above_chance)):
        if mean:
            metrics |= {f"acc.{name}": mean["acc"], f"acc_stderr.{name}": mean["stderr"] or 0.0}
    if row.spread:
        metrics |= {f"seeds_stdev.nll.{text}": spread for text, spread in row.spread["nll"].items()}
        metrics |= {f"seeds_stdev.acc.{task}": spread for task, spread in row.spread["tasks"].items()}
    for base, difference in (row.against or {}).items():
        metrics |= _difference_metrics(methods[base], difference)
    if row.decode_tokens_per_second is not None:
        metrics["decode_tokens_per_second"] = row.decode_tokens_per_second
    return metrics | (speed_metrics(row.speed) if row.speed else {})


def speed_metrics(speed: Speed) -> dict[str, float]:
    """Speed of decoding and of the pruned layers alone, by dtype."""
    metrics: dict[str, float] = {}
    for dtype, decode in speed["decode"].items():
        metrics |= {
            f"decode_tokens_per_second.{dtype}": decode["sparse"]["tokens_per_second"],
            f"decode_tokens_per_second_dense.{dtype}": decode["dense"]["tokens_per_second"],
            f"decode_speedup.{dtype}": decode["speedup"],
            f"decode_rest_ms.{dtype}": decode["sparse"]["rest_ms"],
        }
        of_dtype = [matrix for matrix in speed["matrices"] if matrix["dtype"] == dtype]
        metrics[f"layers_speedup.{dtype}"] = matrix_speed.speedup(of_dtype)
    return metrics


def headline_metrics(rows: Sequence[Row]) -> dict[str, float]:
    """What the run itself shows of its variants: MLflow's charts make a section of what stands before the slash."""
    metrics: dict[str, float] = {}
    for row in rows:
        variant = row.name.replace("@", " ")
        metrics |= {f"perplexity.{text}/{variant}": score["perplexity"] for text, score in row.perplexity.items()}
        if row.mean_accuracy:
            metrics[f"acc.mean/{variant}"] = row.mean_accuracy["acc"]
    return metrics


def _difference_metrics(base: str, difference: Difference) -> dict[str, float]:
    """``against.BASE.nll.TEXT``, ``against.BASE.acc.TASK`` and so on, each with ``…_stderr`` where it is known."""
    values = {f"nll.{text}": (d["difference"], d["stderr"]) for text, d in difference["nll"].items()}
    values |= {f"acc.{task}": (d["difference"], d["stderr"]) for task, d in difference["tasks"].items()}
    means = ((MEAN, difference["mean_accuracy"]), (MEAN_ABOVE_CHANCE, difference["mean_above_chance"]))
    values |= {f"acc.{name}": (d["difference"], d["stderr"]) for name, d in means if d}
    for text, d in difference["nll"].items():
        if "gap_closed" in d:
            values[f"gap_closed.{text}"] = (d["gap_closed"], d["gap_closed_stderr"])
            values[f"gap_closed_nats.{text}"] = (d["gap_closed_nats"], d["gap_closed_nats_stderr"])
    metrics = {f"against.{base}.{name}": value for name, (value, _) in values.items()}
    return metrics | {f"against.{base}.{n}_stderr": error for n, (_, error) in values.items() if error is not None}


def log_models(run: Run, plan: Plan, rows: Sequence[Row]) -> None:
    """Register the best variant of each sparsity, by perplexity on the first evaluation text, if that is asked for."""
    name, text = plan.config.tracking.register_as, next(iter(plan.config.data.evaluation), None)
    if name is None or text is None:
        return
    measured_on = next(
        cell.key for cell in plan.of(TextPerplexity) if cell.variant.export is None and cell.subject == text
    )
    scores = {row.name: row.perplexity[text]["perplexity"] for row in rows}
    for sparsity in plan.config.sparsities:
        rivals = [v for v in plan.variants if v.sparsity == sparsity]
        best = min(rivals, key=lambda v: scores[v.name])
        assert best.export is not None
        about = {
            **variant_tags(best),
            SCORE: repr(scores[best.name]),
            MEASURED_ON: measured_on,
            "model": plan.config.model.source,
        }
        run.log_model(best.export.directory.uri_of(), name, alias(sparsity), about)


def alias(sparsity: float) -> str:
    """The registry's alias for the best model of a sparsity: ``best-62_5`` for 0.625."""
    return f"best-{100 * sparsity:g}".replace(".", "_")


def commit() -> str:
    """The commit of the code, with ``-dirty`` where files differ from it; ``unknown`` for a copy without history."""
    root = str(Path(__file__).resolve().parents[2])
    command = ["git", "-C", root, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"
