"""Records in MLflow, through its client: no active run, no global state, one writer.

MLflow takes seconds to import and is imported when the first run opens.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.tracking.base import RunPath, Status, Tracker
from pipeline.tracking.values import as_csv

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

T = TypeVar("T")

# MLflow's own limits; its server refuses a whole batch for one value above them.
KEY_LENGTH, PARAM_LENGTH, TAG_LENGTH = 250, 6000, 5000
PARAMS_PER_BATCH, METRICS_PER_BATCH = 100, 1000

# By default MLflow retries a dead server for minutes and reports usage to its makers. A user's own settings win.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
PROBE_SECONDS = 3.0


class MlflowTracker(Tracker):
    """Writes to the MLflow store or server at ``uri``; failures are raised, see ``CompositeTracker``.

    ``state_file`` keeps the runs' ids: a restarted process continues the same parent and, by name, the same children.
    """

    def __init__(self, uri: str, experiment: str, state_file: Path) -> None:
        super().__init__()
        self._uri = uri
        # A database URI may carry a password, which must not end up in a report.
        self._shown_uri = re.sub(r"://[^/@]+@", "://***@", uri)
        self._experiment = experiment
        self._state_file = state_file
        self._client: MlflowClient | None = None
        self._experiment_id = ""
        self._root_id: str | None = None
        self._ids: dict[str, str] = {}
        self._params: dict[str, dict[str, str]] = {}

    def __str__(self) -> str:
        return f"MLflow at {self._shown_uri}"

    def alive(self) -> bool:
        if self._client is None:
            return False
        try:
            _probe(self._uri)
            self._client.get_experiment(self._experiment_id)
        except Exception:
            return False
        return True

    def info(self) -> dict[str, str]:
        info = {"uri": self._shown_uri}
        if self._root_id:
            info["run_id"] = self._root_id
            if not self._uri.startswith("http"):
                info["ui_command"] = f"mlflow ui --backend-store-uri {shlex.quote(self._shown_uri)}"
        return info

    def summary(self) -> list[str]:
        if self._root_id is None:
            return []
        command = self.info().get("ui_command")
        look = f" Look at it with: {command}" if command else ""
        return [f"MLflow at {self._shown_uri} has run {self._root_id} of experiment {self._experiment!r}.{look}"]

    def open_run(self, path: RunPath, tags: dict[str, str]) -> None:
        client = self._connect()
        key = "/".join(path)
        run_id = self._ids.get(key)
        if run_id is None or not self._reopen(client, key, run_id):
            if len(path) > 1:
                tags = {"mlflow.parentRunId": self._ids["/".join(path[:-1])]} | tags
            run = client.create_run(self._experiment_id, tags=_fit_tags(tags), run_name=path[-1])
            # Runs below one that is gone from the store are out of sight there: they begin anew too.
            self._ids = {other: id_ for other, id_ in self._ids.items() if not other.startswith(f"{key}/")}
            self._ids[key] = run.info.run_id
            self._params[key] = {}
            self._save_state()
        if len(path) == 1:
            self._root_id = self._ids[key]

    def log_params(self, path: RunPath, params: dict[str, str]) -> None:
        from mlflow.entities import Param, RunTag

        client, run_id = self._run(path)
        known = self._params["/".join(path)]
        params = {_name(key): _fit(value, PARAM_LENGTH) for key, value in params.items()}
        # MLflow never changes a parameter: what a continued run does differently is kept in a tag.
        changed = {key: value for key, value in params.items() if known.get(key, value) != value}
        new = [Param(key, value) for key, value in params.items() if key not in known]
        for batch in _batches(new, PARAMS_PER_BATCH):
            client.log_batch(run_id, params=batch)
        known.update({param.key: param.value for param in new})
        if changed:
            log.warning("parameters of run %s changed since it began: %s", "/".join(path), ", ".join(changed))
            tags = _fit_tags({f"changed.{key}": value for key, value in changed.items()})
            for tag_batch in _batches([RunTag(key, value) for key, value in tags.items()], PARAMS_PER_BATCH):
                client.log_batch(run_id, tags=tag_batch)

    def log_metrics(self, path: RunPath, metrics: dict[str, float], step: int | None) -> None:
        from mlflow.entities import Metric

        client, run_id = self._run(path)
        now = int(time.time() * 1000)
        entities = [Metric(_name(key), value, now, step or 0) for key, value in metrics.items()]
        for batch in _batches(entities, METRICS_PER_BATCH):
            client.log_batch(run_id, metrics=batch)

    def log_figure(self, path: RunPath, figure: Figure, name: str) -> None:
        client, run_id = self._run(path)
        client.log_figure(run_id, figure, name, save_kwargs={"dpi": 150})

    def log_dict(self, path: RunPath, value: Any, name: str) -> None:
        client, run_id = self._run(path)
        client.log_dict(run_id, value, name)

    def log_table(self, path: RunPath, rows: list[dict[str, Any]], name: str) -> None:
        # Not the client's log_table: it appends, so that a restarted run would hold every row twice.
        client, run_id = self._run(path)
        client.log_text(run_id, as_csv(rows), name)

    def log_artifact(self, path: RunPath, source: Path, folder: str) -> None:
        client, run_id = self._run(path)
        client.log_artifact(run_id, str(source), folder or None)

    def end_run(self, path: RunPath, status: Status, reason: str | None) -> None:
        client, run_id = self._run(path)
        if reason:
            client.set_tag(run_id, "mlflow.note.content", _fit(f"{status}: {reason}", TAG_LENGTH))
        client.set_terminated(run_id, status)

    def _run(self, path: RunPath) -> tuple[MlflowClient, str]:
        assert self._client is not None, "a run is opened before it is logged to"
        return self._client, self._ids["/".join(path)]

    def _connect(self) -> MlflowClient:
        if self._client is not None:
            return self._client
        _probe(self._uri)
        for key, value in ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        # One warning says that a server is lost; each retry would add another.
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
        from mlflow import MlflowClient

        location = None
        if self._uri.startswith("sqlite:///"):
            database = Path(self._uri.removeprefix("sqlite:///")).resolve()
            database.parent.mkdir(parents=True, exist_ok=True)
            # Otherwise artifacts would go below the directory that the process happens to be in.
            location = (database.parent / "mlartifacts").as_uri()
        client = MlflowClient(tracking_uri=self._uri)
        experiment = client.get_experiment_by_name(self._experiment)
        self._experiment_id = (
            experiment.experiment_id if experiment else client.create_experiment(self._experiment, location)
        )
        self._ids = self._load_state()
        self._client = client
        return client

    def _reopen(self, client: MlflowClient, key: str, run_id: str) -> bool:
        """Set the run back to running; False when the store no longer has it."""
        from mlflow.exceptions import MlflowException

        try:
            run = client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False
        if run.info.lifecycle_stage != "active":
            return False
        client.update_run(run_id, status="RUNNING")
        self._params[key] = dict(run.data.params)
        return True

    def _load_state(self) -> dict[str, str]:
        if not self._state_file.exists():
            return {}
        state = json.loads(self._state_file.read_text(encoding="utf-8"))
        here = (self._shown_uri, self._experiment_id)
        return dict(state["runs"]) if (state["uri"], state["experiment_id"]) == here else {}

    def _save_state(self) -> None:
        state = {"uri": self._shown_uri, "experiment_id": self._experiment_id, "runs": self._ids}
        self._state_file.parent.mkdir(parents=True, exist_ok=True)
        half = self._state_file.with_suffix(".tmp")
        half.write_text(json.dumps(state, indent=1), encoding="utf-8")
        half.replace(self._state_file)


def _probe(uri: str) -> None:
    """Raise at once if no server listens at ``uri``; whatever one answers, also an error, is an answer."""
    if not uri.startswith(("http://", "https://")):
        return
    try:
        urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError as answer:
        answer.close()
    except urllib.error.URLError as error:
        # MLflow has its own settings for certificates that this check does not know.
        if not isinstance(error.reason, ssl.SSLError):
            raise


def _name(key: str) -> str:
    """``key`` in the characters that MLflow takes in names."""
    return re.sub(r"[^\w./: -]", "_", key, flags=re.ASCII)[:KEY_LENGTH]


def _fit(value: str, length: int) -> str:
    return value if len(value) <= length else f"{value[: length - 1]}…"


def _fit_tags(tags: Mapping[str, str]) -> dict[str, str]:
    return {_name(key): _fit(value, TAG_LENGTH) for key, value in tags.items()}


def _batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
