"""Two processes at one name: the second is told of the first, and what a dead one left stands in nobody's way."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from pipeline.errors import UserError
from pipeline.execution import occupancy
from pipeline.execution.occupancy import FILE, occupied

HOLDS = """
import sys, time
from pathlib import Path
from pipeline.execution.occupancy import occupied
with occupied(sys.argv[1], Path(sys.argv[2])):
    print("there", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process, at ``run``."""
    command = [sys.executable, "-c", HOLDS, str(tmp_path / "run"), str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).resolve().parents[3])
    assert process.stdout is not None
    assert process.stdout.readline() == "there\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_process_is_told_of_the_first_until_that_is_gone(other: subprocess.Popen[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(UserError) as caught, occupied(str(run), run):
        pytest.fail("both were let in")
    who = f"process {other.pid} on {socket.gethostname()}, since "
    assert str(caught.value).startswith(f"output: {run} is in use by {who}")
    with occupied(str(tmp_path / "else"), tmp_path / "else"):  # another name
        pass
    other.kill()
    other.wait()
    with occupied(str(run), run):  # the file is still there, the lock is not
        assert json.loads((run / FILE).read_text())["pid"] == os.getpid()


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(occupancy, "SETTLED", 0.01)
    monkeypatch.setattr(occupancy, "BEAT", 0.02)
    return f"memory://{tmp_path.name}/run"


def _announce(uri: str, **changes: object) -> None:
    said = {"pid": 1, "host": "elsewhere", "since": "Monday", "id": "x", "alive": time.time()} | changes
    fs, root = fsspec.core.url_to_fs(uri)
    fs.makedirs(root, exist_ok=True)
    fs.pipe_file(f"{root}/{FILE}", json.dumps(said).encode())


def test_on_a_store_a_process_announces_itself_and_shows_that_it_is_alive(store: str, tmp_path: Path) -> None:
    fs, root = fsspec.core.url_to_fs(store)

    def said() -> float:
        return float(json.loads(fs.cat_file(f"{root}/{FILE}"))["alive"])

    with occupied(store, tmp_path / "a"):
        first = said()
        with pytest.raises(UserError, match=re.escape(f"{store} is in use by process {os.getpid()} on")):
            occupied(store, tmp_path / "b").__enter__()
        deadline = time.time() + 10
        while said() == first and time.time() < deadline:
            time.sleep(0.02)
        assert said() > first
    assert not fs.exists(f"{root}/{FILE}")


def test_who_is_there_on_a_store_and_who_is_there_no_longer(store: str, tmp_path: Path) -> None:
    _announce(store)
    with pytest.raises(UserError, match="in use by process 1 on elsewhere, since Monday"):
        occupied(store, tmp_path).__enter__()
    _announce(store, host=socket.gethostname(), pid=os.getppid())
    with pytest.raises(UserError, match="in use by process"):
        occupied(store, tmp_path).__enter__()
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    gone = {"host": socket.gethostname(), "pid": int(ended.stdout)}
    for changes in (gone, {"alive": time.time() - occupancy.GONE - 1}):
        _announce(store, **changes)
        with occupied(store, tmp_path):
            pass
    fs, root = fsspec.core.url_to_fs(store)
    fs.pipe_file(f"{root}/{FILE}", b"cut o")
    with occupied(store, tmp_path):
        pass


def test_of_two_that_come_at_the_same_moment_one_stays(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(occupancy.time, "sleep", lambda _: _announce(store))
    with pytest.raises(UserError, match="in use by process 1 on elsewhere"):
        occupied(store, tmp_path).__enter__()
