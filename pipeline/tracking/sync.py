"""Delivers what a tracking server missed, from the journals of finished, killed and lost runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pipeline.tracking.factory import stores_of
from pipeline.tracking.journal import FILE, InUseError, Journal
from pipeline.tracking.outbox import Outbox


def sync(runs: Path, uri: str | None) -> Iterator[tuple[str, int, list[str]]]:
    """Deliver the journals below ``runs``; doing it again delivers nothing.

    A run that another process is at is left to it. One whose process is gone without a word ends as KILLED.

    Args:
        uri: of an MLflow store; none: those that each run was tracked with.

    Yields:
        Name of the run, records delivered now, and what is left to say.
    """
    for file in sorted(runs.glob(f"*/tracking/*/{FILE}")):
        name = file.parent.name
        try:
            journal = Journal(file.parent)
        except InUseError:
            yield name, 0, ["is under way; left to its own process"]
            continue
        try:
            for store in stores_of(file.parent, uri):
                waiting = _lines(file, store.delivered)
                outbox = Outbox(file, store)
                outbox.deliver(now=True)
                yield name, waiting - _lines(file, store.delivered), outbox.notes()
        finally:
            journal.close()


def _lines(file: Path, start: int) -> int:
    with file.open("rb") as lines:
        lines.seek(start)
        return sum(1 for _ in lines)
