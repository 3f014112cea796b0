"""Searches as a user starts them: trials that fail, kills, restarts; and what proposes trials, without Ray."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from conftest import ROOT, finish

from pipeline import recipe
from pipeline.tuning import search, space
from pipeline.tuning.search import Options, make_search
from pipeline.tuning.trial import LOSS

#: Of the density: published, the recipe's, another.
WEIGHTS = [7.0, 50.0, 20.0]

Tune = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def tune(tiny: Path, tmp_path: Path) -> Tune:
    """Starts a search of 18 steps a trial in a process of its own; it ends with the test."""
    started: list[subprocess.Popen[str]] = []

    def start(weights: list[float], *more: str) -> subprocess.Popen[str]:
        (tmp_path / "weights.yaml").write_text(yaml.safe_dump({"parameters": {"density.weight": weights}}))
        command = [sys.executable, str(ROOT / "pipeline" / "run.py"), "tune", "--recipe", str(tiny / "tiny.yaml")]
        command += ["--space", str(tmp_path / "weights.yaml"), "--search", "grid", f"output={tmp_path / 'runs'}"]
        command += ["learn.leap.settings.steps=18", "learn.leap.checkpoint_every=2", *more]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"COLUMNS": "160"},
            start_new_session=True,
        )
        started.append(process)
        return process

    return start


def _directory(output: Path) -> Path:
    (found,) = (output / "runs" / "tiny" / "tune").iterdir()
    return found


def _records(output: Path) -> list[dict[str, Any]]:
    try:
        return json.loads((_directory(output) / "trials.json").read_text())["trials"]
    except (FileNotFoundError, ValueError):  # not begun; there is no directory to unpack
        return []


def _wait(process: subprocess.Popen[str], what: str, found: Callable[[], Any]) -> Any:
    deadline = time.time() + 400
    while time.time() < deadline:
        assert process.poll() is None, process.communicate()[0][-4000:]
        if result := found():
            return result
        time.sleep(0.05)
    raise AssertionError(f"no {what} in time")


def _drivers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes of the driver functions of trials that run now."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if any("ImplicitFunc" in part for part in child.cmdline()):
                found.append(child)
        except psutil.Error:  # it has ended meanwhile
            continue
    return found


@pytest.mark.ray
@pytest.mark.slow
def test_a_search_records_what_fails_and_ends_with_a_winner(tune: Tune, tmp_path: Path) -> None:
    text = finish(tune([7.0, 50.0, 1e300], "learn.leap.workers=1"))
    trials = _records(tmp_path)
    assert [t["values"]["density.weight"] for t in trials] == [7.0, 50.0, 1e300]
    assert [t["status"] for t in trials] == ["finished", "finished", "failed"]
    assert "the loss is" in trials[2]["error"]
    assert "the loss is" in text
    best = min(trials[:2], key=lambda t: t["losses"][-1])
    for trial in trials[:2]:
        assert trial["steps"] == [*range(0, 18, 2), 17]
        assert len(set(trial["losses"])) > 1
        assert trial["tokens"] == 18 * 4 * 32
        assert 0 < trial["start_up"] < trial["seconds"]
    directory = _directory(tmp_path)
    won = recipe.load(str(directory / "winner.yaml"))
    assert won.learn["leap"].settings.density.weight == best["values"]["density.weight"]
    assert won.learn["leap"].settings.steps == 18
    assert str(directory / "winner.yaml") in text
    assert "3 trials: 2 finished, 0 stopped early, 1 failed." in (directory / "report.html").read_text()
    assert {p.stem for p in directory.glob("*.png")} == {"best-so-far", "curves", "parallel"}
    assert not list(directory.glob("trials/*/checkpoints"))
    _check_mlflow(tmp_path, best)

    changed = {p: p.stat().st_mtime_ns for p in directory.glob("trials/*/manifest.json")}
    again = finish(tune([7.0, 50.0, 1e300], "learn.leap.workers=1", "--confirm"))
    assert "the search was finished earlier" in again
    assert "words: perplexity" in again
    assert "the spread over 3 seeds" in again
    assert "<th>winner against</th>" in (directory / "report.html").read_text()
    _check_confirmation(tmp_path)
    assert {p: p.stat().st_mtime_ns for p in directory.glob("trials/*/manifest.json")} == changed
    assert _records(tmp_path) == trials


def _check_mlflow(output: Path, best: dict[str, Any]) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{output / 'runs' / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("leap").experiment_id])
    (parent,) = (r for r in runs if "mlflow.parentRunId" not in r.data.tags)
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics[LOSS] == pytest.approx(best["losses"][-1])
    trials = {r.info.run_name: r for r in runs if r.data.tags.get("stage") == "trial"}
    assert {name: r.info.status for name, r in trials.items()} == {
        "trial-001": "FINISHED",
        "trial-002": "FINISHED",
        "trial-003": "FAILED",
    }
    assert all(r.data.tags["mlflow.parentRunId"] == parent.info.run_id for r in trials.values())
    assert trials["trial-002"].data.params["density.weight"] == "50.0"
    assert len(client.get_metric_history(trials["trial-001"].info.run_id, "loss")) == 18


def _check_confirmation(output: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{output / 'runs' / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("leap").experiment_id], "tags.stage = 'confirm'")
    assert {r.info.run_name: r.info.status for r in runs} == {f"confirm-seed-{seed}": "FINISHED" for seed in range(3)}
    for run in runs:
        assert {"nll.winner.words"} < {name for name in run.data.metrics if name.startswith("nll.")}


@pytest.fixture
def another_ray() -> Iterator[None]:
    """Somebody else's Ray on this machine."""
    wait = "import ray, sys; ray.init(num_cpus=1, include_dashboard=False); print('up', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", wait]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=quiet, text=True) as process:
        assert process.stdout
        assert process.stdout.readline().strip() == "up"
        yield
        process.communicate()  # the end of its input is its end


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("another_ray")
def test_a_killed_trial_frees_its_place_and_a_killed_search_continues(tune: Tune, tmp_path: Path) -> None:
    # Two workers each: on two CPUs a trial starts only when the one before has left no placement group behind.
    process = tune(WEIGHTS, "learn.leap.workers=2")

    def measured(number: int) -> bool:
        return any(t["number"] == number and t["steps"] for t in _records(tmp_path))

    def finished(number: int) -> bool:
        return any(t["number"] == number and t["status"] == "finished" for t in _records(tmp_path))

    _wait(process, "measurement of the first trial", lambda: measured(1))
    (driver,) = _drivers(process)
    driver.kill()
    _wait(process, "end of the second trial", lambda: finished(2))
    before = _records(tmp_path)
    assert before[0]["status"] == "failed", before[0]
    _wait(process, "measurement of the third trial", lambda: measured(3))
    family = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    psutil.wait_procs(family, timeout=60)
    (kept,) = (p for p in _directory(tmp_path).glob("trials/*/manifest.json"))
    written = kept.stat().st_mtime_ns

    text = finish(tune(WEIGHTS, "learn.leap.workers=2"))
    after = _records(tmp_path)
    assert [t["status"] for t in after] == ["failed", "finished", "finished"]
    assert (after[1]["losses"], after[1]["steps"]) == (before[1]["losses"], before[1]["steps"])
    assert kept.stat().st_mtime_ns == written
    assert after[2]["steps"] == before[1]["steps"]
    assert recipe.load(str(_directory(tmp_path) / "winner.yaml"))
    assert "3 trials: 2 finished, 0 stopped early, 1 failed." in text


@pytest.mark.parametrize("proposer", ["optuna", "random"])
def test_the_known_values_are_proposed_first_and_the_rest_lies_within_the_space(
    proposer: search.Proposer, tmp_path: Path
) -> None:
    config = recipe.load("nano")
    found = space.load("schedules", config, "leap")
    wanted = make_search(config, "leap", found, Options(proposer=proposer))

    def propose() -> list[dict[str, Any]]:
        asked = search._proposer(wanted, seed=3)
        values = []
        for i in range(14):
            values.append(asked.suggest(str(i)))
            asked.on_trial_complete(str(i), {LOSS: float(i % 5)})
        return values

    proposed = propose()
    assert proposed[:2] == [found.published, found.current]
    for values in proposed:
        assert set(values) == set(found.domains)
        assert all(values[key] in domain for key, domain in found.domains.items())
    assert len({tuple(values.values()) for values in proposed}) == 14
    assert propose() == proposed  # seeded


def test_two_objectives_are_both_told(tmp_path: Path) -> None:
    config = recipe.load("nano")
    found = space.load("schedules", config, "leap")
    wanted = make_search(config, "leap", found, Options(against="tokens"))
    asked = search._proposer(wanted, seed=0)
    for i in range(12):
        values = asked.suggest(str(i))
        assert values["steps"] in wanted.domains["steps"]
        asked.on_trial_complete(str(i), {LOSS: 1.0 / values["steps"], "tokens": float(values["steps"])})
    for told in asked._ot_study.trials:
        assert told.values == [1.0 / told.params["steps"], told.params["steps"]]
    assert {t.params["steps"] for t in asked._ot_study.best_trials} == {25, 50, 100}
