"""Records in the run's own directory: always there, whatever happens to a tracking server."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.tracking.journal import InUseError, Journal
from pipeline.tracking.outbox import Outbox
from pipeline.tracking.tracker import RunPath, Tracker

log = logging.getLogger(__name__)


class LocalRecords(Tracker):
    """Writes every record to a journal and has it sent on from there.

    Args:
        directory: the records of a pipeline run lie in a folder of its name below it.
        make_outboxes: for a journal, what delivers it to each store.
    """

    def __init__(self, directory: Path, make_outboxes: Callable[[Journal], list[Outbox]] | None = None) -> None:
        super().__init__()
        self._directory, self._make_outboxes = directory, make_outboxes
        self._journal: Journal | None = None
        self._outboxes: list[Outbox] = []
        self._lost = 0

    def info(self) -> dict[str, str]:
        if self._journal is None:
            return {}
        infos = [outbox.info() for outbox in self._outboxes]
        together = {key: value for info in reversed(infos) for key, value in info.items()}  # the first store's, if any
        if notes := [info["note"] for info in infos if "note" in info]:
            together["note"] = " ".join(notes)
        return together | {"records": str(self._journal.file)}

    def summary(self) -> list[str]:
        if self._journal is None:
            return []
        told = [line for outbox in self._outboxes for line in outbox.summary()]
        kept = f"Every record of this run is in {self._journal.file}."
        if self._lost:
            kept = f"{self._lost} records of this run could not be written; the others are in {self._journal.file}."
        return [kept, *told]

    def open_run(self, path: RunPath, tags: dict[str, str]) -> None:
        """See :meth:`Tracker.open_run`.

        Raises:
            UserError: another process is at this very run.
        """
        if len(path) == 1:
            try:
                self._journal = Journal(self._directory / _plain(path[0]))
            except InUseError as error:
                raise UserError(f"output: {error}: the same run is under way") from None
            self._outboxes = self._make_outboxes(self._journal) if self._make_outboxes else []
        self.record(path, "start", parent="/".join(path[:-1]), tags=tags)

    def last_step(self, path: RunPath) -> int:
        assert self._journal is not None
        return self._journal.last_steps.get("/".join(path), -1)

    def record(self, path: RunPath, event: str, **fields: Any) -> None:
        """See :meth:`Tracker.record`.

        What cannot be written, on a full disk, does not end the run; it is said once, and in the summary.
        """
        with self.lock:
            assert self._journal is not None, "a run is opened before it is logged to"
            last = event == "end" and len(path) == 1
            try:
                self._journal.append("/".join(path), event, **fields)
            except OSError as error:
                self._lose(error)
            for outbox in self._outboxes:
                try:
                    outbox.deliver(now=last)
                except OSError as error:  # of the file that says how far delivery has come
                    log.warning("%s cannot be told how far it has come (%s)", outbox, error)
            if last:
                self._journal.close()

    def record_file(self, path: RunPath, event: str, name: str, write: Callable[[Path], object]) -> None:
        with self.lock:
            assert self._journal is not None, "a run is opened before it is logged to"
            file = self._journal.folder.joinpath(*map(_plain, path[1:]), name)
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                write(file)
            except OSError as error:
                self._lose(error)
            else:
                self.record(path, event, name=name, file=str(file.relative_to(self._journal.folder)))

    def _lose(self, error: OSError) -> None:
        if not self._lost:
            log.warning("the run goes on without records that cannot be written (%s)", error)
        self._lost += 1


def _plain(name: str) -> str:
    return re.sub(r"[^\w.@+-]", "_", name)
