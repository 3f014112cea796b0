"""The variants of many runs side by side, from the tracking store; and the store's own completion."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.text import Text

from pipeline.artifacts.store import write_atomically
from pipeline.errors import UserError
from pipeline.reporting import RunResults
from pipeline.reporting.html import page
from pipeline.reporting.page_parts import results_table, tasks_table
from pipeline.reporting.terminal import results_table as terminal_table
from pipeline.results.recording import MEAN, MEAN_ABOVE_CHANCE
from pipeline.stages.origin import Origin
from pipeline.tracking import default_uri
from pipeline.tracking.mlflow_store import check_scheme, connect
from pipeline.tracking.redaction import redact, remember
from pipeline.tracking.registry import MEASURED_ON
from pipeline.tracking.sync import sync

FILE = "compare.html"
MEANS = {MEAN: "mean_accuracy", MEAN_ABOVE_CHANCE: "mean_above_chance"}
"""Names among the metrics of the means over tasks, and their keys in a row."""


def compare(query: str, runs: Path, uri: str | None, experiment: str) -> None:
    """Print one table for each model and set of texts and tasks, and write the same to ``runs``/compare.html.

    Args:
        query: a filter in MLflow's language over the tags, parameters and metrics of variants.

    Raises:
        UserError: there is no store, experiment or variant, or the filter is not valid.
    """
    remember(uri or "")
    if uri is None and not (runs / "mlflow.db").is_file():
        raise UserError(f"--runs {runs}: no mlflow.db there; give the directory of the runs, or --uri of a server")
    found = _search(uri or default_uri(runs), experiment, query)
    if not found:
        raise UserError(f"filter {query!r}: no measured variant in the experiment {experiment}")
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in found:
        groups.setdefault((run["model"], run["measured_on"]), []).append(run)
    console, parts = Console(), []
    for (model, _), variants in groups.items():
        results = cast(RunResults, {"variants": variants})
        title = f"{model}, context of {variants[0]['context_length']} tokens"
        console.print(Text(f"\n{title}", style="bold"))
        console.print(terminal_table(results, console.width))
        parts.append(f"<section><h2>{html.escape(title)}</h2>{results_table(results)}{tasks_table(results)}</section>")
    note = "Bold: best at its sparsity. ±: one standard error. Tables are apart where the texts or tasks differ."
    console.print(Text(f"\n{note}", style="dim"))
    body = f'<header><h1>Comparison of runs</h1><p class="done">{html.escape(note)}</p></header>{"".join(parts)}'
    runs.mkdir(parents=True, exist_ok=True)
    write_atomically(runs / FILE, page("Comparison of runs", body))
    print(f"Page: {(runs / FILE).resolve()}")


def upload(runs: Path, uri: str | None) -> int:
    """Deliver what stores missed, see :func:`pipeline.tracking.sync.sync`; the exit code says whether all of it was.

    Raises:
        UserError: there is no such directory, or no store of that kind.
    """
    remember(uri or "")
    if not runs.is_dir():
        raise UserError(f"--runs {runs}: there is no such directory; give the directory of the runs")
    if uri:
        try:
            check_scheme(uri)
        except ValueError as error:
            raise UserError(f"--uri {redact(uri)}: {error}") from error
    complete = True
    for run, sent, left in sync(runs, uri):
        print(f"{run}: {sent} records sent{''.join(f'; {line}' for line in left)}")
        complete = complete and not left
    return 0 if complete else 1


def _search(uri: str, experiment: str, query: str) -> list[dict[str, Any]]:
    """The variants' rows as the report knows them, oldest first."""
    try:
        client = connect(uri)
        where = client.get_experiment_by_name(experiment)
    except Exception as error:  # of MLflow, a database or a connection, each with kinds of its own
        # One that reads an address otherwise than we do names a piece of the password as the host or the port.
        reason = type(error).__name__ if redact(uri) != uri else " ".join(str(error).split())[:300]
        raise UserError(f"--uri {redact(uri)}: {reason}") from error
    from mlflow.exceptions import MlflowException

    if where is None:
        raise UserError(f"--experiment {experiment}: there is none of this name")
    wanted = " and ".join(part for part in ("tags.stage = 'variant'", query) if part)
    found: list[Any] = []
    token = None
    try:
        while True:
            some = client.search_runs([where.experiment_id], wanted, order_by=["start_time ASC"], page_token=token)
            found += some
            if (token := some.token) is None:
                break
    except MlflowException as error:
        raise UserError(f"filter {query!r}: {' '.join(str(error).split())[:200]}") from error
    parents = {run.data.tags["mlflow.parentRunId"] for run in found}
    names = {parent: client.get_run(parent).info.run_name for parent in parents}
    return [_row(run, names[run.data.tags["mlflow.parentRunId"]], len(parents) > 1) for run in found]


def _row(run: Any, parent: str, several: bool) -> dict[str, Any]:
    """A variant's row from its run: the reverse of :func:`pipeline.results.recording.variant_metrics`."""
    tags, params, metrics = run.data.tags, run.data.params, run.data.metrics
    target = None if params["target_sparsity"] == "None" else float(params["target_sparsity"])
    texts, tasks = _named(metrics, "perplexity."), [name for name in _named(metrics, "acc.") if name not in MEANS]
    return {
        # As in a report, with the run that it belongs to: the method stands before the @ there too.
        "name": f"{run.info.run_name} {parent}" if several else run.info.run_name,
        "model": tags.get("model", "?"),
        "measured_on": tags.get(MEASURED_ON, ""),
        "context_length": params.get("context_length", "?"),
        "method": params["method"],
        "origin": params.get("origin") or _origin(target, metrics),
        "target_sparsity": target,
        "scope": params["scope"],
        "weights_changed": params["weights_changed"] == "True",
        "perplexity": {
            text: {"perplexity": metrics[f"perplexity.{text}"], "stderr_nll": metrics.get(f"stderr_nll.{text}")}
            for text in texts
        },
        "tasks": {
            task: {"acc": metrics[f"acc.{task}"], "acc_stderr": metrics.get(f"acc_stderr.{task}")} for task in tasks
        },
        **{
            key: {"acc": metrics[f"acc.{name}"], "stderr": metrics[f"acc_stderr.{name}"]}
            for name, key in MEANS.items()
            if f"acc.{name}" in metrics
        },
        **{
            key: metrics[key]
            for key in ("real_sparsity", "block_sparsity", "seconds", "training_tokens", "decode_tokens_per_second")
            if key in metrics
        },
    }


def _origin(target: float | None, metrics: Mapping[str, float]) -> Origin:
    """The origin of a row that version 0.1.0 recorded without."""
    if target is None:
        return "dense"
    return "learned" if metrics.get("training_tokens") else "layer-wise"


def _named(metrics: Iterable[str], prefix: str) -> list[str]:
    return sorted(name.removeprefix(prefix) for name in metrics if name.startswith(prefix))
