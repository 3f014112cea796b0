"""One run of a recipe from checks to report."""

from __future__ import annotations

import json
import logging
import os
import time
import warnings as python_warnings
from contextlib import ExitStack
from pathlib import Path
from typing import cast

from rich.console import Console as RichConsole

from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.execution import preflight
from pipeline.execution.executor import Flow
from pipeline.execution.occupancy import occupied
from pipeline.execution.plan import make_plan
from pipeline.execution.progress import Console, Mode
from pipeline.execution.ray_cluster import end_in_order_when_terminated, resources, start_ray
from pipeline.model.sizes import Sizes
from pipeline.reporting import RunResults, make_figures, print_report, result_rows, write_page
from pipeline.results import recording
from pipeline.results.collect import collect
from pipeline.results.row import Row
from pipeline.results.schema import Tracking
from pipeline.stages.learn import TrainingError
from pipeline.stages.planned import Plan
from pipeline.tracking import Run, make_tracker
from pipeline.tracking.environment import environment
from pipeline.tracking.redaction import redact, remember
from pipeline.tracking.system import SystemMetrics


def prune(config: RunConfig, mode: Mode = "lines") -> None:
    """Run a recipe; what an earlier run finished is not done again.

    Raises:
        UserError: wrong input, before anything is started where that can be known.
        KeyboardInterrupt: the run was interrupted or terminated; its records say so.
    """
    end_in_order_when_terminated()
    began = time.time()
    with ExitStack() as stack:
        plan, sizes, warnings = begin(config, stack)
        config, directory = plan.config, local_directory(plan)
        tracker = make_tracker(config.tracking, directory)
        console = stack.enter_context(Console(directory / "run.log", mode))
        for text in warnings:
            console.warn(text)
        console.say(
            f"recipe {config.name}: {config.model.source}, {sizes.parameters:,} parameters, {sizes.weights}, "
            f"sparsities {', '.join(f'{s:g}' for s in config.sparsities)}; "
            f"started in {time.time() - began:.1f} s"
        )
        run = stack.enter_context(tracker.start_run(recording.run_name(config), tags=recording.tags(plan)))
        if config.tracking.active_stores:
            stack.enter_context(SystemMetrics(run))
        run.log_params(config.model_dump(mode="json"))
        run.log_dict(config.model_dump(mode="json"), "recipe.json")
        run.log_dict(environment(), "environment.json")
        flow = Flow(plan, console, run)
        try:
            flow.execute()
        except TrainingError as error:
            raise UserError(str(error)) from error
        with console.stage("report"):
            collected = collect(plan, sizes, flow.timings, console.warnings)
            results = collected.results
            results["stages"].append({"name": "start-up and checks", "seconds": flow.started - began, "cached": False})
            results["tracking"] = cast(Tracking, tracker.info())
            results = redact(results)
            page = _report(plan, collected.rows, results, run, directory)
    _tell(results, page, tracker.summary(), time.time() - began, console)


def _report(plan: Plan, rows: list[Row], results: RunResults, run: Run, directory: Path) -> Path:
    """Write the results as JSON and as a page, and record them."""
    for row in rows:
        recording.log_variant(run, plan, row)
    run.log_metrics(recording.headline_metrics(rows))
    recording.log_models(run, plan, rows)
    run.log_table(result_rows(results), "results.csv")
    run.log_dict(results, "results.json")
    (directory / "results.json").write_text(json.dumps(results, indent=1))
    figures = make_figures(results)
    for name, figure in figures.items():
        run.log_figure(figure, f"figures/{name.replace('/', '-')}.png")
    page = write_page(results, figures, directory / "report.html")
    run.log_artifact(page, "")
    return page


def _tell(results: RunResults, page: Path, places: list[str], seconds: float, console: Console) -> None:
    """The end of a run on the terminal."""
    tracking = results.get("tracking", {})
    if console.mode == "json":
        rows = result_rows(results)
        console.emit("result", seconds=seconds, report=str(page.resolve()), variants=rows, tracking=tracking)
        return
    print_report(results, RichConsole())
    print(f"\nFinished in {int(seconds) // 60} min {int(seconds) % 60} s.")
    print(f"Report: {page.resolve()}")
    for line in places:
        print(line)
    if "ui_command" in tracking:
        print(f"Compare runs: {tracking['ui_command']}")


def begin(config: RunConfig, stack: ExitStack) -> tuple[Plan, Sizes, list[str]]:
    """Plan a recipe, check all that can be known to go wrong, then start Ray. Returns the checks' warnings too.

    Args:
        stack: until it is closed, no other process writes results of this name there.

    Raises:
        UserError: the first thing that cannot work; where that can be known, before Ray is started.
    """
    python_warnings.simplefilter("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    submitted = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    if submitted and not Path(config.output).is_absolute() and "://" not in config.output:
        # A submitted job works in a copy of the working directory that Ray deletes.
        config = config.model_copy(update={"output": str(Path.home() / config.output)})
    for address in (config.tracking.uri, config.output):
        remember(address or "")
    plan = make_plan(config)
    sizes, warnings = preflight.check(plan)
    if "RAY_ADDRESS" not in os.environ:
        preflight.check_cluster(config, resources())
    stack.enter_context(occupied(plan.directory, local_directory(plan)))
    start_ray()
    preflight.check_cluster(config, resources())
    return plan, sizes, warnings


def local_directory(plan: Plan) -> Path:
    """Where a run keeps its own records: local even where its results go to an object store."""
    name = plan.config.name
    return Path(plan.directory if "://" not in plan.directory else f"runs/{name}").expanduser()
