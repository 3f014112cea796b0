"""The tracker a pipeline run uses."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import UserError
from pipeline.tracking.base import Tracker
from pipeline.tracking.journal import Journal
from pipeline.tracking.local import LocalRecords
from pipeline.tracking.mlflow_store import MlflowStore
from pipeline.tracking.outbox import Outbox


def make_tracker(uri: str | None, experiment: str, directory: Path) -> Tracker:
    """Local records in ``directory``/tracking and, unless ``uri`` is ``"none"``, MLflow.

    Args:
        uri: An MLflow tracking URI. ``None`` means an SQLite file beside ``directory``, shared by all runs there.
        experiment: The MLflow experiment's name; created if it does not exist.
        directory: The run's own directory. Used again after a restart, it continues the same runs.
    """
    if uri == "none":
        return LocalRecords(directory / "tracking")
    store_uri = uri or default_uri(directory.parent)

    def outbox(journal: Journal) -> Outbox:
        return Outbox(journal.file, MlflowStore(store_uri, experiment, journal.folder))

    return LocalRecords(directory / "tracking", outbox)


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
