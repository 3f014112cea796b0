"""The tracker a pipeline run uses, and the kinds of stores there are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pipeline.config import TrackingConfig
from pipeline.errors import UserError
from pipeline.tracking.journal import Journal
from pipeline.tracking.local import LocalRecords
from pipeline.tracking.mlflow_store import MlflowStore
from pipeline.tracking.outbox import Outbox
from pipeline.tracking.record_store import Store
from pipeline.tracking.tracker import Tracker

#: By the names in ``tracking.stores``. A new kind of store is its class and an entry here.
STORES: dict[str, type[Store]] = {"mlflow": MlflowStore}


def make_tracker(settings: TrackingConfig, directory: Path) -> Tracker:
    """Local records in ``directory``/tracking, delivered to each of the stores.

    Args:
        directory: the run's own directory. Used again after a restart, it continues the same runs.
    """

    def outboxes(journal: Journal) -> list[Outbox]:
        kinds = [STORES[name] for name in settings.active_stores]
        return [Outbox(journal.file, kind.of_run(settings, directory.parent, journal.folder)) for kind in kinds]

    return LocalRecords(directory / "tracking", outboxes)


def check_stores(settings: TrackingConfig, runs: Path) -> None:
    """Look for what can be known to go wrong with the stores of a run.

    Args:
        runs: the directory of all runs, on this machine.

    Raises:
        UserError: there is no such kind of store, or it cannot be what the settings say.
    """
    for name in settings.active_stores:
        if name not in STORES:
            raise UserError(f"tracking.stores: must be of {', '.join(STORES)}, not {name!r}")
        STORES[name].check(settings, runs)


def stores_of(folder: Path, uri: str | None) -> Iterator[Store]:
    """The stores that the journal in ``folder`` was tracked with.

    Args:
        uri: of an MLflow store in their place.
    """
    if uri:
        yield from MlflowStore.known_to(folder, uri)
        return
    for kind in STORES.values():
        yield from kind.known_to(folder)
