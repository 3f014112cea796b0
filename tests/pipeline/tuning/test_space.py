"""Search spaces: what a file may say, what is tried first, and that wrong input ends in one line."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import ray
import yaml

import pipeline.commands.prune
from leap.settings import LearnSettings
from pipeline.config import RunConfig, recipe
from pipeline.errors import UserError
from pipeline.run import main
from pipeline.tuning import search, space
from pipeline.tuning.domains import Choice, Span
from pipeline.tuning.search import Options, make_search


@pytest.fixture(scope="module")
def nano() -> RunConfig:
    return recipe.load("nano")


def write(path: Path, **parameters: object) -> str:
    (path / "space.yaml").write_text(
        yaml.safe_dump({"why": "a test", "trials": 3, "parameters": parameters}, sort_keys=False)
    )
    return str(path / "space.yaml")


@pytest.mark.parametrize("name", space.names())
@pytest.mark.parametrize("of", ["nano", "smollm2", "llama-3.2-1b"])
def test_the_spaces_of_the_project_hold_the_published_and_the_recipes_values(name: str, of: str) -> None:
    config = recipe.load(of)
    found = space.load(name, config, "leap")
    assert found.why
    assert set(found.published) == set(found.current) == set(found.domains)
    for key, domain in found.domains.items():
        assert found.published[key] == space.get(LearnSettings.published(), key)
        assert found.published[key] in domain
        assert found.current[key] in domain
    first, *rest = make_search(config, "leap", found, Options()).points
    assert first == found.published
    assert rest == ([found.current] if found.current != found.published else [])


def test_the_values_become_the_settings_and_leave_the_rest(nano: RunConfig) -> None:
    placed = space.place(nano, "leap", {"family.temperature.end": 0.3, "density.kind": "penalty", "family.noise": True})
    before, after = nano.learn["leap"], placed
    assert (after.settings.family.temperature.end, after.settings.density.kind, after.settings.family.noise) == (
        0.3,
        "penalty",
        True,
    )
    assert after.settings.family.temperature.start == before.settings.family.temperature.start
    assert after.settings.steps == before.settings.steps
    assert after.model_copy(update={"settings": before.settings}) == before


def test_numbers_are_what_the_field_holds(nano: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("parameters: {learning_rate: [1e-3, 1e-1], warmup_steps: {low: 1, high: 9}}\n")
    found = space.load(str(tmp_path / "s.yaml"), nano, "leap")
    assert found.domains == {"learning_rate": Choice((0.001, 0.1)), "warmup_steps": Span(1, 9, whole=True)}


def test_a_recipe_outside_of_a_space_widens_it(nano: RunConfig, tmp_path: Path) -> None:
    rate = ["learn.leap.settings.learning_rate=2", "learn.leap.settings.prior=sparsegpt"]
    path = write(tmp_path, learning_rate={"low": 0.001, "high": 0.5, "log": True}, prior=["wanda", "admm"])
    found = space.load(path, recipe.load("nano", rate), "leap")
    assert found.domains == {
        "learning_rate": Span(0.001, 2, log=True),
        "prior": Choice(("wanda", "admm", "sparsegpt")),
    }
    assert found.current == {"learning_rate": 2, "prior": "sparsegpt"}


@pytest.mark.parametrize(
    ("parameters", "parts"),
    [
        (
            {"family.temperature.strat": [1, 4]},
            ["family.temperature.strat", "unknown key; did you mean start?", "allowed here: end,"],
        ),
        ({"learning_rates": [0.1]}, ["learning_rates", "did you mean learning_rate?"]),
        ({"learning_rate.peak": [0.1]}, ["learning_rate.peak: learning_rate is a value"]),
        ({"prior": ["wanda", "wandda"]}, ["prior", "one of magnitude, wanda", "not 'wandda'"]),
        ({"learning_rate": {"low": -1, "high": 1}}, ["learning_rate must be positive"]),
        ({"learning_rate": {"low": 0.2, "high": 0.1}}, ["learning_rate: low must lie below high"]),
        ({"weight_reward": {"low": 0, "high": 20, "log": True}}, ["weight_reward", "above 0 on a logarithmic scale"]),
        ({"learning_rate": {"low": 0.01, "high": 1}}, ["the published value 0.001 is not within 0.01 … 1"]),
        (
            {"density.weight": {"low": 5, "high": 50, "log": True}},
            ["the recipe's value 0.0 has no place on a logarithmic scale"],
        ),
        ({"family.noise": [False]}, ["family.noise: the published value True is not within one of False"]),
        ({"family.noise": {"low": 0, "high": 1}}, ["family.noise: a range is for numbers"]),
        ({"prior": {"low": 0, "high": 1}}, ["prior"]),
        ({"family.temperature": [{"start": 1, "end": 2}]}, ["family.temperature: name single fields"]),
        ({"learning_rate": {"low": 0.001}}, ["learning_rate: high: field required"]),
        ({"learning_rate": {"low": 0.001, "high": 1, "step": 2}}, ["learning_rate: step: unknown key"]),
        ({"learning_rate": 0.1}, ["learning_rate: expected {low: …, high: …} or a list"]),
        ({"prior": ["wanda", "wanda"]}, ["prior: the values must differ"]),
        ({"steps": [100, 200]}, ["steps: belongs to what is asked of every trial"]),
        ({}, ["parameters"]),
    ],
)
def test_a_wrong_space_ends_in_one_line_before_anything_starts(
    parameters: dict[str, object],
    parts: list[str],
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def started() -> None:
        raise AssertionError("Ray would have been started")

    monkeypatch.setattr(pipeline.commands.prune, "start_ray", started)
    arguments = ["--recipe", str(tiny / "tiny.yaml"), "--space", write(tmp_path, **parameters)]
    rate = ["learn.leap.settings.density.weight=0"]
    assert main(["tune", *arguments, f"output={tmp_path / 'runs'}", *rate]) == 2
    out, err = capsys.readouterr()
    assert not ray.is_initialized()
    assert err.startswith("error: --space "), err
    assert err.count("\n") == 1, err
    for part in parts:
        assert part in err
    assert out == ""
    assert not (tmp_path / "runs").exists()


def test_an_unknown_space_comes_with_a_suggestion(nano: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--space schedule: no such space; did you mean schedules\? Known: .*leap"):
        space.load("schedule", nano, "leap")
    (tmp_path / "bad.yaml").write_text("a: [1\n")
    with pytest.raises(UserError, match="not valid YAML"):
        space.load(str(tmp_path / "bad.yaml"), nano, "leap")
    (tmp_path / "bad.yaml").write_text("why: because\nparameters: {family.noise: [true, false]}\ntrails: 3\n")
    with pytest.raises(UserError, match="trails: unknown key"):
        space.load(str(tmp_path / "bad.yaml"), nano, "leap")


def test_a_grid_is_every_combination_after_the_known_values(nano: RunConfig, tmp_path: Path) -> None:
    axes = {"family.noise": [True, False], "learning_rate": [0.001, 0.1, 0.2]}
    found = space.load(write(tmp_path, **axes), nano, "leap")
    grid = make_search(nano, "leap", found, Options(proposer="grid"))
    assert grid.points[0] == {"family.noise": True, "learning_rate": 0.001}
    assert grid.points[1] == {"family.noise": False, "learning_rate": 0.1}
    tried = {tuple(point.values()) for point in grid.points}
    assert len(grid.points) == grid.trials == len(tried) == 6
    assert tried == set(itertools.product(*axes.values()))
    with pytest.raises(UserError, match="a grid is tried whole, in this space 6 trials"):
        make_search(nano, "leap", found, Options(proposer="grid", trials=3))
    ranges = space.load(write(tmp_path, learning_rate={"low": 0.001, "high": 0.1}), nano, "leap")
    with pytest.raises(UserError, match="learning_rate is a range; a grid needs a list"):
        make_search(nano, "leap", ranges, Options(proposer="grid"))


def test_a_second_objective_adds_what_it_costs(nano: RunConfig, tmp_path: Path) -> None:
    found = space.load(write(tmp_path, **{"family.noise": [True, False]}), nano, "leap")
    tokens = make_search(nano, "leap", found, Options(against="tokens"))
    steps = nano.learn["leap"].settings.steps
    assert tokens.domains["steps"] == Choice((round(steps / 4), round(steps / 2), steps))
    assert all(point["steps"] == steps for point in tokens.points)
    assert not tokens.stops_early
    by_sparsity = make_search(nano, "leap", found, Options(against="sparsity"))
    assert by_sparsity.domains["sparsity"] == Choice((0.5, 0.6))
    one = nano.model_copy(update={"sparsities": [0.5]})
    with pytest.raises(UserError, match="needs two or more sparsities"):
        make_search(one, "leap", found, Options(against="sparsity"))


def test_trials_at_a_time_follow_from_the_cluster(nano: RunConfig) -> None:
    learn = nano.learn["leap"]
    assert search.concurrent(learn, {"CPU": 1.0}) == 1
    assert search.concurrent(learn, {"CPU": 2.0}) == 2
    two = learn.model_copy(update={"workers": 2, "threads": 2})
    assert [search.concurrent(two, {"CPU": n}) for n in (2.0, 4.0, 11.0)] == [1, 1, 2]
    gpu = recipe.load("llama-3.2-1b").learn["leap"]
    assert search.concurrent(gpu, {"CPU": 64.0, "GPU": 8.0}) == 2


def test_measurements_come_early_enough_to_stop_a_trial(nano: RunConfig) -> None:
    learn = space.place(nano, "leap", {"steps": 90})
    assert search.first_rung(learn) == 10
    assert search.watch_every(learn, stops_early=True) == 10
    assert search.watch_every(learn, stops_early=False) == learn.watch_every
    assert search.watch_every(space.place(nano, "leap", {"steps": 3}), stops_early=True) == 1
