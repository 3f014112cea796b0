"""Each step of a learning run is recorded once, whoever tells of it and however often."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from pipeline.config import TrackingConfig
from pipeline.tracking import Run, Tracker, make_tracker
from pipeline.tracking.curves import Curves


def step(number: int, **more: float) -> dict[str, Any]:
    return {"step": number, "loss": 10.0 - number, **more}


HISTORY = [step(i, **({"mask_loss.hard": 5.0} if i % 3 == 0 else {})) for i in range(8)]


def run(directory: Path) -> tuple[Tracker, Run]:
    tracker = make_tracker(
        TrackingConfig(uri=f"sqlite:///{directory / 'mlflow.db'}", experiment="leap"), directory / "runs" / "a"
    )
    return tracker, tracker.start_run("learn")


def recorded(directory: Path, name: str) -> list[int]:
    client = MlflowClient(f"sqlite:///{directory / 'mlflow.db'}")
    (found,) = client.search_runs([client.get_experiment_by_name("leap").experiment_id])
    return sorted(metric.step for metric in client.get_metric_history(found.info.run_id, name))


def test_a_worker_that_does_steps_again_and_one_that_died_before_it_told(tmp_path: Path) -> None:
    _, learning = run(tmp_path)
    curves = Curves(learning)
    for number in (0, 1, 2, 1, 2, 5, 6):  # killed after step 2, replaced; killed after step 4, which it had saved
        curves.add(HISTORY[number] | {"run": "a key"})
    curves.fill(HISTORY)
    curves.fill(HISTORY)
    learning.end()
    assert recorded(tmp_path, "loss") == list(range(8))
    assert recorded(tmp_path, "mask_loss.hard") == [0, 3, 6]


def test_another_process_goes_on_where_the_records_end(tmp_path: Path) -> None:
    tracker, learning = run(tmp_path)
    Curves(learning).add(HISTORY[0])
    Curves(learning).fill(HISTORY[:3])
    learning.end("KILLED")
    del tracker, learning  # as the process's end does, this lets go of the records
    _, learning = run(tmp_path)
    curves = Curves(learning)
    curves.fill(HISTORY[:5])
    for number in range(4, 8):
        curves.add(HISTORY[number])
    learning.end()
    assert recorded(tmp_path, "loss") == list(range(8))
