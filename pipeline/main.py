"""One run of a recipe from checks to report."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import time
import warnings as python_warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from rich.console import Console as RichConsole

from pipeline import preflight
from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.flow import Flow, TrainingError, resources, start_ray
from pipeline.plan import Plan, make_plan
from pipeline.progress import Console
from pipeline.reporting import make_figures, print_report, result_rows, write_page
from pipeline.reporting.schema import Tracking
from pipeline.results import collect
from pipeline.sizes import Sizes
from pipeline.storage import fingerprint
from pipeline.tracking.factory import make_tracker


def prune(config: RunConfig, quiet: bool = False) -> None:
    """Run a recipe; what an earlier run finished is not done again.

    Raises:
        UserError: wrong input, before anything is started where that can be known.
    """
    began = time.time()
    plan, sizes, warnings = begin(config)
    config, directory = plan.config, local_directory(plan)
    console = Console(directory / "run.log", quiet)
    for text in warnings:
        console.warn(text)
    console.say(
        f"recipe {config.name}: {config.model.source}, {sizes.parameters:,} parameters, {sizes.prunable:,} prunable, "
        f"sparsities {', '.join(f'{s:g}' for s in config.sparsities)}; started in {time.time() - began:.1f} s"
    )
    tracker = make_tracker(config.tracking.uri, config.tracking.experiment, directory)
    tags = {
        "recipe": config.name,
        "model": config.model.source,
        "fingerprint": fingerprint(config),
        "seed": str(config.seed),
        "git_commit": commit(),
    }
    with tracker.start_run(f"{config.name}-{fingerprint(config)[:8]}", tags=tags) as run:
        run.log_params(config.model_dump(mode="json"))
        run.log_dict(config.model_dump(mode="json"), "recipe.json")
        run.log_dict(preflight.environment(), "environment.json")
        flow = Flow(plan, console, run)
        try:
            flow.execute()
        except TrainingError as error:
            raise UserError(str(error)) from error
        reported = time.time()
        results = collect(plan, sizes, flow.timings, warnings)
        results["stages"].append({"name": "start-up and checks", "seconds": flow.started - began, "cached": False})
        results["tracking"] = cast(Tracking, tracker.info())
        for variant in results["variants"]:
            with run.child(variant["name"], {"stage": "variant", "method": variant["method"]}) as child:
                child.log_params({k: variant.get(k) for k in ("method", "target_sparsity", "scope", "weights_changed")})
                child.log_metrics(_metrics(variant))
        run.log_table(result_rows(results), "results.csv")
        run.log_dict(results, "results.json")
        (directory / "results.json").write_text(json.dumps(results, indent=1))
        figures = make_figures(results)
        for name, figure in figures.items():
            run.log_figure(figure, f"{name.replace('/', '-')}.png")
        page = write_page(results, figures, directory / "report.html")
        run.log_artifact(page, "")
        console.say(f"report done in {time.time() - reported:.1f} s")
    print_report(results, RichConsole())
    seconds = time.time() - began
    print(f"\nFinished in {int(seconds) // 60} min {int(seconds) % 60} s.")
    print(f"Report: {page.resolve()}")
    for line in tracker.summary():
        print(line)
    info = tracker.info()
    if "ui_command" in info:
        print(f"Compare runs: {info['ui_command']}")


def begin(config: RunConfig) -> tuple[Plan, Sizes, list[str]]:
    """Plan a recipe, check all that can be known to go wrong, then start Ray. Returns the checks' warnings too.

    Raises:
        UserError: the first thing that cannot work; where that can be known, before Ray is started.
    """
    python_warnings.simplefilter("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    submitted = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    if submitted and not Path(config.output).is_absolute() and "://" not in config.output:
        # A submitted job works in a copy of the working directory that Ray deletes.
        config = config.model_copy(update={"output": str(Path.home() / config.output)})
    plan = make_plan(config)
    sizes, warnings = preflight.check(plan)
    if "RAY_ADDRESS" not in os.environ:
        preflight.check_cluster(config, resources())
    start_ray()
    preflight.check_cluster(config, resources())
    return plan, sizes, warnings


def local_directory(plan: Plan) -> Path:
    """Where a run keeps its own records: local even where its results go to an object store."""
    name = plan.config.name
    return Path(plan.directory if "://" not in plan.directory else f"runs/{name}").expanduser()


def _metrics(variant: Mapping[str, Any]) -> dict[str, float]:
    metrics = {"real_sparsity": variant["real_sparsity"], "seconds": variant.get("seconds", 0.0)}
    for text, found in variant["perplexity"].items():
        metrics |= {f"perplexity.{text}": found["perplexity"], f"stderr_nll.{text}": found["stderr_nll"] or 0.0}
    for task, found in variant["tasks"].items():
        metrics |= {f"acc.{task}": found["acc"], f"acc_stderr.{task}": found["acc_stderr"] or 0.0}
    if variant["mean_accuracy"]:
        metrics |= {"acc.mean": variant["mean_accuracy"]["acc"], "acc_stderr.mean": variant["mean_accuracy"]["stderr"]}
    return metrics


def commit() -> str:
    """The commit of the code, where it is a checkout."""
    root = Path(__file__).resolve().parents[1]
    found = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"
