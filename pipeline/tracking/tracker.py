"""The interface that stages log through: a tracker keeps records, a run is a handle that writes to it."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from pipeline.artifacts.store import local_copy
from pipeline.tracking.redaction import redact
from pipeline.tracking.values import as_csv, flatten, jsonable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Status = Literal["FINISHED", "FAILED", "KILLED"]

RunPath = tuple[str, ...]
"""A run's name preceded by those of its parents. It identifies the run, in this process and after a restart."""


class Run:
    """One run of a tracker: a pipeline run, or a stage, trial or variant nested in it.

    As a context manager it ends itself: FINISHED, KILLED when interrupted, FAILED on any other exception.
    """

    def __init__(self, tracker: Tracker, path: RunPath, tags: Mapping[str, str]) -> None:
        self.path = path
        self.tags = dict(tags)
        self._tracker = tracker
        self._children: list[Run] = []
        self._ended = False

    @property
    def name(self) -> str:
        """The run's own name, without its parents'."""
        return self.path[-1]

    @property
    def last_step(self) -> int:
        """The last step that this run has metrics of, from an earlier process too; -1 before the first."""
        return self._tracker.last_step(self.path)

    def child(self, name: str, tags: Mapping[str, str] | None = None) -> Run:
        """Open the run ``name`` below this one, or continue it if it exists. It inherits this run's tags."""
        return self._tracker.start_run(name, parent=self, tags=tags)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record what the run was asked to do; nested keys are joined with dots."""
        self._tracker.record(self.path, "params", params=flatten(redact(params)))

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Record measurements, at ``step`` if they belong to a series."""
        self._tracker.record(self.path, "metrics", metrics={k: float(v) for k, v in metrics.items()}, step=step)

    def log_series(self, steps: Sequence[int], curves: Mapping[str, Sequence[float]]) -> None:
        """Record whole curves at once, one value for each of ``steps``."""
        self._tracker.record(self.path, "series", steps=list(steps), curves={k: list(v) for k, v in curves.items()})

    def log_figure(self, figure: Figure, name: str) -> None:
        """Record a matplotlib figure as an image; ``name`` ends in ``.png``."""
        self._tracker.record_file(self.path, "figure", name, lambda path: figure.savefig(path, dpi=150))

    def log_dict(self, value: Any, name: str) -> None:
        """Record plain data as JSON; ``name`` ends in ``.json``."""
        self._tracker.record(self.path, "dict", name=name, value=value)

    def log_table(self, rows: Sequence[Mapping[str, Any]], name: str) -> None:
        """Record rows with named columns; ``name`` ends in ``.csv``. Logging it again replaces it."""
        text = as_csv(redact(jsonable(rows)))
        self._tracker.record_file(self.path, "table", name, lambda path: path.write_text(text, encoding="utf-8"))

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Record a file, or a directory with all it holds, under ``folder`` of the run's artifacts."""
        self._tracker.record(self.path, "artifact", source=str(path), folder=folder)

    def log_input(self, name: str, digest: str, source: str, use: str, facts: Mapping[str, Any]) -> None:
        """Record a data set that went into the run.

        Args:
            digest: fingerprint of its content.
            source: where it comes from, for people.
            use: what for: training, validation or evaluation.
            facts: its size and the like.
        """
        self._tracker.record(self.path, "input", name=name, digest=digest, source=source, use=use, facts=dict(facts))

    def log_model(self, directory: str, name: str, alias: str, tags: Mapping[str, str]) -> None:
        """Register a Hugging Face directory as a version of the model ``name``.

        Args:
            alias: given to this version if none has it, or if this one is better: a lower ``tags["score"]``, where
                the holder's ``tags["measured_on"]`` is the same, or another ``tags["measured_on"]``.
        """
        if redact(directory) != directory:
            # The record will not say how to get there.
            directory = str(local_copy(directory))
        self._tracker.record(self.path, "model", directory=directory, name=name, alias=alias, tags=dict(tags))

    def end(self, status: Status = "FINISHED", reason: str | None = None) -> None:
        """End the run, after those of its children that are still open. Ending it twice is ending it once."""
        with self._tracker.lock:
            if self._ended:
                return
            self._ended = True
            for child in self._children:
                child.end(status, reason)
            self._tracker.record(self.path, "end", status=status, reason=reason)

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.end()
        elif isinstance(error, Exception):
            self.end("FAILED", f"{type(error).__name__}: {error}")
        else:
            self.end("KILLED", str(error) or type(error).__name__)


class Tracker(ABC):
    """Keeps the records of runs. Stages call the methods of :class:`Run`, which call those below."""

    def __init__(self) -> None:
        self.lock = threading.RLock()

    def start_run(self, name: str, *, parent: Run | None = None, tags: Mapping[str, str] | None = None) -> Run:
        """Open the run ``name`` below ``parent``, or continue the one of that name which an earlier process left."""
        with self.lock:
            inherited = parent.tags if parent else {}
            run = Run(self, (*parent.path, name) if parent else (name,), {**inherited, **(tags or {})})
            self.open_run(run.path, run.tags)
            if parent:
                parent._children.append(run)
            return run

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
    def last_step(self, path: RunPath) -> int:
        """See :attr:`Run.last_step`."""

    @abstractmethod
    def record(self, path: RunPath, event: str, **fields: Any) -> None:
        """Keep what happened to a run; see the methods of :class:`Run` for the events."""

    @abstractmethod
    def record_file(self, path: RunPath, event: str, name: str, write: Callable[[Path], object]) -> None:
        """Keep a file that ``write`` makes."""


class NoTracker(Tracker):
    """Keeps nothing: for using a stage on its own."""

    def open_run(self, path: RunPath, tags: dict[str, str]) -> None: ...
    def last_step(self, path: RunPath) -> int:  # noqa: ARG002 - it has none of any run
        return -1

    def record(self, path: RunPath, event: str, **fields: Any) -> None: ...
    def record_file(self, path: RunPath, event: str, name: str, write: Callable[[Path], object]) -> None: ...
