"""What a run does about damage that shows only where something is read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.commands import show
from pipeline.config.recipe import load
from pipeline.errors import DamagedError, UserError
from pipeline.execution.executor import Flow
from pipeline.execution.progress import Console
from pipeline.model.sizes import Sizes
from pipeline.stages.cost import Cost, Machine
from pipeline.stages.planned import Plan
from pipeline.stages.stage import Place, Stage
from pipeline.tracking.tracker import NoTracker


@dataclass(frozen=True, eq=False)
class Toy(Stage[str]):
    """All that a new kind of work is: this class, and a line in the plan."""

    KIND = PHASE = "toy"
    VERSION = 1
    PLACE = Place.DRIVER

    letter: str
    made: list[str]

    @property
    def item(self) -> str:
        return self.letter

    def inputs(self) -> list[object]:
        return [self.letter]

    def cost(self, sizes: Sizes, machine: Machine) -> Cost:  # noqa: ARG002 - of Stage
        return Cost(seconds=120.0, disk=4e6)

    def run(self) -> None:
        with self.directory.work() as (directory, _):
            (directory / "x").write_text(self.letter)
        self.made.append(self.letter)

    def read(self) -> str:
        return (self.directory.path() / "x").read_text()


@dataclass(frozen=True, eq=False)
class Reader(Toy):
    """Reads another's work; ``damaged`` says in which attempts it is found damaged."""

    other: Toy
    damaged: set[int]
    attempts: list[int]

    def run(self) -> None:
        self.attempts.append(len(self.attempts) + 1)
        if self.attempts[-1] in self.damaged:
            raise DamagedError(self.other.directory.uri_of(), "x")
        super().run()


class _Flow(Flow):
    def __init__(self, directory: Path, damaged: set[int]) -> None:
        self.made: list[str] = []
        toys = [Toy(store=str(directory), letter=letter, made=self.made) for letter in ("a", "b")]
        self.second = toys[1]
        self.attempts: list[int] = []
        reader = Reader(str(directory), "c", self.made, toys[1], damaged, self.attempts)
        plan = Plan(load("nano"), [], [*toys, reader], [])
        super().__init__(plan, Console(directory / "run.log", "quiet"), NoTracker().start_run("run"))


def test_work_that_a_reader_finds_damaged_is_made_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flow = _Flow(tmp_path, {1})
    flow.execute()
    assert flow.made == ["a", "b", "b", "c"]
    assert [timing["name"] for timing in flow.timings] == ["toy/a", "toy/b", "toy/c"]
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"{flow.second.directory.uri_of()}/x is missing, cut off or altered; toy/b is made anew" in said


def test_a_new_kind_of_work_is_run_kept_shown_and_read_by_its_class_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flow = _Flow(tmp_path, set())
    config = flow.plan.config.model_copy(update={"output": str(tmp_path)})
    monkeypatch.setattr(show, "make_plan", lambda config: Plan(config, [], flow.plan.stages, []))
    monkeypatch.setattr(show.preflight, "check", lambda _: (None, []))
    show.show_plan(config.model_copy(update={"learn": {}}))
    assert re.search(r"toy +a +to do +4\sMB +2\smin", capsys.readouterr().out)
    flow.execute()
    flow.execute()
    assert flow.made == ["a", "b", "c"], "what is finished is not done again"
    assert [toy.read() for toy in flow.plan.of(Toy)] == ["a", "b", "c"]
    assert all((tmp_path / "toy" / f"{toy.item}-{toy.key}").is_dir() for toy in flow.plan.of(Toy))
    show.show_plan(config.model_copy(update={"learn": {}}))
    assert capsys.readouterr().out.count("finished") == 3


def test_work_that_is_damaged_again_ends_the_run_in_one_line(tmp_path: Path) -> None:
    flow = _Flow(tmp_path, {1, 2})
    with pytest.raises(UserError, match=r"^\S+/x is missing, cut off or altered; delete \S+ and run the same command"):
        flow.execute()
    assert flow.attempts == [1, 2]
