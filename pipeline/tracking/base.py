"""The interface that stages log through: a tracker keeps records, a run is a handle that writes to it."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from pipeline.tracking.values import flatten, jsonable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Status = Literal["FINISHED", "FAILED", "KILLED"]

RunPath = tuple[str, ...]
"""A run's name preceded by those of its parents. It identifies the run, in this process and after a restart."""


class Run:
    """One run of a tracker: a pipeline run, or a stage or trial nested in it.

    As a context manager it ends itself: FINISHED, KILLED when interrupted, FAILED on any other exception.
    """

    def __init__(self, tracker: Tracker, path: RunPath) -> None:
        self.path = path
        self._tracker = tracker
        self._children: list[Run] = []
        self._ended = False

    @property
    def name(self) -> str:
        """The run's own name, without its parents'."""
        return self.path[-1]

    def child(self, name: str, tags: Mapping[str, str] | None = None) -> Run:
        """Open the run ``name`` below this one, or continue it if it exists."""
        return self._tracker.start_run(name, parent=self, tags=tags)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record what the run was asked to do; nested keys are joined with dots."""
        with self._tracker.lock:
            self._tracker.log_params(self.path, flatten(params))

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Record measurements, at ``step`` if they belong to a series."""
        with self._tracker.lock:
            self._tracker.log_metrics(self.path, {key: float(value) for key, value in metrics.items()}, step)

    def log_figure(self, figure: Figure, name: str) -> None:
        """Record a matplotlib figure as an image; ``name`` ends in ``.png``."""
        with self._tracker.lock:
            self._tracker.log_figure(self.path, figure, name)

    def log_dict(self, value: Any, name: str) -> None:
        """Record plain data as JSON; ``name`` ends in ``.json``."""
        with self._tracker.lock:
            self._tracker.log_dict(self.path, jsonable(value), name)

    def log_table(self, rows: Sequence[Mapping[str, Any]], name: str) -> None:
        """Record rows with named columns; ``name`` ends in ``.csv``. Logging it again replaces it."""
        with self._tracker.lock:
            self._tracker.log_table(self.path, jsonable(rows), name)

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Record a file, or a directory with all it holds, under ``folder`` of the run's artifacts."""
        with self._tracker.lock:
            self._tracker.log_artifact(self.path, path, folder)

    def end(self, status: Status = "FINISHED", reason: str | None = None) -> None:
        """End the run, after those of its children that are still open. Ending it twice is ending it once."""
        with self._tracker.lock:
            if self._ended:
                return
            self._ended = True
            for child in self._children:
                child.end(status, reason)
            self._tracker.end_run(self.path, status, reason)

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.end()
        else:
            self.end("FAILED" if isinstance(error, Exception) else "KILLED", f"{type(error).__name__}: {error}")


class Tracker(ABC):
    """Keeps the records of runs. Stages call the methods of :class:`Run`; those of a tracker are for implementations.

    The methods get parameters already flattened to strings and data that JSON can hold, one call at a time.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()

    def start_run(self, name: str, *, parent: Run | None = None, tags: Mapping[str, str] | None = None) -> Run:
        """Open the run ``name`` below ``parent``, or continue the one of that name which an earlier process left."""
        with self.lock:
            run = Run(self, (*parent.path, name) if parent else (name,))
            self.open_run(run.path, dict(tags or {}))
            if parent:
                parent._children.append(run)
            return run

    def alive(self) -> bool:
        """Whether records can still be written; asked after one could not be."""
        return True

    def info(self) -> dict[str, str]:
        """Where the records lie, for the report: ``uri``, ``run_id``, ``ui_command``, ``records``, ``note``."""
        return {}

    def summary(self) -> list[str]:
        """What was kept where, one sentence a line, for the end of a run."""
        return []

    @abstractmethod
    def open_run(self, path: RunPath, tags: dict[str, str]) -> None:
        """Create the run or continue it."""

    @abstractmethod
    def log_params(self, path: RunPath, params: dict[str, str]) -> None:
        """See :meth:`Run.log_params`."""

    @abstractmethod
    def log_metrics(self, path: RunPath, metrics: dict[str, float], step: int | None) -> None:
        """See :meth:`Run.log_metrics`."""

    @abstractmethod
    def log_figure(self, path: RunPath, figure: Figure, name: str) -> None:
        """See :meth:`Run.log_figure`."""

    @abstractmethod
    def log_dict(self, path: RunPath, value: Any, name: str) -> None:
        """See :meth:`Run.log_dict`."""

    @abstractmethod
    def log_table(self, path: RunPath, rows: list[dict[str, Any]], name: str) -> None:
        """See :meth:`Run.log_table`."""

    @abstractmethod
    def log_artifact(self, path: RunPath, source: Path, folder: str) -> None:
        """See :meth:`Run.log_artifact`."""

    @abstractmethod
    def end_run(self, path: RunPath, status: Status, reason: str | None) -> None:
        """See :meth:`Run.end`."""


class NoTracker(Tracker):
    """Keeps nothing: for using a stage on its own."""

    def open_run(self, path: RunPath, tags: dict[str, str]) -> None: ...
    def log_params(self, path: RunPath, params: dict[str, str]) -> None: ...
    def log_metrics(self, path: RunPath, metrics: dict[str, float], step: int | None) -> None: ...
    def log_figure(self, path: RunPath, figure: Figure, name: str) -> None: ...
    def log_dict(self, path: RunPath, value: Any, name: str) -> None: ...
    def log_table(self, path: RunPath, rows: list[dict[str, Any]], name: str) -> None: ...
    def log_artifact(self, path: RunPath, source: Path, folder: str) -> None: ...
    def end_run(self, path: RunPath, status: Status, reason: str | None) -> None: ...
