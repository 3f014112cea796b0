"""What a run does about damage that shows only where something is read."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from pipeline.errors import DamagedError, UserError
from pipeline.flow import Flow, _cause
from pipeline.plan import Plan
from pipeline.progress import Console
from pipeline.recipe import load
from pipeline.storage import StageDir


class _Flow(Flow):
    """Reads two pieces of work; ``damaged`` says in which attempts the second is found damaged."""

    def __init__(self, directory: Path, damaged: set[int]) -> None:
        self.first, self.second = (StageDir(str(directory), "prior", item, "key") for item in ("a", "b"))
        plan = Plan(load("nano"), priors={("a", 0.5): self.first, ("b", 0.5): self.second})
        nothing: Any = SimpleNamespace(log_metrics=lambda *_: None)
        super().__init__(plan, Console(directory / "run.log", "quiet"), nothing)
        self._damaged, self.attempts = damaged, 0
        self.made: list[str] = []

    def _execute(self, last: str) -> None:  # noqa: ARG002 - of Flow
        self.attempts += 1
        for stage in (self.first, self.second):
            if not self._cached(stage):
                with stage.work() as (directory, _):
                    (directory / "x").write_text("x")
                self.made.append(stage.item)
                self._note(stage, cached=False)
        if self.attempts in self._damaged:
            raise DamagedError(self.second.uri_of(), "x")


def test_work_that_a_reader_finds_damaged_is_made_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flow = _Flow(tmp_path, {1})
    flow.execute()
    assert flow.made == ["a", "b", "b"]
    assert [timing["name"] for timing in flow.timings] == ["prior/a", "prior/b"]
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"{flow.second.uri_of()}/x is missing, cut off or altered; prior/b is made anew" in said


def test_work_that_is_damaged_again_ends_the_run_in_one_line(tmp_path: Path) -> None:
    flow = _Flow(tmp_path, {1, 2})
    with pytest.raises(UserError, match=r"^\S+/x is missing, cut off or altered; delete \S+ and run the same command"):
        flow.execute()
    assert flow.attempts == 2


def test_damage_comes_out_of_what_ray_wraps_it_in() -> None:
    damage = DamagedError("runs/prior/a-key", "x")
    again = pickle.loads(pickle.dumps(damage))
    assert (str(again), again.work, again.file) == (str(damage), damage.work, damage.file)
    in_task = ray.exceptions.RayTaskError("fit", "traceback", damage)
    worker = SimpleNamespace(_base_exc=in_task)
    training = SimpleNamespace(worker_failures={0: worker})
    for wrapped in (damage, in_task, worker, training, ray.exceptions.RayTaskError("fit", "traceback", in_task)):
        assert _cause(wrapped) is damage
