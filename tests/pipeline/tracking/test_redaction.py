"""Secrets that a recipe names, looked for in everything that a run writes and prints."""

import json
import logging

import pytest

from pipeline.config import TrackingConfig, recipe
from pipeline.execution.progress import Console
from pipeline.tracking import LocalRecords, make_tracker, redaction
from pipeline.tracking.mlflow_store import STATES
from pipeline.tracking.redaction import redact
from pipeline.tracking.sync import sync
from pipeline.tuning import winner

PASSWORDS = ["pl41n", "p@ss", "sl/ash", "b@th/of@them/", "c:lon", "99/9@", "q?u=x&y#z", 'qu"ote']


@pytest.mark.parametrize("password", PASSWORDS)
@pytest.mark.parametrize("scheme", ["postgresql+psycopg2", "http", "s3"])
def test_nothing_of_a_password_is_left(scheme, password):
    hidden = redact(f"cannot reach {scheme}://user:{password}@host:5000/db, waiting")
    assert hidden == f"cannot reach {scheme}://***@host:5000/db, waiting"
    assert redact(hidden) == hidden


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("https://ghp_abc@host/x", "https://***@host/x"),
        ("redis://:word@host", "redis://***@host"),
        ("postgresql://h/db?user=a&password=b/c@d", "postgresql://h/db?user=a&password=***"),
        ("https://store/x?X-Amz-Signature=abc&part=2", "https://store/x?X-Amz-Signature=***&part=2"),
        ("a://u:1@h and b://v:2@h", "a://***@h and b://***@h"),
    ],
)
def test_other_places_of_secrets_in_addresses(text, hidden):
    assert redact(text) == hidden


@pytest.mark.parametrize(
    "text",
    [
        "sqlite:////home/a:b/x@y/mlflow.db",
        "file:///runs/a@b",
        "s3://bucket/harden/leap@0.5-abc",
        "http://127.0.0.1:5000",
        "abfs://container@account.dfs.core.windows.net/x",
        "hdfs://node:8020/harden/leap@0.5",
        "leap@0.5: 1:2 of a@b.c",
        "https://host/x?tokens=5&page=2",
    ],
)
def test_what_holds_no_secret_stays(text):
    assert redact(text) == text


def test_fields_are_told_by_their_names():
    secrets = {"password": "a", "hf_token": "b", "HF_TOKEN": "c", "apiKey": "d", "aws.secret.access_key": "e", "key": 1}
    hidden = redact({"inner": [secrets], "credentials": ["x"]})
    assert hidden == {"inner": [dict.fromkeys(secrets, "***")], "credentials": ["***"]}
    public = {"tokens": "1", "tokenizer": "x", "tokens_per_second": 2.0, "keys": "k", "token": None, "acc.token": 0.5}
    assert redact(public) == public


@pytest.mark.parametrize("password", PASSWORDS)
def test_a_run_writes_no_secret_anywhere(password, tmp_path, capsys, caplog):
    caplog.set_level(logging.INFO)
    uri = f"nosuch://user:{password}@host/db"
    tracker = make_tracker(TrackingConfig(uri=uri, experiment="test"), tmp_path / "runs" / "tiny")
    with Console(tmp_path / "runs" / "run.log", "lines") as console, tracker.start_run("tiny", tags={"at": uri}) as run:
        run.log_params({"tracking": {"uri": uri}, "data": [{"token": password}], "hub_token": password})
        run.log_dict({"tracking": {"uri": uri}}, "recipe.json")
        run.log_table([{"uri": uri, "secret": password}], "results.csv")
        run.log_input("text", "abc", uri, "training", {})
        console.say(f"at {uri}")
        console.warn(f"at {uri}")
        console.progress("x", 1, 2, uri, notable=True)
        console.emit("result", uri=uri, api_key=password)
        run.end("FAILED", f"at {uri}")
    print(*tracker.summary(), tracker.info())
    told = capsys.readouterr()
    everything = told.out + told.err + caplog.text
    for file in (tmp_path / "runs").rglob("*"):
        everything += file.read_text() if file.is_file() else ""
    assert "***@host/db" in everything
    assert f"user:{password}" not in everything
    assert json.dumps(password)[1:-1] not in everything
    # What is written is not what it is delivered to.
    (state,) = (tmp_path / "runs").rglob(STATES)
    assert "***" in json.loads(state.read_text())["uri"]
    assert list(sync(tmp_path / "runs", None)) == []


def test_a_model_behind_a_password_is_recorded_where_it_can_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.tracking.tracker.local_copy", lambda _: tmp_path / "copy")
    with LocalRecords(tmp_path / "records").start_run("run") as run:
        run.log_model("ftp://user:p@ss/word@host/export", "model", "best", {})
        run.log_model("s3://bucket/leap@0.5", "model", "best", {})
    lines = map(json.loads, (tmp_path / "records" / "run" / "records.jsonl").read_text().splitlines())
    places = [line["directory"] for line in lines if line["event"] == "model"]
    assert places == [str(tmp_path / "copy"), "s3://bucket/leap@0.5"]


def test_a_winner_is_written_without_a_password(tmp_path):
    uri = "postgresql://user:p@ss/word@host/db"
    config = recipe.load("nano", [f"tracking.uri={uri}", "tracking.experiment=mine"])
    written = winner.write(tmp_path / "winner.yaml", "nano", config, "leap", {}, "a test")
    assert "word" not in (tmp_path / "winner.yaml").read_text()
    assert (written.tracking.uri, written.tracking.experiment) == (None, "mine")


def test_a_password_with_blanks_is_taken_out_wherever_it_stands(monkeypatch):
    monkeypatch.setattr(redaction, "_known", set())
    text = "cannot reach http://user:two words/@x@host:5000/db, waiting"
    redaction.remember("http://user:two words/@x@host:5000/db")
    assert redact(text) == "cannot reach http://***@host:5000/db, waiting"
    assert redact("port 'two words/@x'") == "port '***'"
    assert redact("two%20words/%40x") == "***"
