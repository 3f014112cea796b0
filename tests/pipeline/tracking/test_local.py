import math
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import files_up_to
from matplotlib.figure import Figure

from pipeline.config import TrackingConfig
from pipeline.errors import UserError
from pipeline.tracking import LocalRecords, NoTracker, make_tracker
from pipeline.tracking.journal import read
from pipeline.tracking.values import flatten, jsonable


def records(directory):
    """Of the run called run."""
    return [record for record, _ in read(directory / "run" / "records.jsonl")]


def test_every_call_is_recorded(tmp_path):
    figure = Figure()
    figure.subplots().plot([1, 2])
    with LocalRecords(tmp_path).start_run("run", tags={"model": "nano"}) as run:
        run.log_params({"learn": {"steps": 60, "kinds": ["a", "b"]}})
        with run.child("learn") as child:
            child.log_metrics({"loss": 2.5, "density": math.nan}, step=3)
            assert child.last_step == 3
            child.log_figure(figure, "figures/loss.png")
        run.log_dict({"rows": np.int64(3)}, "calibration.json")
        run.log_table([{"name": "dense", "acc": 0.5}, {"name": "wanda", "seconds": 1.0}], "results.csv")
        run.log_artifact(tmp_path / "masks.leap", "masks")

    written = records(tmp_path)
    assert [(r["run"], r["event"]) for r in written] == [
        ("run", "start"),
        ("run", "params"),
        ("run/learn", "start"),
        ("run/learn", "metrics"),
        ("run/learn", "figure"),
        ("run/learn", "end"),
        ("run", "dict"),
        ("run", "table"),
        ("run", "artifact"),
        ("run", "end"),
    ]
    assert written[0]["tags"] == {"model": "nano"}
    assert written[1]["params"] == {"learn.steps": "60", "learn.kinds": '["a", "b"]'}
    assert written[3] | {"time": ""} == {
        "time": "",
        "run": "run/learn",
        "event": "metrics",
        "metrics": {"loss": 2.5, "density": "nan"},
        "step": 3,
    }
    assert (tmp_path / "run" / written[4]["file"]).read_bytes().startswith(b"\x89PNG")
    assert written[6]["value"] == {"rows": 3}
    assert (tmp_path / "run" / written[7]["file"]).read_text() == "name,acc,seconds\ndense,0.5,\nwanda,,1.0\n"
    assert all(r["status"] == "FINISHED" for r in written if r["event"] == "end")


def test_a_run_ends_its_open_children_and_says_why(tmp_path):
    def fail():
        with LocalRecords(tmp_path).start_run("run") as run:
            run.child("learn")
            raise ValueError("bad shape")

    with pytest.raises(ValueError, match="bad shape"):
        fail()
    ends = [(r["run"], r["status"], r["reason"]) for r in records(tmp_path) if r["event"] == "end"]
    assert ends == [("run/learn", "FAILED", "ValueError: bad shape"), ("run", "FAILED", "ValueError: bad shape")]


def test_an_interrupted_run_is_killed(tmp_path):
    with pytest.raises(KeyboardInterrupt), LocalRecords(tmp_path).start_run("run"):
        raise KeyboardInterrupt
    assert records(tmp_path)[-1]["status"] == "KILLED"


def test_records_survive_a_line_that_was_cut(tmp_path):
    LocalRecords(tmp_path).start_run("run").end()
    file = tmp_path / "run" / "records.jsonl"
    with file.open("a") as half:
        half.write('{"time": "20')
    LocalRecords(tmp_path).start_run("run").end()
    assert file.read_text().splitlines()[2] == '{"time": "20'
    assert [r["event"] for r in records(tmp_path)] == ["start", "end", "start", "end"]


def test_a_child_inherits_tags(tmp_path):
    with LocalRecords(tmp_path).start_run("run", tags={"model": "nano", "stage": "run"}) as run:
        run.child("learn", {"stage": "learn"}).child("trial", {"seed": "1"})
    tags = {r["run"]: r["tags"] for r in records(tmp_path) if r["event"] == "start"}
    assert tags["run/learn/trial"] == {"model": "nano", "stage": "learn", "seed": "1"}


def test_a_run_whose_process_is_gone_is_ended_as_killed_when_it_is_taken_up_again(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from pipeline.tracking import LocalRecords\n"
        "run = LocalRecords(Path(sys.argv[1])).start_run('run'); child = run.child('learn')\n"
        "child.log_metrics({'loss': 2.0}, step=7); os.kill(os.getpid(), 9)"
    )
    gone = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert gone.returncode == -signal.SIGKILL
    run = LocalRecords(tmp_path).start_run("run")
    assert run.child("learn").last_step == 7
    run.end()
    told = [(r["run"], r["event"], r.get("status")) for r in records(tmp_path)]
    assert told[3:6] == [("run/learn", "end", "KILLED"), ("run", "end", "KILLED"), ("run", "start", None)]


def test_two_processes_cannot_be_at_the_same_run(tmp_path):
    first = LocalRecords(tmp_path).start_run("run")
    LocalRecords(tmp_path).start_run("another").end()
    with pytest.raises(UserError, match=r"^output: another process is writing .*records.jsonl"):
        LocalRecords(tmp_path).start_run("run")
    first.end()
    LocalRecords(tmp_path).start_run("run").end()


def test_no_tracker_takes_everything():
    with NoTracker().start_run("run") as run:
        run.child("stage").log_metrics({"x": 1.0})
        run.log_params({"a": 1})


def test_mlflow_can_be_switched_off(tmp_path):
    tracker = make_tracker(TrackingConfig(uri="none", experiment="test"), tmp_path / "run")
    tracker.start_run("run").end()
    assert list(tmp_path.iterdir()) == [tmp_path / "run"]
    assert tracker.info() == {"records": str(tmp_path / "run" / "tracking" / "run" / "records.jsonl")}


def test_values():
    assert flatten({"a": {"b": {}, "c": None}, "d": (1, 2), "e": True}) == {
        "a.b": "{}",
        "a.c": "None",
        "d": "[1, 2]",
        "e": "True",
    }
    assert jsonable({1: np.array([1.5, np.inf]), "p": {"x"}}) == {"1": [1.5, "inf"], "p": ["x"]}


@pytest.mark.parametrize("uri", ["none", None])
def test_a_full_disk_costs_records_and_does_not_end_the_run(tmp_path, caplog, uri):
    figure = Figure()
    tracker = make_tracker(TrackingConfig(uri=uri), tmp_path / "run")
    with tracker.start_run("run") as run:
        run.log_dict({"before": 1}, "a.json")
        file = tmp_path / "run" / "tracking" / "run" / "records.jsonl"
        whole = file.read_bytes()
        with files_up_to(len(whole) + 100):
            run.log_dict({"during": "x" * 500}, "b.json")
            run.log_figure(figure, "c.png")
            with run.child("learn") as child:
                child.log_metrics({"loss": 1.0}, step=1)
        run.log_dict({"after": 1}, "d.json")
    assert file.read_bytes().startswith(whole)
    written = [record for record, _ in read(file)]
    assert [record["name"] for record in written if record["event"] == "dict"] == ["a.json", "d.json"]
    assert file.read_text().count("\n") == len(written), "no line is cut off"
    assert written[-1]["event"] == "end"
    lost = [message for message in caplog.messages if "cannot be written" in message]
    assert len(lost) == 1
    said = tracker.summary()[0]
    assert said.endswith(f"records of this run could not be written; the others are in {file}.")
    assert int(said.split()[0]) >= 3
