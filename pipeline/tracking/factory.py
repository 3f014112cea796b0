"""The tracker a pipeline run uses."""

from __future__ import annotations

from pathlib import Path

from pipeline.tracking.base import Tracker
from pipeline.tracking.composite import CompositeTracker
from pipeline.tracking.local import LocalRecords
from pipeline.tracking.mlflow_tracker import MlflowTracker


def make_tracker(uri: str | None, experiment: str, directory: Path) -> Tracker:
    """Local records in ``directory``/tracking and, unless ``uri`` is ``"none"``, MLflow.

    Args:
        uri: An MLflow tracking URI. ``None`` means an SQLite file beside ``directory``, shared by all runs there.
        experiment: The MLflow experiment's name; created if it does not exist.
        directory: The run's own directory. Used again after a restart, it continues the same runs.
    """
    records = LocalRecords(directory / "tracking")
    if uri == "none":
        return records
    uri = uri or f"sqlite:///{directory.resolve().parent / 'mlflow.db'}"
    return CompositeTracker(records, MlflowTracker(uri, experiment, directory / "tracking" / "mlflow.json"))
