"""Searches as a user starts them: trials that fail, kills, restarts; and what proposes trials, without Ray."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import yaml
from conftest import ROOT, finish
from ray import tune as ray_tune

from pipeline.config import recipe
from pipeline.execution.ray_cluster import start_ray, stop_ray
from pipeline.tuning import search, space
from pipeline.tuning.domains import Choice
from pipeline.tuning.search import Options, make_search
from pipeline.tuning.trial import LOSS, SPARSITY
from pipeline.tuning.trial_records import Record, Records

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
@pytest.mark.long
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


def _continued(wanted: search.Search, ended: int, begun: int) -> list[Record]:
    """Records of trials that an earlier process ended, of one that failed and of those that it only began."""
    asked = search._proposer(wanted, seed=3)
    values = [asked.suggest(str(i)) for i in range(ended + 1 + begun)]
    records = [Record(i + 1, f"old{i}", values[i], "finished", [0, 9], [4.0, 3.0 + i]) for i in range(ended)]
    records.append(Record(ended + 1, "failed", values[ended], "failed"))
    return records + [Record(ended + 2 + i, f"begun{i}", values[ended + 1 + i]) for i in range(begun)]


def test_a_continued_search_proposes_what_was_begun_and_learns_from_what_ended() -> None:
    config = recipe.load("nano")
    found = space.load("schedules", config, "leap")
    wanted = make_search(config, "leap", found, Options())
    known = _continued(wanted, ended=3, begun=2)
    asked = search._proposer(wanted, 3, known)
    assert [(t.state.name, t.value) for t in asked._ot_study.trials[:4]] == [
        *(("COMPLETE", 3.0 + i) for i in range(3)),
        ("FAIL", None),
    ]
    proposed = [asked.suggest(str(i)) for i in range(5)]
    assert proposed[:2] == [record.values for record in known[-2:]]
    tried = [record.values for record in known]
    assert all(values not in tried for values in proposed[2:])
    # Killed before it came to the second point.
    assert search._proposer(wanted, 3, known[:1]).suggest("0") == found.current


def test_a_continued_search_keeps_its_numbers(tmp_path: Path) -> None:
    records = Records(tmp_path / "trials.json")
    for number in (1, 2, 4):
        records.open(number, "old", {"a": number})
    for record in records:
        record.status = "finished" if record.number == 1 else "running"
    records.save()
    again = Records(tmp_path / "trials.json")
    assert again.numbers(6) == [2, 4, 3, 5, 6]
    assert again.open(4, "new", {"a": 4}).id == "new"


def test_a_continued_search_stops_trials_as_the_whole_one_does() -> None:
    settings: dict[str, Any] = {"time_attr": "step", "metric": LOSS, "mode": "min", "grace_period": 2, "max_t": 17}
    settings |= {"reduction_factor": 3, "stop_last_trials": False}

    def add(asha: search._Asha, name: str) -> Any:
        trial: Any = SimpleNamespace(trial_id=name, config={"a": name})
        asha.on_trial_add(None, trial)
        return trial

    whole = search._Asha([], [], **settings)
    for i in range(4):
        trial = add(whole, f"t{i}")
        for step in (0, 2, 5, 6):
            whole.on_trial_result(None, trial, {"step": step, LOSS: float(i) + step})
    records = [Record(i + 1, f"t{i}", {"a": f"t{i}"}, "finished", [0, 2, 5, 6]) for i in range(4)]
    for i, record in enumerate(records):
        record.losses = [float(i) + step for step in record.steps]
    records[3].status = "running"
    continued = search._Asha([], records, **settings)
    # The worst of the four went on earlier; its measurements, told again, do not stop it now.
    again = add(continued, "t3")
    for step in (0, 2, 5, 6):
        assert continued.on_trial_result(None, again, {"step": step, LOSS: 3.0 + step}) == "CONTINUE"
    assert continued._brackets[0]._rungs == whole._brackets[0]._rungs
    assert continued.on_trial_result(None, add(continued, "t9"), {"step": 2, LOSS: 99.0}) == "STOP"


@pytest.fixture
def ray_here() -> Iterator[None]:
    start_ray()
    yield
    stop_ray()


class _Planted:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self._trace,))


class _Watcher:
    """Ends the record of a trial as it is told."""

    def __init__(self, records: Records) -> None:
        self.records, self.started_numbers = records, []  # type: ignore[var-annotated]

    def started(self, number: int, id: str, values: dict[str, Any]) -> None:
        self.started_numbers.append(number)
        self.records.open(number, id, values)

    def reported(self, id: str, result: dict[str, Any]) -> None: ...
    def fetch(self) -> None: ...
    def ended(self, id: str, error: str | None = None) -> None:
        next(record for record in self.records if record.id == id).status = "failed" if error else "finished"


@pytest.mark.ray
@pytest.mark.usefixtures("ray_here")
def test_no_pickle_in_the_run_directory_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def report(values: dict[str, Any], trials: Any) -> None:
        ray_tune.report({"step": 0, LOSS: values["density.weight"], "tokens": 1, SPARSITY: 0.5})

    monkeypatch.setattr(search.trial, "run", report)
    config = recipe.load("nano")
    domains: dict[str, Any] = {"density.weight": Choice((1.0, 2.0, 3.0))}
    points = [{"density.weight": value} for value in (1.0, 2.0, 3.0)]
    wanted = search.Search(Options(proposer="grid", stop_early=False), domains, points, 3)
    records = Records(tmp_path / "trials.json")
    records.open(1, "a", points[0]).status = "finished"
    records.open(2, "b", points[1])
    trace, planted = tmp_path / "ran", pickle.dumps(_Planted(tmp_path / "ran"))
    runs = tmp_path / "runs"
    for folder in ("tune", "search", "ray_train"):
        (runs / folder).mkdir(parents=True)
        for name in ("tuner.pkl", "trainable.pkl", "searcher-state-x.pkl", "search_gen_state-x.json", "scheduler.pkl"):
            (runs / folder / name).write_bytes(planted)
        (runs / folder / "experiment_state-x.json").write_text(json.dumps({"pickle": planted.hex()}))
    watcher: Any = _Watcher(records)
    trials: Any = SimpleNamespace(config=config, learn="leap", uri=str(runs))
    before = sorted(runs.rglob("*"))
    search.run(wanted, trials, records, watcher, at_a_time=1)
    assert not trace.exists()
    assert sorted(runs.rglob("*")) == before
    assert watcher.started_numbers == [2, 3]
    assert [(r.status, r.values) for r in records] == [("finished", point) for point in points]
    search.run(wanted, trials, records, watcher, at_a_time=1)
    assert watcher.started_numbers == [2, 3], "what is finished is not run again"
    pickle.loads(planted)
    assert trace.exists(), "else the test shows nothing"
