"""The cluster of a run: that it is the run's own, and how it ends."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from pipeline.execution.ray_cluster import start_ray, stop_ray

pytestmark = pytest.mark.ray


@pytest.fixture
def remains_of_a_cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The file that ``ray start`` leaves on a machine; nothing listens at its address any more."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="r") as folder:  # sockets need a short path
        file = Path(folder) / "ray" / "ray_current_cluster"
        file.parent.mkdir()
        file.write_text("127.0.0.1:9")
        monkeypatch.setenv("RAY_TMPDIR", folder)
        yield


@pytest.mark.usefixtures("remains_of_a_cluster")
def test_threads_that_read_ahead_are_waited_for_on_a_cluster_of_the_runs_own() -> None:
    """One that called Ray after its end would end the process, silently."""
    start_ray()
    counts: list[float] = []

    def read_ahead() -> None:
        time.sleep(1.5)
        counts.append(ray.cluster_resources()["CPU"])

    thread = threading.Thread(target=read_ahead, name="iter_threaded", daemon=True)
    thread.start()
    stop_ray()
    assert not thread.is_alive()
    assert counts
    assert not ray.is_initialized()
