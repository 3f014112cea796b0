import math
import shlex
import time
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from mlflow import MlflowClient

from pipeline.config import TrackingConfig
from pipeline.errors import UserError
from pipeline.tracking import default_uri, make_tracker
from pipeline.tracking.sync import sync
from pipeline.tracking.system import SystemMetrics


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One directory of runs, hence one database, for the whole file: creating it takes seconds."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def client(runs):
    return MlflowClient(tracking_uri=f"sqlite:///{runs / 'mlflow.db'}")


def begin(runs, name):
    tracker = make_tracker(TrackingConfig(experiment="test"), runs / name)
    return tracker, tracker.start_run(name)


def find(client, name):
    experiment = client.get_experiment_by_name("test")
    runs = client.search_runs([experiment.experiment_id], f"tags.`mlflow.runName` = '{name}'")
    assert len(runs) == 1
    return runs[0]


def read(client, run, artifact, folder):
    return Path(client.download_artifacts(run.info.run_id, artifact, str(folder)))


def test_runs_are_nested_and_hold_everything(runs, client, tmp_path):
    figure = Figure()
    figure.subplots().plot([1, 2])
    (tmp_path / "report.html").write_text("<p>hello")
    tracker, run = begin(runs, "whole")
    with run:
        run.log_params({"learn": {"steps": 60}, "long": "x" * 7000, "a@b": 1} | {f"p{i}": i for i in range(120)})
        with run.child("whole-learn", tags={"stage": "learn"}) as learn:
            for step in range(3):
                learn.log_metrics({"loss": 3.0 - step, "scale@0.5": math.nan}, step=step)
            learn.log_series([3, 5], {"loss": [0.5, 0.25]})
        run.log_metrics({f"sparsity/{i}": 0.5 for i in range(1100)})
        run.log_figure(figure, "figures/loss.png")
        run.log_dict({"a": [1]}, "environment.json")
        run.log_table([{"name": "dense", "acc": 0.5}], "results.csv")
        run.log_artifact(tmp_path / "report.html", "report")
        run.log_input("calibration", "abc", "embedded", "training", {"rows": 10})

    parent, child = find(client, "whole"), find(client, "whole-learn")
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert child.data.tags["stage"] == "learn"
    assert (parent.info.status, child.info.status) == ("FINISHED", "FINISHED")
    assert parent.data.params["learn.steps"] == "60"
    assert parent.data.params["a_b"] == "1"
    assert len(parent.data.params) == 123
    assert len(parent.data.params["long"]) == 6000
    assert len(parent.data.metrics) == 1100
    history = client.get_metric_history(child.info.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(0, 3.0), (1, 2.0), (2, 1.0), (3, 0.5), (5, 0.25)]
    assert math.isnan(child.data.metrics["scale_0.5"])
    assert read(client, parent, "figures/loss.png", tmp_path).read_bytes().startswith(b"\x89PNG")
    assert '"a"' in read(client, parent, "environment.json", tmp_path).read_text()
    assert read(client, parent, "results.csv", tmp_path).read_text() == "name,acc\ndense,0.5\n"
    assert read(client, parent, "report/report.html", tmp_path / "report").read_text() == "<p>hello"
    assert parent.info.artifact_uri.startswith((runs / "mlartifacts").as_uri())
    (given,) = parent.inputs.dataset_inputs
    assert (given.dataset.name, given.dataset.digest, given.tags[0].value) == ("calibration", "abc", "training")
    info = tracker.info()
    assert info["run_id"] == parent.info.run_id
    assert info["ui_command"] == f"mlflow ui --backend-store-uri {info['uri']}"


@pytest.mark.parametrize("name", ["question?mark", "percent 50%25"])
def test_a_directory_that_a_uri_cannot_name_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="choose a path without"):
        make_tracker(TrackingConfig(experiment="test"), tmp_path / name / "tiny").start_run("tiny")
    assert not (tmp_path / name / "mlflow.db").exists()


@pytest.mark.parametrize("name", ["hash #1", "50% größe; & [v2]"])
def test_the_store_lies_where_the_runs_are_whatever_the_directory_is_called(tmp_path, name):
    runs = tmp_path / name
    tracker, run = begin(runs, "tiny")
    with run:
        run.log_metrics({"a": 1.0})
        run.log_dict({"a": 1}, "x.json")
    assert (runs / "mlflow.db").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]
    assert list((runs / "mlartifacts").rglob("x.json"))
    uri = tracker.info()["uri"]
    assert uri == default_uri(runs)
    assert shlex.split(tracker.info()["ui_command"])[-1] == uri
    assert find(MlflowClient(uri), "tiny").data.metrics == {"a": 1.0}


def test_a_restart_continues_the_same_runs(runs, client):
    _, first = begin(runs, "again")
    first.log_params({"lr": 0.1, "steps": 60})
    first.child("again-learn").log_metrics({"loss": 2.0}, step=0)
    first.end("KILLED", "out of time")
    assert find(client, "again").info.status == "KILLED"
    assert find(client, "again").data.tags["mlflow.note.content"] == "KILLED: out of time"

    tracker, second = begin(runs, "again")
    assert find(client, "again").info.status == "RUNNING"
    assert find(client, "again").data.tags["mlflow.note.content"] == "", "why it ended once is no longer true"
    second.log_params({"lr": 0.2, "steps": 60, "new": 1})
    second.child("again-learn").log_metrics({"loss": 1.0}, step=1)
    second.end()

    run, child = find(client, "again"), find(client, "again-learn")
    assert run.data.params == {"lr": "0.1", "steps": "60", "new": "1"}
    assert run.data.tags["changed.lr"] == "0.2"
    assert [m.value for m in client.get_metric_history(child.info.run_id, "loss")] == [2.0, 1.0]
    assert (run.info.status, child.info.status) == ("FINISHED", "FINISHED")
    assert len(tracker.summary()) == 2, "nothing was skipped or lost"


def test_a_run_deleted_in_the_store_begins_anew(runs, client):
    _, first = begin(runs, "gone")
    first.child("gone-learn")
    first.end()
    client.delete_run(find(client, "gone").info.run_id)
    _, second = begin(runs, "gone")
    second.child("gone-learn-2")
    second.end()
    assert find(client, "gone").info.status == "FINISHED"
    assert find(client, "gone-learn-2").data.tags["mlflow.parentRunId"] == find(client, "gone").info.run_id


def test_a_refused_record_does_not_end_tracking(runs, client, caplog):
    tracker, run = begin(runs, "refused")
    run.log_artifact(Path("does-not-exist"))
    run.log_artifact(Path("does-not-exist-either"))
    run.log_metrics({"after": 1.0})
    run.end()
    assert find(client, "refused").data.metrics == {"after": 1.0}
    assert len(caplog.records) == 1
    assert "did not take 2 artifact record(s)" in tracker.summary()[-1]


def test_the_machine_is_measured(runs, client):
    _, run = begin(runs, "busy")
    with run, SystemMetrics(run, every=0.05):
        time.sleep(0.5)
    metrics = find(client, "busy").data.metrics
    assert metrics["system/system_memory_usage_megabytes"] > 0
    assert 0 <= metrics["system/cpu_utilization_percentage"] <= 100
    run_id = find(client, "busy").info.run_id
    steps = [m.step for m in client.get_metric_history(run_id, "system/cpu_utilization_percentage")]
    assert steps == list(range(len(steps)))
    assert len(steps) > 1


def test_records_are_delivered_once_to_each_store(runs, client, tmp_path):
    _, run = begin(runs, "once")
    with run, run.child("once-learn") as learn:
        learn.log_metrics({"loss": 1.0}, step=0)
    assert [sent for name, sent, _ in sync(runs, None) if name == "once"] == [0]
    other = f"sqlite:///{tmp_path / 'other.db'}"
    assert [sent for name, sent, _ in sync(runs, other) if name == "once"] == [5]
    assert [sent for name, sent, _ in sync(runs, other) if name == "once"] == [0]
    there = MlflowClient(other)
    child = find(there, "once-learn")
    assert [m.value for m in there.get_metric_history(child.info.run_id, "loss")] == [1.0]
    here = find(client, "once-learn").info
    assert abs(child.info.start_time - here.start_time) <= 1, "the time of the record, not of its delivery"
    assert (child.info.status, child.info.end_time) == ("FINISHED", here.end_time)
