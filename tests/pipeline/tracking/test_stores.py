"""Several stores of records, one of a kind that only this file knows: one class and one entry."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import TrackingConfig
from pipeline.errors import UserError
from pipeline.tracking import check_stores, factory, make_tracker
from pipeline.tracking.record_store import Store
from pipeline.tracking.sync import sync


class ToyStore(Store):
    """Appends records to a file beside the runs; away while there is a file of this name plus ``.away``."""

    def __init__(self, file: Path, folder: Path) -> None:
        self._file, self._state = file, folder / "toy.json"
        self._delivered: int = json.loads(self._state.read_text())["delivered"] if self._state.exists() else 0
        self.acknowledge(self._delivered)

    @classmethod
    def check(cls, settings: TrackingConfig, runs: Path) -> None:  # noqa: ARG003 - of Store
        if settings.experiment == "refused":
            raise UserError("tracking.experiment: a toy store has no experiments")

    @classmethod
    def of_run(cls, settings: TrackingConfig, runs: Path, folder: Path) -> ToyStore:
        return cls(runs / f"{settings.experiment}.toy", folder)

    @classmethod
    def known_to(cls, folder: Path) -> Iterator[ToyStore]:
        for state in folder.glob("toy.json"):
            yield cls(Path(json.loads(state.read_text())["file"]), folder)

    def __str__(self) -> str:
        return f"toys in {self._file.name}"

    def apply(self, record: dict[str, Any], folder: Path) -> None:  # noqa: ARG002 - of Store
        if not self.alive():
            raise OSError("away")
        with self._file.open("a") as file:
            file.write(f"{record['run']} {record['event']}\n")

    def alive(self) -> bool:
        return not self._file.with_suffix(".toy.away").exists()

    def info(self) -> dict[str, str]:
        return {"uri": str(self._file), "run_id": "7"}

    @property
    def delivered(self) -> int:
        return self._delivered

    def acknowledge(self, end: int) -> None:
        self._delivered = end
        self._state.write_text(json.dumps({"file": str(self._file), "delivered": end}))


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(factory.STORES, "toy", ToyStore)


def _run(settings: TrackingConfig, directory: Path) -> Any:
    tracker = make_tracker(settings, directory)
    with tracker.start_run("run") as run:
        run.log_metrics({"loss": 1.0}, step=0)
    return tracker


def test_a_toy_store_gets_every_record(tmp_path: Path) -> None:
    tracker = _run(TrackingConfig(stores=["toy"], experiment="e"), tmp_path / "runs" / "tiny")
    assert (tmp_path / "runs" / "e.toy").read_text().splitlines() == ["run start", "run metrics", "run end"]
    assert tracker.info()["uri"] == str(tmp_path / "runs" / "e.toy")
    assert tracker.summary()[1:] == ["toys in e.toy has it as run 7."]
    assert not list((tmp_path / "runs").rglob("mlflow*"))


def test_a_store_that_is_away_keeps_nothing_from_another_and_gets_the_rest_later(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / "e.toy.away").touch()
    tracker = _run(TrackingConfig(stores=["mlflow", "toy"], experiment="e"), runs / "tiny")
    assert not (runs / "e.toy").exists()
    info = tracker.info()
    assert info["uri"].startswith("sqlite:///"), "the first store's"
    assert "toys in e.toy is away: 3 records wait" in info["note"]
    assert [left for _, _, left in sync(runs, None)] == [[], [info["note"]]]
    (runs / "e.toy.away").unlink()
    assert [(sent, left) for _, sent, left in sync(runs, None)] == [(0, []), (3, [])]
    assert len((runs / "e.toy").read_text().splitlines()) == 3


def test_stores_are_known_and_fit_before_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tracking\.stores: must be of mlflow, toy, not 'wandb'"):
        check_stores(TrackingConfig(stores=["wandb"]), tmp_path)
    with pytest.raises(UserError, match="a toy store has no experiments"):
        check_stores(TrackingConfig(stores=["toy"], experiment="refused"), tmp_path)
    check_stores(TrackingConfig(stores=["wandb"], uri="none"), tmp_path)
    assert TrackingConfig(stores=["toy", "toy"]).active_stores == ["toy"]
    tracker = _run(TrackingConfig(stores=[]), tmp_path / "run")
    assert list(tracker.info()) == ["records"]
