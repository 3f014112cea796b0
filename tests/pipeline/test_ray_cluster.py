"""The cluster of a run: how it ends."""

from __future__ import annotations

import threading
import time

import pytest
import ray

from pipeline.ray_cluster import start_ray, stop_ray

pytestmark = pytest.mark.ray


def test_threads_that_read_ahead_are_waited_for() -> None:
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
