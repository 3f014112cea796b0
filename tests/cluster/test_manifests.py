"""The manifests against the fields they use and the recipes; the SLURM script with SLURM stood in for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from conftest import ROOT

from pipeline.config import recipe

CLUSTER = ROOT / "cluster"


@pytest.fixture
def job() -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / "rayjob.yaml").read_text())


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "tests" / "cluster" / "rayjob.schema.yaml").read_text())


def test_the_rayjob_is_valid(job: dict[str, Any], schema: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(job, schema)
    assert job["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}


@pytest.mark.parametrize("misplaced", ["authOption", "authoptions"])
def test_the_schema_refuses_what_the_operator_would_drop(
    job: dict[str, Any], schema: dict[str, Any], misplaced: str
) -> None:
    job["spec"]["rayClusterSpec"][misplaced] = {"mode": "token"}
    with pytest.raises(jsonschema.ValidationError, match=misplaced):
        jsonschema.validate(job, schema)


def test_the_rayjob_asks_for_the_gpus_of_its_recipe(job: dict[str, Any]) -> None:
    words = job["spec"]["entrypoint"].split()
    assert (ROOT / words[1].removeprefix("/opt/leap/")).exists()
    learn = recipe.load(words[words.index("--recipe") + 1]).learn["leap"]
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    (worker,) = group["template"]["spec"]["containers"]
    assert group["replicas"] * int(worker["resources"]["limits"]["nvidia.com/gpu"]) == learn.workers
    pinned = (ROOT / "constraints.txt").read_text()
    assert f"ray=={job['spec']['rayClusterSpec']['rayVersion']}\n" in pinned


def test_a_pod_mounts_the_volumes_it_has(job: dict[str, Any]) -> None:
    spec = job["spec"]["rayClusterSpec"]
    for pod in (spec["headGroupSpec"]["template"], *(group["template"] for group in spec["workerGroupSpecs"])):
        (container,) = pod["spec"]["containers"]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["spec"]["volumes"]}


def test_the_dockerfile_copies_what_exists() -> None:
    dockerfile = (CLUSTER / "Dockerfile").read_text()
    copied = [word for line in dockerfile.splitlines() if line.startswith("COPY") for word in line.split()[1:-1]]
    assert copied
    assert all((ROOT / name).exists() for name in copied)


def test_the_machines_of_ray_up_are_ones_own() -> None:
    assert yaml.safe_load((CLUSTER / "cluster.yaml").read_text())["provider"]["type"] == "local"


def slurm(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The script in an allocation of two nodes whose commands write down what they are asked for."""
    stand_ins = {
        "scontrol": 'echo "$*" >> calls; printf "node-1\\nnode-2\\n"',
        "srun": 'case "$*" in *hostname*) echo "fe80::1 10.0.0.1";; '
        '*) printf "%s\\n" "$@" > arguments; echo "$RAY_AUTH_MODE $RAY_AUTH_TOKEN" > token; exit "${FAILS:-0}";; esac',
    }
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    allocation = {"SLURM_JOB_NODELIST": "node-[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "41234"}
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "LEAP_PYTHON": sys.executable,
        **allocation,
        **environment,
    }
    command = ["bash", str(CLUSTER / "slurm.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_the_slurm_script_starts_ray_on_each_node_and_the_run_on_the_first(tmp_path: Path) -> None:
    assert slurm(tmp_path, "--recipe", "nano", "output=a b").returncode == 0
    arguments = (tmp_path / "arguments").read_text().splitlines()
    assert arguments[:3] == ["--nodes=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    before, command = arguments[3 : arguments.index("--")], arguments[arguments.index("--") + 1 :]
    assert before == ["ray", "symmetric-run", "--address", "10.0.0.1:21234", "--min-nodes", "2"]
    run = ["pipeline/run.py", "run", "--recipe", "nano", "output=a b"]
    assert command == ["env", "RAY_ADDRESS=10.0.0.1:21234", sys.executable, *run]
    mode, token = (tmp_path / "token").read_text().split()
    assert mode == "token"
    assert len(token) == 64
    assert token not in (tmp_path / "arguments").read_text()


def test_the_slurm_job_fails_as_the_run_does(tmp_path: Path) -> None:
    assert slurm(tmp_path, "--recipe", "nano", FAILS="3").returncode == 3


def test_the_slurm_script_says_what_is_missing(tmp_path: Path) -> None:
    done = slurm(tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "sbatch" in done.stderr
    done = slurm(tmp_path, "--recipe", "nano", LEAP_PYTHON=str(tmp_path / "none"))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "LEAP_PYTHON" in done.stderr
