"""Several trackers at once, of which one may be lost without ending the pipeline."""

from __future__ import annotations

import logging
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.tracking.base import RunPath, Status, Tracker

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)


class CompositeTracker(Tracker):
    """Passes every record to each tracker; the first is the one that is relied upon.

    A record that another tracker cannot take is skipped there. A tracker that could not open a run, or that is no
    longer ``alive`` after a failure, gets no more records. Either is said in one warning line when it first happens,
    and again in the summary. What the first tracker raises is raised: then there is nowhere left to keep records.
    """

    def __init__(self, first: Tracker, *others: Tracker) -> None:
        super().__init__()
        self._first = first
        self._others = others
        self._live = list(others)
        self._records = 0
        self._skipped: Counter[tuple[str, str]] = Counter()
        self._lost: list[str] = []

    def info(self) -> dict[str, str]:
        info = {key: value for tracker in (self._first, *self._others) for key, value in tracker.info().items()}
        if self._lost:
            info["note"] = " ".join(self._lost)
        return info

    def summary(self) -> list[str]:
        lines = [line for tracker in (self._first, *self._others) for line in tracker.summary()]
        lines += [f"{name} did not take {count} {what} record(s)." for (name, what), count in self._skipped.items()]
        return lines + self._lost

    def open_run(self, path: RunPath, tags: dict[str, str]) -> None:
        self._pass_on("open_run", path, tags)

    def log_params(self, path: RunPath, params: dict[str, str]) -> None:
        self._pass_on("log_params", path, params)

    def log_metrics(self, path: RunPath, metrics: dict[str, float], step: int | None) -> None:
        self._pass_on("log_metrics", path, metrics, step)

    def log_figure(self, path: RunPath, figure: Figure, name: str) -> None:
        self._pass_on("log_figure", path, figure, name)

    def log_dict(self, path: RunPath, value: Any, name: str) -> None:
        self._pass_on("log_dict", path, value, name)

    def log_table(self, path: RunPath, rows: list[dict[str, Any]], name: str) -> None:
        self._pass_on("log_table", path, rows, name)

    def log_artifact(self, path: RunPath, source: Path, folder: str) -> None:
        self._pass_on("log_artifact", path, source, folder)

    def end_run(self, path: RunPath, status: Status, reason: str | None) -> None:
        self._pass_on("end_run", path, status, reason)

    def _pass_on(self, method: str, *arguments: Any) -> None:
        getattr(self._first, method)(*arguments)
        for tracker in list(self._live):
            try:
                getattr(tracker, method)(*arguments)
            except Exception as error:
                self._failed(tracker, method, error)
        self._records += 1

    def _failed(self, tracker: Tracker, method: str, error: Exception) -> None:
        why = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        if method == "open_run" or not tracker.alive():
            self._live.remove(tracker)
            self._lost.append(
                f"{tracker} was lost at {datetime.now():%H:%M:%S} and has only the first {self._records} records."
                if self._records
                else f"{tracker} could not be used and has no record of this run."
            )
            log.warning("%s is lost, the run goes on without it (%s)", tracker, why)
            return
        what = method.removeprefix("log_")
        if not self._skipped[str(tracker), what]:
            log.warning("%s did not take a %s record, the run goes on (%s)", tracker, what, why)
        self._skipped[str(tracker), what] += 1
