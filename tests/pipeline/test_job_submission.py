"""``ray job submit`` to a cluster whose environment has the dependencies but not this project, tokens left on."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from conftest import ROOT

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def cluster(bare_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """A head node started as the README says; its dashboard address and the environment of a client."""
    home = tmp_path_factory.mktemp("home")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k != "PYTHONPATH"}
    environment["XDG_CACHE_HOME"] = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
    # The token lies below HOME: a directory of its own shows that a fresh one is made and found.
    environment |= {"HOME": str(home), "PATH": f"{bare_python.parent}{os.pathsep}{environment['PATH']}"}
    environment["RAY_AUTH_MODE"] = "token"
    ray = [str(bare_python), "-m", "ray.scripts.scripts"]
    subprocess.run([*ray, "get-auth-token", "--generate"], env=environment, check=True, capture_output=True)
    assert (home / ".ray" / "auth_token").exists()
    port = _free_port()
    temporary = Path("/tmp") / f"ray-{os.getpid()}"  # unix sockets need a short path
    head = subprocess.Popen(
        [
            *ray,
            "start",
            "--head",
            "--block",
            f"--port={_free_port()}",
            f"--dashboard-port={port}",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-agent-listen-port={_free_port()}",
            f"--ray-client-server-port={_free_port()}",
            "--num-cpus=2",
            f"--temp-dir={temporary}",
        ],
        env=environment,
        cwd=home,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_for(port)
        yield address, environment
    finally:
        # Not ``ray stop``, which ends every cluster on the machine.
        family = [head_process := psutil.Process(head.pid), *head_process.children(recursive=True)]
        head.terminate()
        _, alive = psutil.wait_procs(family, timeout=20)
        for process in alive:
            process.kill()
        shutil.rmtree(temporary, ignore_errors=True)


def _wait_for(port: int) -> None:
    for _ in range(240):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    raise AssertionError("the head node did not come up")


def _submitted(bare_python: Path, cluster: tuple[str, dict[str, str]], *command: str) -> str:
    """What a job prints that runs ``pipeline/run.py`` with these arguments."""
    address, environment = cluster
    submit = [str(bare_python), "-m", "ray.scripts.scripts", "job", "submit", f"--address={address}"]
    done = subprocess.run(
        [*submit, "--working-dir", ".", "--", "python", "pipeline/run.py", *command],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "succeeded" in done.stdout
    return done.stdout


def test_a_submitted_job_runs_the_pipeline(
    bare_python: Path, cluster: tuple[str, dict[str, str]], tiny: Path, tmp_path: Path
) -> None:
    short = ["learn.leap.settings.steps=4", "evaluate.cloze=null", f"output={tmp_path}"]
    printed = _submitted(bare_python, cluster, "run", "--recipe", str(tiny / "tiny.yaml"), *short)
    assert "leap@0.5" in printed
    assert (tmp_path / "tiny" / "report.html").exists()


def test_a_submitted_job_searches(
    bare_python: Path, cluster: tuple[str, dict[str, str]], tiny: Path, tmp_path: Path
) -> None:
    short = ["learn.leap.settings.steps=4", f"output={tmp_path}"]
    search = ["tune", "--recipe", str(tiny / "tiny.yaml"), "--space", "rate", "--trials", "3"]
    printed = _submitted(bare_python, cluster, *search, *short)
    assert "3 trials" in printed
    (directory,) = (tmp_path / "tiny" / "tune").iterdir()
    assert (directory / "winner.yaml").exists()
    assert (directory / "report.html").exists()


def test_a_client_without_the_token_is_refused(
    bare_python: Path, cluster: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    address, environment = cluster
    listing = [str(bare_python), "-m", "ray.scripts.scripts", "job", "list", f"--address={address}"]
    stranger = {k: v for k, v in environment.items() if k != "RAY_AUTH_MODE"} | {"HOME": str(tmp_path)}
    refused = subprocess.run(listing, env=stranger, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert refused.returncode != 0
