"""What a pipeline run tells its tracker: names and tags to filter by, parameters and metrics to plot."""

from __future__ import annotations

import getpass
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config import RunConfig
from pipeline.plan import LearnWork, Plan, Variant
from pipeline.speed import matrices
from pipeline.storage import fingerprint
from pipeline.tracking.base import Run
from pipeline.tracking.registry import MEASURED_ON, SCORE

USES = {"calibration": "training", "heldout": "validation"}
"""What a text is for, in MLflow's words; all others are for evaluation."""


MEANS = {"mean": "mean_accuracy", "mean_above_chance": "mean_above_chance"}
"""Names among the metrics of the means over tasks, and their keys in a row."""


def recipe_fingerprint(config: RunConfig) -> str:
    """What tells a recipe from others: all settings but what it is called and where its results go."""
    return fingerprint(config.model_dump(mode="json", exclude={"name", "base", "why", "output", "tracking"}))


def run_name(config: RunConfig) -> str:
    """The same for every start of a recipe, so that a restart continues the run."""
    return f"{config.name}-{recipe_fingerprint(config)[:8]}"


def tags(plan: Plan) -> dict[str, str]:
    """Tags of a run, which all runs below it inherit."""
    config, revision = plan.config, commit()
    dense = [m.stage.key for m in plan.measurements if m.variant.export is None]
    return {
        "model": config.model.source,
        "recipe": config.name,
        "recipe_fingerprint": recipe_fingerprint(config),
        "dataset_fingerprint": plan.corpora["calibration"][0].key,
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


def learn_tags(work: LearnWork) -> dict[str, str]:
    """Tags of a learning run."""
    return {
        "stage": "learn",
        "method": work.name,
        **sparsity_of(work),
        "scope": work.config.settings.scope,
        "seed": str(work.config.settings.seed),
    }


def sparsity_of(work: LearnWork) -> dict[str, str]:
    """The sparsity of a learning run as a tag or parameter; those of a nested run with commas between."""
    return {"sparsity": ",".join(f"{sparsity:g}" for sparsity in work.sparsities)}


def log_inputs(run: Run, plan: Plan) -> None:
    """Record the texts of a run, which are packed by now."""
    for role, (stage, _, _) in plan.corpora.items():
        facts = stage.manifest() or {}
        sizes = {key: facts.get(key) for key in ("documents", "tokens", "rows", "context_length", "tokenizer")}
        run.log_input(role, stage.key, str(facts.get("source", "")), USES.get(role, "evaluation"), sizes)


def log_variant(run: Run, plan: Plan, row: Mapping[str, Any]) -> None:
    """Record a row of the table, of a variant or of the mean over several seeds, as a run below ``run``."""
    alike = [v for v in plan.variants if (v.method, v.sparsity) == (row["method"], row["target_sparsity"])]
    variant = next((v for v in alike if v.name == row["name"]), alike[0])
    work, tags = plan.learned(variant), variant_tags(variant)
    if work:
        tags["seed"] = ",".join(map(str, row.get("seeds", [work.config.settings.seed])))
    with run.child(row["name"], tags) as child:
        params = {key: row.get(key) for key in ("method", "origin", "target_sparsity", "scope", "weights_changed")}
        params |= {"model": plan.config.model.source, "seed": plan.config.seed}
        params |= {"context_length": plan.config.data.context_length}
        child.log_params(params | (work.config.model_dump(mode="json") if work else {}))
        child.log_metrics(variant_metrics(row))


def variant_metrics(row: Mapping[str, Any]) -> dict[str, float]:
    """Metrics of a row of the table: ``perplexity.TEXT``, ``acc.TASK`` and so on."""
    metrics = {key: row.get(key, 0.0) for key in ("real_sparsity", "block_sparsity", "seconds", "training_tokens")}
    for text, found in row["perplexity"].items():
        metrics |= {f"perplexity.{text}": found["perplexity"], f"stderr_nll.{text}": found["stderr_nll"] or 0.0}
    for task, found in row["tasks"].items():
        metrics |= {f"acc.{task}": found["acc"], f"acc_stderr.{task}": found["acc_stderr"] or 0.0}
    for name, key in MEANS.items():
        if row[key]:
            metrics |= {f"acc.{name}": row[key]["acc"], f"acc_stderr.{name}": row[key]["stderr"]}
    for text, spread in row.get("spread", {}).get("nll", {}).items():
        metrics[f"seeds_stdev.nll.{text}"] = spread
    for task, spread in row.get("spread", {}).get("tasks", {}).items():
        metrics[f"seeds_stdev.acc.{task}"] = spread
    for base, difference in row.get("against", {}).items():
        metrics |= _difference_metrics(base.rsplit("@", 1)[0], difference)
    return metrics | speed_metrics(row)


def speed_metrics(row: Mapping[str, Any]) -> dict[str, float]:
    """Speed of decoding and of the pruned layers alone, where it was measured."""
    metrics = {key: row[key] for key in ("decode_tokens_per_second",) if key in row}
    speed = row.get("speed", {})
    for dtype, found in speed.get("decode", {}).items():
        metrics |= {
            f"decode_tokens_per_second.{dtype}": found["sparse"]["tokens_per_second"],
            f"decode_tokens_per_second_dense.{dtype}": found["dense"]["tokens_per_second"],
            f"decode_speedup.{dtype}": found["speedup"],
            f"decode_rest_ms.{dtype}": found["sparse"]["rest_ms"],
        }
        rows = [matrix for matrix in speed["matrices"] if matrix["dtype"] == dtype]
        metrics[f"layers_speedup.{dtype}"] = matrices.speedup(rows)
    return metrics


def headline_metrics(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """What the run itself shows of its variants: MLflow's charts make a section of what stands before the slash."""
    metrics: dict[str, float] = {}
    for name, row in rows.items():
        variant = name.replace("@", " ")
        metrics |= {f"perplexity.{text}/{variant}": found["perplexity"] for text, found in row["perplexity"].items()}
        if row["mean_accuracy"]:
            metrics[f"acc.mean/{variant}"] = row["mean_accuracy"]["acc"]
    return metrics


def _difference_metrics(base: str, difference: Mapping[str, Any]) -> dict[str, float]:
    """``against.BASE.nll.TEXT``, ``against.BASE.acc.TASK`` and so on, each with ``…_stderr`` where it is known."""
    found = {f"nll.{text}": d for text, d in difference["nll"].items()}
    found |= {f"acc.{task}": d for task, d in difference["tasks"].items()}
    found |= {f"acc.{name}": difference[key] for name, key in MEANS.items() if difference[key]}
    values = {name: (d["difference"], d["stderr"]) for name, d in found.items()}
    values |= {
        f"{gap}.{text}": (d[gap], d[f"{gap}_stderr"])
        for text, d in difference["nll"].items()
        for gap in ("gap_closed", "gap_closed_nats")
        if gap in d
    }
    metrics = {f"against.{base}.{name}": value for name, (value, _) in values.items()}
    return metrics | {f"against.{base}.{n}_stderr": error for n, (_, error) in values.items() if error is not None}


def log_models(run: Run, plan: Plan, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Register the best variant of each sparsity, by perplexity on the first evaluation text, if that is asked for.

    Args:
        rows: the rows of the table by the variant's name.
    """
    name, text = plan.config.tracking.register_as, next(iter(plan.config.data.evaluation), None)
    if name is None or text is None:
        return
    measured_on = next(m.stage.key for m in plan.measurements if m.variant.export is None and m.subject == text)
    for sparsity in plan.config.sparsities:
        rivals = [v for v in plan.variants if v.sparsity == sparsity]
        best = min(rivals, key=lambda v: rows[v.name]["perplexity"][text]["perplexity"])
        assert best.export is not None
        score = rows[best.name]["perplexity"][text]["perplexity"]
        about = {**variant_tags(best), SCORE: repr(score), MEASURED_ON: measured_on, "model": plan.config.model.source}
        run.log_model(best.export.uri_of(), name, alias(sparsity), about)


def alias(sparsity: float) -> str:
    """The registry's alias for the best model of a sparsity: ``best-62_5`` for 0.625."""
    return f"best-{100 * sparsity:g}".replace(".", "_")


def commit() -> str:
    """The commit of the code, with ``-dirty`` where files differ from it; ``unknown`` for a copy without history."""
    root = str(Path(__file__).resolve().parents[1])
    command = ["git", "-C", root, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"
