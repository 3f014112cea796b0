"""What a command ends with: one line wherever a user can mend it, however it is wrapped."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import sqlalchemy
import torch
from conftest import files_up_to
from ray.exceptions import NodeDiedError, OutOfDiskError, OutOfMemoryError, RayTaskError, WorkerCrashedError
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError
from safetensors.torch import save_file

import pipeline.commands.prune
from pipeline.errors import DamagedError, UserError
from pipeline.execution.failures import cause_of, mendable
from pipeline.run import main


def _raised(error: BaseException, cause: BaseException) -> BaseException:
    try:
        raise error from cause
    except BaseException as raised:
        return raised


def _wrapped(error: Exception) -> list[BaseException]:
    in_task = RayTaskError("fit", "Traceback\n  of many lines", error)
    dual = in_task.as_instanceof_cause()
    workers = WorkerGroupError("workers failed", {0: error})
    return [
        error,
        _raised(RuntimeError("wrapped"), error),
        in_task,
        dual,
        RayTaskError("outer", "Traceback", in_task),
        RayTaskError("fit", "Traceback", workers),
        RayTaskError("fit", "Traceback", ControllerError(in_task)),
    ]


def test_a_users_error_comes_out_of_whatever_it_is_wrapped_in() -> None:
    damage = DamagedError("runs/prior/a-key", "x")
    again = pickle.loads(pickle.dumps(damage))
    assert (str(again), again.work, again.file) == (str(damage), damage.work, damage.file)
    for error in (damage, UserError("text_field: no such field")):
        for wrapped in _wrapped(error):
            assert mendable(wrapped) is error
    worker = SimpleNamespace(_base_exc=RayTaskError("fit", "traceback", damage))
    assert cause_of(worker) is damage


def test_what_nobody_foresaw_is_left_as_it_is() -> None:
    for error in (ValueError("x"), KeyError("x"), OSError(errno.EACCES, "not allowed")):
        for wrapped in _wrapped(error):
            assert mendable(wrapped) is None
        assert all(cause_of(wrapped) is error for wrapped in _wrapped(error)[2:-1])


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (NodeDiedError("the node is gone"), "Ray lost a process or a node: "),
        (WorkerCrashedError(), "Ray lost a process or a node: "),
        (OutOfMemoryError("killed"), "the memory is full, and Ray ended a process: killed"),
        (OutOfDiskError("no room for objects; No space left on device"), "a disk is full"),
    ],
)
def test_what_ray_loses_is_told_in_one_line(error: Exception, says: str) -> None:
    for wrapped in _wrapped(error):
        found = mendable(wrapped)
        assert found is not None
        assert str(found).startswith(says)
        assert "\n" not in str(found)


def _sqlite(path: Path) -> None:
    with sqlalchemy.create_engine(f"sqlite:///{path}").begin() as connection:
        connection.execute(sqlalchemy.text("pragma max_page_count = 4"))  # the file is as large as it may become
        connection.execute(sqlalchemy.text("create table t (x text)"))
        connection.execute(sqlalchemy.text("insert into t values (:x)"), {"x": "x" * 100_000})


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(bytes(100_000)),
        lambda path: save_file({"x": torch.zeros(100_000)}, path),
        lambda path: pq.write_table(pa.table({"x": np.random.default_rng(0).random(100_000)}), path),
        lambda path: np.save(path, np.zeros(100_000)),
        _sqlite,
    ],
    ids=["python", "safetensors", "parquet", "numpy", "sqlite"],
)
def test_a_full_disk_is_told_in_one_line_whatever_wrote_to_it(tmp_path: Path, write, request) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(Exception) as caught, files_up_to(20_000):  # noqa: PT011 - of any kind
        write(tmp_path / "file")
    found = mendable(caught.value)
    assert found is not None, repr(caught.value)
    assert str(found).startswith("a disk is full, or a file as large as it may become: ")
    assert "\n" not in str(found)


def test_a_device_without_room_is_a_full_disk() -> None:
    with pytest.raises(OSError, match="No space") as caught, open("/dev/full", "w") as file:
        file.write("x")
    assert "No space left on device" in str(mendable(caught.value))
    assert "quota" in str(mendable(OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)))).lower()


def test_the_command_ends_in_that_line(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", "--recipe", str(tiny / "tiny.yaml"), f"output={tmp_path}"]

    def fails(error: Exception) -> None:
        def start() -> None:
            raise error

        monkeypatch.setattr(pipeline.commands.prune, "start_ray", start)

    fails(RayTaskError("fit", "Traceback", OSError(errno.ENOSPC, "No space left on device")))
    assert main(command) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: a disk is full")
    assert said.count("\n") == 1
    fails(RuntimeError("nobody foresaw this"))
    with pytest.raises(RuntimeError, match="nobody foresaw this"):
        main(command)
    assert not ray.is_initialized()
