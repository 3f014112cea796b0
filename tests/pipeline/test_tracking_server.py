"""Tracking servers that are not there, or leave."""

import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pipeline.tracking import make_tracker
from pipeline.tracking.mlflow_tracker import MlflowTracker


class Stub(BaseHTTPRequestHandler):
    """As much of MLflow's REST interface as creating a run and logging to it needs."""

    calls: list[str]

    def answer(self):
        if length := int(self.headers.get("Content-Length", 0)):
            self.rfile.read(length)
        call = self.path.split("?")[0].removeprefix("/api/2.0/mlflow/")
        self.calls.append(call)
        info = {
            "run_id": "r1",
            "run_uuid": "r1",
            "experiment_id": "1",
            "status": "RUNNING",
            "artifact_uri": "file:///x",
        }
        bodies = {
            "experiments/get-by-name": {"experiment": {"experiment_id": "1", "name": "test"}},
            "runs/create": {"run": {"info": info, "data": {}}},
            "runs/log-batch": {},
        }
        body = json.dumps(bodies.get(call, {})).encode()
        self.send_response(200 if call in bodies or call == "/health" else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = answer

    def log_message(self, *_): ...


@pytest.fixture
def server():
    Stub.calls = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.server_close()


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def local_events(directory):
    lines = (directory / "tracking" / "records.jsonl").read_text().splitlines()
    return [json.loads(line)["event"] for line in lines]


def test_no_server(tmp_path, caplog):
    uri = f"http://127.0.0.1:{free_port()}"
    began = time.monotonic()
    tracker = make_tracker(uri, "test", tmp_path)
    with tracker.start_run("run") as run:
        run.log_params({"a": 1})
        run.child("stage").log_metrics({"x": 1.0}, step=1)
    assert time.monotonic() - began < 5
    assert local_events(tmp_path) == ["start", "params", "start", "metrics", "end", "end"]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "\n" not in caplog.records[0].getMessage()
    assert tracker.summary()[1:] == [f"MLflow at {uri} could not be used and has no record of this run."]
    assert tracker.info()["note"] == tracker.summary()[-1]


def test_the_server_dies(tmp_path, server, caplog):
    uri = f"http://127.0.0.1:{server.server_port}"
    tracker = make_tracker(uri, "test", tmp_path)
    run = tracker.start_run("run")
    run.log_params({"a": 1})
    run.log_metrics({"x": 1.0}, step=1)
    assert Stub.calls[-1] == "runs/log-batch"
    assert not caplog.records

    server.shutdown()
    server.server_close()
    began = time.monotonic()
    run.log_metrics({"x": 2.0}, step=2)
    assert time.monotonic() - began < 15
    began = time.monotonic()
    run.child("stage").log_metrics({"y": 2.0}, step=3)
    run.end()
    assert time.monotonic() - began < 1
    assert local_events(tmp_path) == ["start", "params", "metrics", "metrics", "start", "metrics", "end", "end"]
    assert [record.levelname for record in caplog.records if record.name.startswith("pipeline")] == ["WARNING"]
    assert "has only the first 3 records" in tracker.summary()[-1]
    assert tracker.info()["run_id"] == "r1"


def test_no_password_is_shown(tmp_path):
    tracker = MlflowTracker("postgresql://me:secret@db/mlflow", "test", tmp_path / "state.json")
    assert "secret" not in f"{tracker} {tracker.info()} {tracker.summary()}"
