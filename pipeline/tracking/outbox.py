"""From a journal to a store that may be away: nothing is lost, and nothing waits for it."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from pipeline.program import program
from pipeline.tracking.journal import read
from pipeline.tracking.record_store import Store
from pipeline.tracking.redaction import HIDDEN, redact

log = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 30.0, 300.0
"""Seconds before a store that is away is tried again; doubled each time."""


class Outbox:
    """Delivers a journal in its order.

    A record that the store refuses is left out. When the store is away, records wait in the journal and delivery is
    tried again now and then. Either is said in one line when it first happens, and again in the summary.
    """

    def __init__(self, file: Path, store: Store) -> None:
        self._file, self._store = file, store
        self._is_away = False
        self._pause = self._next_try = 0.0
        self._refused: dict[str, int] = {}

    def deliver(self, now: bool = False) -> bool:
        """Deliver what waits; true when nothing waits any longer.

        Args:
            now: try also a store that was away a moment ago.
        """
        if not now and time.monotonic() < self._next_try:
            return False
        end = start = self._store.delivered
        try:
            for record, after in read(self._file, start):
                try:
                    self._store.apply(record, self._file.parent)
                except Exception as error:
                    if not self._store.alive():
                        self._away(error)
                        return False
                    self._refuse(record["event"], error)
                end = after
        finally:
            # Also when interrupted between two records.
            if end != start:
                self._store.acknowledge(end)
        if self._is_away:
            log.warning("%s is back and has all records", self._store)
        self._is_away, self._pause, self._next_try = False, 0.0, 0.0
        return True

    def info(self) -> dict[str, str]:
        """Where the records are, with a note on those that are not there."""
        notes = self.notes()
        return self._store.info() | ({"note": " ".join(notes)} if notes else {})

    def summary(self) -> list[str]:
        """What the store has and what it has not, one sentence a line."""
        info = self._store.info()
        has = [f"{self._store} has it as run {info['run_id']}."] if "run_id" in info else []
        return has + self.notes()

    def notes(self) -> list[str]:
        """What the store has not, one sentence a line."""
        notes = [f"{self._store} did not take {n} {event} record(s)." for event, n in self._refused.items()]
        if waiting := sum(1 for _ in read(self._file, self._store.delivered)):
            # The folder of all runs: what a journal lies in is runs/NAME/tracking/RUN.
            runs = self._file.parents[3]
            notes.append(f"{self._store} is away: {waiting} records wait for {program()} sync --runs {runs}")
        return notes

    def _away(self, error: Exception) -> None:
        if not self._is_away:
            log.warning("%s is away, the run goes on and keeps its records (%s)", self._store, self._line(error))
        self._is_away = True
        self._pause = min(2 * self._pause or FIRST_PAUSE, LONGEST_PAUSE)
        self._next_try = time.monotonic() + self._pause

    def _refuse(self, event: str, error: Exception) -> None:
        if event not in self._refused:
            log.warning("%s did not take a %s record, the run goes on (%s)", self._store, event, self._line(error))
        self._refused[event] = self._refused.get(event, 0) + 1

    def _line(self, error: Exception) -> str:
        kind = type(error).__name__
        # A client that reads an address otherwise than we do names a piece of the password as the host or the port.
        return kind if HIDDEN in str(self._store) else redact(f"{kind}: {error}").splitlines()[0][:200]
