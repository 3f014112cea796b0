"""The Ray cluster that a run works on: that of a submitted job, else one on this machine for this run only."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import torch

from pipeline.errors import UserError
from pipeline.execution import failures

#: Where Ray reads the port of a cluster that it starts.
_PORT = "RAY_GCS_SERVER_PORT"
#: Name of Ray Data's threads that read ahead of an iterator, and how long they may outlive it (seconds).
_READ_AHEAD, _PATIENCE = "iter_threaded", 10.0


def start_ray() -> None:
    """Connect to the cluster of a submitted job, else start one on this machine."""
    for noisy in ("ray", "ray.data"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if "RAY_ADDRESS" in os.environ:
        ray.init(**quiet)
    else:
        _start_here(quiet)
    end_in_order_when_terminated()  # again: ray.init sets a handler of its own
    atexit.register(stop_ray)  # before the one that Ray registered when it was imported


def stop_ray() -> None:
    """Leave the cluster, or end it where it was started for this process.

    Ray Data's threads outlive their iterator by a moment. One that calls Ray after its end would end this process with
    exit code 1 and not a word, so they are waited for.
    """
    for thread in threading.enumerate():
        if thread.name == _READ_AHEAD:
            thread.join(_PATIENCE)
    ray.shutdown()


def _start_here(quiet: dict[str, Any]) -> None:
    # A run starts a dozen processes that mostly wait; Ray would warn of more than there are CPUs.
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "8")
    # Its workers run at nice 15 by default: beside anything else on the machine, their start takes minutes.
    os.environ.setdefault("RAY_worker_niceness", "0")
    variables = _source_paths()
    try:
        _init(variables, quiet)
    except Exception:  # Ray raises nothing more special
        # Its processes wait for one another for half a minute each; on a busy machine, or just after the installation,
        # when nothing is in the file cache yet, that may be too short once.
        try:
            _init(variables, quiet)
        except Exception as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"Ray does not start on this machine: {reason}. Where the machine is busy, run the same command again "
                "later; the logs are in /tmp/ray/session_latest/logs"
            ) from error


def _source_paths() -> dict[str, str]:
    """PYTHONPATH for the workers of a source checkout that nobody installed; an installed package is found anyway."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "kernels").is_dir():
        return {}
    paths = [str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def _init(variables: dict[str, str], quiet: dict[str, Any]) -> None:
    with _known_port() as port:
        # Ray Train frees the places of killed workers through the state API, which gives up where it finds a second
        # cluster on the machine, unless it is told which is its own.
        address = f"{ray.util.get_node_ip_address()}:{port}"
        ray.init(
            # Without an address Ray joins whatever cluster this machine has, alive or dead, and refuses num_cpus.
            address="local",
            num_cpus=int(resources()["CPU"]),
            include_dashboard=True,  # without it, a killed worker group is never cleaned up
            dashboard_host="127.0.0.1",
            runtime_env={"env_vars": {**variables, "RAY_ADDRESS": address}},
            **quiet,
        )


@contextmanager
def _known_port() -> Iterator[int]:
    """A free port, at which a cluster that is started meanwhile is reached."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    os.environ[_PORT] = str(port)
    try:
        yield port
    finally:
        del os.environ[_PORT]


def resources() -> dict[str, float]:
    """CPUs and GPUs of the cluster; before Ray runs, those of the cluster that it will start on this machine."""
    if ray.is_initialized():
        of_cluster: dict[str, float] = ray.cluster_resources()
        return of_cluster
    # Two at least: the second is idle most of the time, but a single one could not place two workers.
    return {"CPU": max(2, os.cpu_count() or 1), "GPU": torch.cuda.device_count()}


def largest_node() -> float:
    """CPUs of the node that has the most."""
    return float(max(node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]))


def end_in_order_when_terminated() -> None:
    """Make SIGTERM end the run as Ctrl-C does; once, so that a second one does not cut the ending short."""
    signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(number: int, _frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt(f"terminated by {signal.Signals(number).name}")


def result_of(reference: Any) -> Any:
    """The result of a Ray task; the user's errors come out as they went in."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        if found := failures.mendable(error):
            raise found from error
        cause = failures.cause_of(error)
        if isinstance(cause, ValueError):
            raise UserError(str(cause)) from error
        raise
