"""Tracking servers that are not there, or leave, or come back."""

import logging
import time

import pytest
from browser import MlflowServer, free_port
from mlflow import MlflowClient

from pipeline.config import TrackingConfig
from pipeline.run import main
from pipeline.tracking import make_tracker, outbox
from pipeline.tracking.journal import read
from pipeline.tracking.mlflow_store import MlflowStore
from pipeline.tracking.sync import sync


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = MlflowServer(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


def events(directory, name):
    return [record["event"] for record, _ in read(directory / "tracking" / name / "records.jsonl")]


def runs_of(server, experiment):
    client = MlflowClient(server.uri)
    found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    return client, {run.info.run_name: run for run in found}


def test_no_server(tmp_path, caplog):
    uri = f"http://127.0.0.1:{free_port()}"
    began = time.monotonic()
    tracker = make_tracker(TrackingConfig(uri=uri, experiment="test"), tmp_path / "runs" / "nano")
    with tracker.start_run("run") as run:
        run.log_params({"a": 1})
        run.child("stage").log_metrics({"x": 1.0}, step=1)
    assert time.monotonic() - began < 5
    assert events(tmp_path / "runs" / "nano", "run") == ["start", "params", "start", "metrics", "end", "end"]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "\n" not in caplog.records[0].getMessage()
    assert tracker.summary()[1:] == [
        f"MLflow at {uri} is away: 6 records wait for python pipeline/run.py sync --runs {tmp_path / 'runs'}"
    ]
    assert tracker.info()["note"] == tracker.summary()[-1]


@pytest.mark.slow
def test_what_a_dead_server_missed_is_uploaded_once(tmp_path, server, caplog):
    runs = tmp_path / "runs"
    (tmp_path / "report.html").write_text("<p>hello")
    tracker = make_tracker(TrackingConfig(uri=server.uri, experiment="dies"), runs / "nano")
    run = tracker.start_run("run")
    run.log_params({"a": 1})
    learn = run.child("learn")
    learn.log_metrics({"loss": 3.0}, step=0)
    assert not [record for record in caplog.records if record.name.startswith("pipeline")]

    server.kill()
    began = time.monotonic()
    learn.log_metrics({"loss": 2.0}, step=1)
    assert time.monotonic() - began < 15
    began = time.monotonic()
    run.child("variant").log_metrics({"perplexity": 2.0})
    run.log_artifact(tmp_path / "report.html")
    run.end()
    assert time.monotonic() - began < 5
    said = [record.getMessage() for record in caplog.records if record.name.startswith("pipeline")]
    assert len(said) == 1
    assert "is away, the run goes on and keeps its records" in said[0]
    assert "7 records wait for" in tracker.summary()[-1]
    ((name, sent, left),) = sync(runs, None)
    assert (name, sent) == ("run", 0)
    assert "is away" in left[0]

    server.start()
    assert list(sync(runs, None)) == [("run", 7, [])]
    client, found = runs_of(server, "dies")
    assert {run.info.status for run in found.values()} == {"FINISHED"}
    assert set(found) == {"run", "learn", "variant"}
    history = client.get_metric_history(found["learn"].info.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(0, 3.0), (1, 2.0)]
    assert [a.path for a in client.list_artifacts(found["run"].info.run_id)] == ["report.html"]
    assert list(sync(runs, None)) == [("run", 0, [])]
    assert len(runs_of(server, "dies")[1]) == 3


@pytest.mark.slow
def test_a_server_that_comes_back_gets_what_it_missed(tmp_path, server, caplog, monkeypatch):
    monkeypatch.setattr(outbox, "FIRST_PAUSE", 0.0)
    caplog.set_level(logging.WARNING)
    run = make_tracker(TrackingConfig(uri=server.uri, experiment="returns"), tmp_path / "runs" / "nano").start_run(
        "run"
    )
    server.kill()
    run.log_metrics({"x": 1.0}, step=0)
    server.start()
    run.log_metrics({"x": 2.0}, step=1)
    assert "is back and has all records" in caplog.records[-1].getMessage()
    client, found = runs_of(server, "returns")
    history = client.get_metric_history(found["run"].info.run_id, "x")
    assert [(m.step, m.value) for m in history] == [(0, 1.0), (1, 2.0)]
    run.end()


def test_a_run_under_way_is_left_to_its_process(tmp_path):
    run = make_tracker(TrackingConfig(experiment="test"), tmp_path / "runs" / "nano").start_run("run")
    assert list(sync(tmp_path / "runs", None)) == [("run", 0, ["is under way; left to its own process"])]
    run.end()


def test_no_password_is_shown(tmp_path):
    store = MlflowStore("postgresql://me:secret@db/mlflow", "test", tmp_path)
    assert "secret" not in f"{store} {store.info()}"
    assert not [file for file in tmp_path.iterdir() if "secret" in file.read_text()]


@pytest.mark.parametrize(
    "uri",
    ["sqlite:////proc/nowhere/mlflow.db", "postgresql://user:word@127.0.0.1:{port}/runs", "http://127.0.0.1:{port}"],
)
def test_a_store_that_cannot_be_opened_costs_seconds(tmp_path, capsys, uri):
    """MLflow itself tries a database for three minutes and more."""
    uri = uri.format(port=free_port())
    began = time.monotonic()
    tracker = make_tracker(TrackingConfig(uri=uri), tmp_path / "runs" / "nano")
    with tracker.start_run("run") as run:
        run.log_params({"a": 1})
    assert "is away: 3 records wait" in tracker.summary()[-1]
    assert main(["compare", "--runs", str(tmp_path / "runs"), "--uri", uri]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --uri ")
    assert said.count("\n") == 1
    assert "word" not in said
    assert main(["sync", "--runs", str(tmp_path / "runs"), "--uri", uri]) == 1
    assert time.monotonic() - began < 20


def test_a_mistyped_address_is_refused_or_forgotten(tmp_path, capsys):
    runs = tmp_path / "runs"
    with make_tracker(TrackingConfig(), runs / "nano").start_run("run") as run:
        run.log_params({"a": 1})
    for command in (["compare"], ["sync"]):
        assert main([*command, "--runs", str(runs), "--uri", "foo://x"]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: --uri foo://x: MLflow has no store foo://, but http, https, ")
        assert said.count("\n") == 1
    away = f"http://127.0.0.1:{free_port()}"
    assert main(["sync", "--runs", str(runs), "--uri", away]) == 1
    assert "is away" in capsys.readouterr().out
    assert list(sync(runs, None)) == [("run", 0, [])]
    assert main(["sync", "--runs", str(tmp_path / "no-such")]) == 2
    said = capsys.readouterr().err
    assert said == f"error: --runs {tmp_path / 'no-such'}: there is no such directory; give the directory of the runs\n"
