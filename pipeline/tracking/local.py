"""Records in the run's own directory: always there, whatever happens to a tracking server."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.tracking.base import RunPath, Status, Tracker
from pipeline.tracking.values import as_csv, jsonable

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class LocalRecords(Tracker):
    """Appends every call to ``records.jsonl`` and writes figures and tables as files beside it.

    A line is ``{"time", "run", "event", ...}``: the run as its names joined by slashes, the event one of start, params,
    metrics, figure, dict, table, artifact, end. Files to keep as artifacts are already local: the line says where.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__()
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._file = directory / "records.jsonl"
        self._seal_broken_line()

    def info(self) -> dict[str, str]:
        return {"records": str(self._file)}

    def summary(self) -> list[str]:
        return [f"Every record of this run is in {self._file}."]

    def open_run(self, path: RunPath, tags: dict[str, str]) -> None:
        self._write(path, "start", tags=tags)

    def log_params(self, path: RunPath, params: dict[str, str]) -> None:
        self._write(path, "params", params=params)

    def log_metrics(self, path: RunPath, metrics: dict[str, float], step: int | None) -> None:
        self._write(path, "metrics", metrics=metrics, step=step)

    def log_figure(self, path: RunPath, figure: Figure, name: str) -> None:
        file = self._place(path, name)
        figure.savefig(file, dpi=150)
        self._write(path, "figure", name=name, file=str(file.relative_to(self._directory)))

    def log_dict(self, path: RunPath, value: Any, name: str) -> None:
        self._write(path, "dict", name=name, value=value)

    def log_table(self, path: RunPath, rows: list[dict[str, Any]], name: str) -> None:
        file = self._place(path, name)
        file.write_text(as_csv(rows), encoding="utf-8")
        self._write(path, "table", name=name, file=str(file.relative_to(self._directory)), rows=rows)

    def log_artifact(self, path: RunPath, source: Path, folder: str) -> None:
        self._write(path, "artifact", source=str(source), folder=folder)

    def end_run(self, path: RunPath, status: Status, reason: str | None) -> None:
        self._write(path, "end", status=status, reason=reason)

    def _write(self, path: RunPath, event: str, **fields: Any) -> None:
        record = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "run": "/".join(path), "event": event}
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record | jsonable(fields)) + "\n")

    def _place(self, path: RunPath, name: str) -> Path:
        folders = [re.sub(r"[^\w.@+-]", "_", part) for part in path]
        file = self._directory.joinpath(*folders, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        return file

    def _seal_broken_line(self) -> None:
        # A process killed while writing leaves half a line; the next record must not be glued to it.
        if self._file.exists() and self._file.stat().st_size:
            with self._file.open("rb+") as file:
                file.seek(-1, 2)
                if file.read() != b"\n":
                    file.write(b"\n")
