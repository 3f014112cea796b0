"""Records in MLflow, through its client: no active run, no global state, one writer.

MLflow takes seconds to import and is imported when the first record is delivered.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shlex
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.artifacts.store import local_copy, write_atomically
from pipeline.config import TrackingConfig
from pipeline.errors import UserError
from pipeline.tracking.record_store import Store
from pipeline.tracking.redaction import HIDDEN, redact
from pipeline.tracking.registry import register

if TYPE_CHECKING:
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
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
PROBE_SECONDS = 3.0
#: Kinds of databases that MLflow writes to, with what their drivers call the seconds to wait for one.
_DATABASES = {"sqlite": "timeout", "postgresql": "connect_timeout", "mysql": "connect_timeout", "mssql": "timeout"}
_SCHEMES = ("http", "https", "file", "databricks", *_DATABASES)
STATES = "mlflow-*.json"
"""The files beside a journal that tell how far each store has come with it."""


class MlflowStore(Store):
    """Applies records to the MLflow store or server at ``uri``; failures are raised, see ``Outbox``.

    Every record carries its own time and every run its id, so that a record applied twice leaves nothing twice. A file
    in ``folder``, one for each store, keeps the runs' ids and how far delivery has come.
    """

    def __init__(self, uri: str, experiment: str, folder: Path) -> None:
        self._uri, self._experiment = uri, experiment
        self._shown_uri = redact(uri)
        which = hashlib.sha256(f"{uri} {experiment}".encode()).hexdigest()[:8]
        self._state_file = folder / STATES.replace("*", which)
        self._client: MlflowClient | None = None
        self._experiment_id = ""
        self._params: dict[str, dict[str, str]] = {}
        state = json.loads(self._state_file.read_text()) if self._state_file.exists() else {}
        self._ids: dict[str, str] = state.get("runs", {})
        self._delivered: int = state.get("delivered", 0)

    @classmethod
    def check(cls, settings: TrackingConfig, runs: Path) -> None:
        if settings.uri is None:
            default_uri(runs)
            return
        try:
            check_scheme(settings.uri)
        except ValueError as error:
            raise UserError(f"tracking.uri: {redact(settings.uri)}: {error}") from error

    @classmethod
    def of_run(cls, settings: TrackingConfig, runs: Path, folder: Path) -> MlflowStore:
        store = cls(settings.uri or default_uri(runs), settings.experiment, folder)
        store.acknowledge(store.delivered)  # also before anything is delivered: it says where the records belong
        return store

    @classmethod
    def known_to(cls, folder: Path, uri: str | None = None) -> Iterator[MlflowStore]:
        """See :meth:`Store.known_to`; one whose address holds a password is known with ``uri`` alone.

        Args:
            uri: of another store, in place of the one that it was tracked with.
        """
        for file in sorted(folder.glob(STATES)):
            state = json.loads(file.read_text())
            if uri:
                yield cls(uri, state["experiment"], folder)
                return
            if HIDDEN not in state["uri"]:
                yield cls(state["uri"], state["experiment"], folder)

    def __str__(self) -> str:
        return f"MLflow at {self._shown_uri}"

    @property
    def delivered(self) -> int:
        """See :attr:`Store.delivered`."""
        return self._delivered

    def acknowledge(self, end: int) -> None:
        """See :meth:`Store.acknowledge`."""
        self._delivered = end
        state = {"uri": self._shown_uri, "experiment": self._experiment, "delivered": end, "runs": self._ids}
        write_atomically(self._state_file, json.dumps(state, indent=1))

    def alive(self) -> bool:
        """Whether the store answers."""
        if self._client is None:
            return False
        try:
            _probe(self._uri)
            self._client.get_experiment(self._experiment_id)
        except Exception:
            return False
        return True

    def info(self) -> dict[str, str]:
        """``uri`` and, where there is one, ``run_id`` and ``ui_command``."""
        info = {"uri": self._shown_uri}
        root = next((id_ for run, id_ in self._ids.items() if "/" not in run), None)
        if root:
            info["run_id"] = root
            if not self._uri.startswith("http"):
                info["ui_command"] = f"mlflow ui --backend-store-uri {shlex.quote(self._shown_uri)}"
        return info

    def apply(self, record: dict[str, Any], folder: Path) -> None:
        """Take one record of a journal in ``folder``."""
        client = self._connect()
        run, when = record["run"], int(datetime.fromisoformat(record["time"]).timestamp() * 1000)
        if record["event"] == "start":
            self._open(client, run, record["parent"], record["tags"], when)
            return
        run_id = self._ids[run]
        match record["event"]:
            case "params":
                self._log_params(client, run, record["params"])
            case "metrics":
                _log_metrics(client, run_id, [(record["step"] or 0, record["metrics"])], when)
            case "series":
                values = zip(*record["curves"].values(), strict=True)
                points = [dict(zip(record["curves"], point, strict=True)) for point in values]
                _log_metrics(client, run_id, list(zip(record["steps"], points, strict=True)), when)
            case "figure" | "table":
                parent = str(Path(record["name"]).parent)
                client.log_artifact(run_id, str(folder / record["file"]), None if parent == "." else parent)
            case "dict":
                client.log_dict(run_id, record["value"], record["name"])
            case "artifact":
                client.log_artifact(run_id, record["source"], record["folder"] or None)
            case "input":
                _log_input(client, run_id, record)
            case "model":
                register(
                    client, run_id, local_copy(record["directory"]), record["name"], record["alias"], record["tags"]
                )
            case "end":
                if record["reason"]:
                    note = _fit(f"{record['status']}: {record['reason']}", TAG_LENGTH)
                    client.set_tag(run_id, "mlflow.note.content", note)
                client.set_terminated(run_id, record["status"], when)

    def _connect(self) -> MlflowClient:
        if self._client is not None:
            return self._client
        location = None
        if self._uri.startswith("sqlite:///"):
            from sqlalchemy import make_url

            database = Path(make_url(self._uri).database or "").resolve()
            database.parent.mkdir(parents=True, exist_ok=True)
            # Otherwise artifacts would go below the directory that the process happens to be in.
            location = (database.parent / "mlartifacts").as_uri()
        client = connect(self._uri)
        experiment = client.get_experiment_by_name(self._experiment)
        self._experiment_id = (
            experiment.experiment_id if experiment else client.create_experiment(self._experiment, location)
        )
        self._client = client
        return client

    def _open(self, client: MlflowClient, run: str, parent: str, tags: dict[str, str], when: int) -> None:
        run_id = self._ids.get(run)
        if run_id is not None and self._reopen(client, run, run_id):
            return
        if parent:
            tags = {"mlflow.parentRunId": self._ids[parent]} | tags
        name = run.removeprefix(f"{parent}/")
        created = client.create_run(self._experiment_id, when, _fit_tags(tags), name)
        # Runs below one that is gone from the store are out of sight there: they begin anew too.
        self._ids = {other: id_ for other, id_ in self._ids.items() if not other.startswith(f"{run}/")}
        self._ids[run] = created.info.run_id
        self._params[run] = {}
        # At once: a run that is forgotten would be created a second time.
        self.acknowledge(self._delivered)

    def _reopen(self, client: MlflowClient, run: str, run_id: str) -> bool:
        """Set the run back to running; False when the store no longer has it."""
        from mlflow.exceptions import MlflowException

        try:
            found = client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False
        if found.info.lifecycle_stage != "active":
            return False
        client.update_run(run_id, status="RUNNING")
        # The reason of an earlier end no longer holds.
        client.set_tag(run_id, "mlflow.note.content", "")
        self._params[run] = dict(found.data.params)
        return True

    def _log_params(self, client: MlflowClient, run: str, params: dict[str, str]) -> None:
        from mlflow.entities import Param, RunTag

        run_id = self._ids[run]
        if run not in self._params:
            self._params[run] = dict(client.get_run(run_id).data.params)
        known = self._params[run]
        params = {_name(key): _fit(value, PARAM_LENGTH) for key, value in params.items()}
        # MLflow never changes a parameter: what a continued run does differently is kept in a tag.
        changed = {key: value for key, value in params.items() if known.get(key, value) != value}
        new = [Param(key, value) for key, value in params.items() if key not in known]
        for batch in _batches(new, PARAMS_PER_BATCH):
            client.log_batch(run_id, params=batch)
        known.update({param.key: param.value for param in new})
        if changed:
            log.warning("parameters of run %s changed since it began: %s", run, ", ".join(changed))
            tags = _fit_tags({f"changed.{key}": value for key, value in changed.items()})
            for tag_batch in _batches([RunTag(key, value) for key, value in tags.items()], PARAMS_PER_BATCH):
                client.log_batch(run_id, tags=tag_batch)


def default_uri(runs: Path) -> str:
    """The store that all runs in a directory share.

    Raises:
        UserError: the directory's name means something else in a URI. Quoted, MLflow would make another directory.
    """
    from sqlalchemy import make_url

    database = str(runs.resolve() / "mlflow.db")
    uri = f"sqlite:///{database}"
    if make_url(uri).database != database:
        raise UserError(
            f"output: {runs} cannot hold MLflow's database; choose a path without ? and %, or a tracking.uri"
        )
    return uri


def check_scheme(uri: str) -> None:
    """Check that MLflow knows the kind of store that a URI names, without importing it.

    Raises:
        ValueError: it does not.
    """
    scheme, separator, _ = uri.partition("://")
    known = [*_SCHEMES, *(plugin.name for plugin in entry_points(group="mlflow.tracking_store"))]
    if separator and scheme.partition("+")[0].lower() not in known:
        raise ValueError(f"MLflow has no store {scheme}://, but {', '.join(known)}")


def connect(uri: str) -> MlflowClient:
    """A client of the store at ``uri``; raises at once where there is none of that kind, or it does not answer."""
    check_scheme(uri)
    _probe(uri)
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    # One warning says that a server is away; each retry would add another. A new database is no news either.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    from mlflow import MlflowClient

    for chatty in ("mlflow", "alembic"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri)


def _log_metrics(
    client: MlflowClient, run_id: str, points: Sequence[tuple[int, Mapping[str, float | str]]], when: int
) -> None:
    from mlflow.entities import Metric

    # JSON has no NaN: the journal holds it as a word.
    entities = [Metric(_name(key), float(value), when, step) for step, point in points for key, value in point.items()]
    for batch in _batches(entities, METRICS_PER_BATCH):
        client.log_batch(run_id, metrics=batch)


def _log_input(client: MlflowClient, run_id: str, record: dict[str, Any]) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(
        name=record["name"],
        digest=record["digest"],
        source_type="local",
        source=json.dumps({"source": record["source"]}),
        profile=json.dumps(record["facts"]),
    )
    client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", record["use"])])])


def _probe(uri: str) -> None:
    """Raise at once if no server listens at ``uri``; whatever one answers, also an error, is an answer.

    A database is opened: MLflow itself tries that for minutes.
    """
    scheme = uri.partition("://")[0].partition("+")[0].lower()
    if scheme in _DATABASES:
        import sqlalchemy

        seconds = {_DATABASES[scheme]: PROBE_SECONDS if scheme == "sqlite" else int(PROBE_SECONDS)}
        engine = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.pool.NullPool, connect_args=seconds)
        engine.connect().close()
        return
    if not uri.startswith(("http://", "https://")):
        return
    # urllib takes a password for a port.
    address = redact(uri).replace(f"{HIDDEN}@", "").rstrip("/")
    try:
        urllib.request.urlopen(f"{address}/health", timeout=PROBE_SECONDS).close()
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
