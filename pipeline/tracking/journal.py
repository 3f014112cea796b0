"""The records of one pipeline run as a file that is only ever appended to."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.tracking.redaction import redact
from pipeline.tracking.values import jsonable

FILE = "records.jsonl"


class InUseError(Exception):
    """Another process is writing these records."""


class Journal:
    """``records.jsonl`` in a folder, with one writer at a time.

    A line is ``{"time", "run", "event", ...}``: the run as its names joined by slashes, the event one of start, params,
    metrics, series, figure, dict, table, artifact, input, model, end. Files that records speak of lie in the folder,
    or elsewhere on this machine where the record says so.

    Attributes:
        last_steps: by run, the last step that metrics were recorded of.
        unended: runs that were started and not ended, the innermost first.

    Raises:
        InUseError: another process has it open.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.file = folder, folder / FILE
        # A lock, not a process id in a file: the system lets go of it however the process ends.
        self._held = (folder / "lock").open("w")
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InUseError(f"another process is writing {self.file}") from None
        self.last_steps: dict[str, int] = {}
        self.unended: list[str] = []
        if self.file.exists():
            self._seal_broken_line()
            for record, _ in read(self.file):
                self._remember(record)
        self._end_the_abandoned()

    def append(self, run: str, event: str, **fields: Any) -> None:
        """Add a record of now, without secrets.

        Raises:
            OSError: it cannot be written; the others stay as they are.
        """
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        record = {"time": time, "run": run, "event": event, **redact(jsonable(fields))}
        line = (json.dumps(record) + "\n").encode()
        with self.file.open("ab", buffering=0) as file:
            start = file.tell()
            try:
                written = file.write(line)
                while written < len(line):  # a disk takes what fits, and refuses the rest only when asked again
                    written += file.write(line[written:])
            except OSError:
                file.truncate(start)
                raise
        self._remember(record)

    def close(self) -> None:
        """Let another process write."""
        self._held.close()

    def _remember(self, record: dict[str, Any]) -> None:
        run, event = record["run"], record["event"]
        if event == "start" and run not in self.unended:
            self.unended.insert(0, run)
        elif event == "end" and run in self.unended:
            self.unended.remove(run)
        elif event == "metrics" and record["step"] is not None:
            self.last_steps[run] = max(self.last_steps.get(run, -1), record["step"])
        elif event == "series":
            self.last_steps[run] = max(self.last_steps.get(run, -1), *record["steps"])

    def _end_the_abandoned(self) -> None:
        for run in list(self.unended):
            self.append(run, "end", status="KILLED", reason="the process ended without a word")

    def _seal_broken_line(self) -> None:
        # A process killed while writing leaves half a line; the next record must not be glued to it.
        if self.file.stat().st_size:
            with self.file.open("rb+") as file:
                file.seek(-1, 2)
                if file.read() != b"\n":
                    file.write(b"\n")


def read(file: Path, start: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """The records from byte ``start`` on, each with the byte that it ends at; lines that were cut off are left out."""
    with file.open("rb") as lines:
        lines.seek(start)
        end = start
        for line in lines:
            end += len(line)
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
            except ValueError:
                continue
            yield record, end
