"""What a trial tells Tune, its workers' board and its records, without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.learning.board import Board
from pipeline.tuning import trial
from pipeline.tuning.trial import LOSS
from pipeline.tuning.watch import _last_line


def measured(step: int, loss: float) -> dict[str, Any]:
    return {"step": step, "loss": 1.0, LOSS: loss}


def test_each_measurement_is_reported_once_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    reports: list[dict[str, Any]] = []
    monkeypatch.setattr(trial.tune, "report", reports.append)
    told = trial._Told({"tokens": 512})
    told.all([measured(0, 6.0), {"step": 1, "loss": 1.0}, measured(2, 5.0)])
    told.all([measured(0, 6.0), measured(2, 5.0), measured(4, float("nan")), measured(6, 4.0)])
    assert [(report["step"], report[LOSS]) for report in reports] == [(0, 6.0), (2, 5.0), (6, 4.0)]
    assert all(report["tokens"] == 512 for report in reports)
    assert told.last == 6


def test_the_board_keeps_measurements_and_errors_of_each_run_after_it_was_drained() -> None:
    board = Board.__ray_metadata__.modified_class()  # type: ignore[attr-defined]
    for event in (measured(0, 6.0), {"step": 1, "loss": 1.0}, measured(2, 5.0)):
        board.push(event | {"run": "a"})
    board.push(measured(0, 7.0) | {"run": "b"})
    board.push({"error": "the loss is nan at step 3", "run": "b"})
    assert len(board.drain()) == 5
    assert board.drain() == []
    assert [event["step"] for event in board.measured("a", -1)] == [0, 2]
    assert [event["step"] for event in board.measured("a", 0)] == [2]
    assert (board.error("a"), board.error("b")) == (None, "the loss is nan at step 3")


def test_the_reason_of_a_failure_is_the_last_line_that_tune_wrote(tmp_path: Path) -> None:
    file = tmp_path / "error.txt"
    assert _last_line(file) == "the process of the trial ended"
    file.write_text("Failure # 1\nTraceback …\nValueError: no such thing\n\n")
    assert _last_line(file) == "ValueError: no such thing"
