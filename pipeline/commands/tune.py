"""``tune``: from a recipe and a space to a report, and the winner as a recipe."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console as RichConsole

from pipeline.artifacts.store import StageDir, fingerprint, write_atomically
from pipeline.commands.prune import begin, local_directory
from pipeline.config import EvaluateConfig, RunConfig, recipe
from pipeline.errors import UserError
from pipeline.execution.executor import Flow
from pipeline.execution.progress import Console, Mode
from pipeline.execution.ray_cluster import end_in_order_when_terminated, resources
from pipeline.learning.board import start_board
from pipeline.results.recording import tags as run_tags
from pipeline.stages.learn import TrainingError
from pipeline.stages.planned import Plan
from pipeline.stages.prior import Prior
from pipeline.tracking import Run, make_tracker
from pipeline.tracking.system import SystemMetrics
from pipeline.tuning import outcome, search, space, winner
from pipeline.tuning.charts import make_figures
from pipeline.tuning.confirm import WINNER, Comparison, confirm
from pipeline.tuning.domains import Choice
from pipeline.tuning.report import Summary, print_summary, render
from pipeline.tuning.search import Options, Search
from pipeline.tuning.space import Space
from pipeline.tuning.trial import SPARSITY, Trials, forget_logits
from pipeline.tuning.trial_records import Record, Records
from pipeline.tuning.watch import Watcher

VERSION = 1
RECORDS = "trials.json"


def tune(
    name: str, space_name: str, overrides: list[str], options: Options, confirmed: bool = False, mode: Mode = "lines"
) -> None:
    """Search a space on a recipe; what an earlier attempt finished is not done again.

    Args:
        name: of a recipe, or its file.
        confirmed: run the winner and what it would replace from several seeds.

    Raises:
        UserError: wrong input, before anything is started where that can be known.
        KeyboardInterrupt: the search was interrupted or terminated; its records say so.
    """
    end_in_order_when_terminated()
    asked = recipe.load(name, overrides)
    learn = _learn(asked)
    found = space.load(space_name, asked, learn)
    wanted = search.make_search(asked, learn, found, options)
    if confirmed and options.against:
        raise UserError("--confirm: needs one winner, and --against has as many as lie on the front")
    sparsity = max(asked.sparsities)
    with ExitStack() as stack:
        plan, _, warnings = begin(_config(asked, learn, wanted, sparsity), stack)
        if len(asked.sparsities) > 1 and options.against != "sparsity":
            warnings.append(f"the search is at sparsity {sparsity:g}, the highest of {asked.sparsities}")
        config = plan.config
        key = fingerprint(VERSION, _identity(config), learn, wanted, [prior.key for prior in plan.of(Prior)])
        stage = StageDir(plan.corpus("calibration").store, "tune", found.name, key)
        directory = local_directory(plan) / "tune" / f"{found.name}-{key}"
        tracker = make_tracker(config.tracking, local_directory(plan))
        console = stack.enter_context(Console(directory / "tune.log", mode))
        for text in warnings:
            console.warn(text)
        console.say(f"space {found.name} on recipe {config.name}: {wanted.trials} trials, results in {directory}")
        tags = run_tags(plan) | {"stage": "tune", "method": learn, "space": found.name, "sparsity": f"{sparsity:g}"}
        tags["scope"] = config.learn[learn].settings.family.scope_name
        run = stack.enter_context(tracker.start_run(f"tune-{config.name}-{found.name}-{key[:8]}", tags=tags))
        if config.tracking.active_stores:
            stack.enter_context(SystemMetrics(run))
        run.log_params(config.model_dump(mode="json"))
        run.log_params({"space": {field: str(domain) for field, domain in wanted.domains.items()}})
        comparisons: list[Comparison] = []
        try:
            Flow(plan, console, run).execute(last=Prior)
            with console.stage("search"):
                records = _search(plan, learn, sparsity, wanted, stage, directory / RECORDS, console, run)
            winners = outcome.front(records, options.against) if options.against else outcome.finished(records)[:1]
            if confirmed and winners:
                contenders = _contenders(found, winners[0])
                comparisons = confirm(config, learn, sparsity, contenders, console, run)
        except TrainingError as error:
            raise UserError(str(error)) from error
        recipes = _write_winners(directory, name, asked, learn, found, winners)
        reference = _reference(records, wanted, found)
        trials = list(records)
        summary = Summary(config, learn, sparsity, found, wanted, trials, reference, winners, recipes, comparisons)
        page = _report(summary, directory, run)
    _tell(summary, page, tracker.summary(), console)


def _tell(summary: Summary, page: Path, places: list[str], console: Console) -> None:
    """The end of a search on the terminal."""
    if console.mode == "json":
        winners = [asdict(trial) for trial in summary.winners]
        told = {"text": summary.sentences(), "winners": winners, "recipes": summary.recipes}
        console.emit("result", report=str(page.resolve()), **told)
        return
    print_summary(summary, RichConsole())
    for path in summary.recipes:
        print(f"Recipe: {path}")
    print(f"Report: {page.resolve()}")
    for line in places:
        print(line)


def _learn(config: RunConfig) -> str:
    """The entry of ``learn`` to search on."""
    if len(config.learn) != 1:
        raise UserError(
            f"learn: a search needs one entry, the recipe has {', '.join(config.learn) or 'none'}; "
            "take others out with learn.NAME=null"
        )
    return next(iter(config.learn))


def _config(config: RunConfig, learn: str, wanted: Search, sparsity: float) -> RunConfig:
    """The recipe reduced to what trials need: texts, and every prior that one may start from."""

    def values(name: str) -> list[Any]:
        domain = wanted.domains.get(name)
        return list(domain.values) if isinstance(domain, Choice) else [getattr(config.learn[learn].settings, name)]

    starts = {"methods": values("prior"), "scope": values("prior_scope")}
    return config.model_copy(
        update={
            "sparsities": config.sparsities if SPARSITY in wanted.domains else [sparsity],
            "prior": config.prior.model_copy(update=starts),
            "evaluate": EvaluateConfig(batch_rows=config.evaluate.batch_rows),
        }
    )


def _identity(config: RunConfig) -> dict[str, Any]:
    """What of a recipe decides the trials' results."""
    return config.model_dump(mode="json", include={"seed", "sparsities", "model", "data", "learn"})


def _search(
    plan: Plan, learn: str, sparsity: float, wanted: Search, stage: StageDir, file: Path, console: Console, run: Run
) -> Records:
    records = Records(file)
    if stage.manifest():
        console.say("the search was finished earlier")
        return records
    config = plan.config
    trials = Trials(
        config=config,
        learn=learn,
        sparsity=sparsity,
        watch_every=search.watch_every(config.learn[learn], wanted.stops_early),
        uri=stage.uri_of(),
        model=plan.of(Prior)[0].model,
        calibration=plan.corpus("calibration"),
        heldout=plan.corpus("heldout"),
        priors=plan.priors,
        board=start_board(),
    )
    at_a_time = search.concurrent(config.learn[learn], resources())
    console.say(f"{at_a_time} trial{'s' if at_a_time > 1 else ''} at a time; {len(records)} known from before")
    with stage.work(keep=True) as (_, facts):
        search.run(wanted, trials, records, Watcher(trials, records, console, run), at_a_time)
        for record in records:
            forget_logits(trials.trial(record.values).directory)
        facts |= {"trials": len(records)}
    return records


def _reference(records: Records, wanted: Search, found: Space) -> dict[str, Record]:
    """The finished trials of the values that were known before."""
    extra = {key: value for key, value in wanted.points[0].items() if key not in found.published}
    named = {"published": found.published | extra, "recipe": found.current | extra}
    return {
        name: trial for name, values in named.items() for trial in outcome.finished(records) if trial.values == values
    }


def _contenders(found: Space, best: Record) -> dict[str, dict[str, Any]]:
    """Whose settings are compared: each once, the winner's first."""
    contenders = {WINNER: best.values}
    for name, values in (("published", found.published), ("recipe", found.current)):
        if values not in contenders.values():
            contenders[name] = values
    return contenders


def _write_winners(
    directory: Path, base: str, config: RunConfig, learn: str, found: Space, winners: list[Record]
) -> list[str]:
    paths = []
    for number, trial in enumerate(winners, start=1):
        path = directory / (f"{WINNER}.yaml" if len(winners) == 1 else f"front-{number}.yaml")
        why = f"trial {trial.number} of the search {found.name}: held-out loss {trial.loss:.4f} at {trial.sparsity:g}"
        settings = {key: value for key, value in trial.values.items() if key != SPARSITY}
        winner.write(path, base, config, learn, settings, why)
        paths.append(str(path.resolve()))
    return paths


def _report(summary: Summary, directory: Path, run: Run) -> Path:
    figures: dict[str, Figure] = make_figures(
        summary.trials, summary.search.domains, summary.reference, summary.search.options.against
    )
    for name, figure in figures.items():
        figure.savefig(directory / f"{name}.png", dpi=150)
        run.log_figure(figure, f"{name}.png")
    page = directory / "report.html"
    write_atomically(page, render(summary, figures))
    run.log_artifact(page, "")
    for path in summary.recipes:
        run.log_artifact(Path(path), "")
    if summary.winners:
        best = outcome.finished(summary.trials)[0]
        run.log_metrics({"mask_loss.hard": best.loss or 0.0, "perplexity": best.perplexity or 0.0})
    run.log_table(
        [{"trial": t.number, "status": t.status, "loss": t.loss, **t.values} for t in summary.trials], "trials.csv"
    )
    return page
