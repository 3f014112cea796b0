"""Checkpoints of learning: damage is found, and the one before it stands in."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch
import torch.distributed as dist
from damage import flipped
from safetensors.torch import save_file

from pipeline.artifacts.logit_checkpoint import FOLDER, Checkpoint, resume, save
from pipeline.artifacts.store import StageDir, _compared
from pipeline.errors import DamagedError

SHAPES = {"a": [6, 8], "b": [5, 3]}
FACTS = {"multipliers": [0.25], "history": [{"loss": 1.5, "seconds": 0.1}], "shared_moments": []}


@pytest.fixture(autouse=True)
def _group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def shard(step: int) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{part}": torch.full((shape[0] * shape[1],), float(step)) + torch.rand(shape[0] * shape[1])
        for name, shape in SHAPES.items()
        for part in ("logits", "moments")
    }


@pytest.fixture(params=["disk", "memory"])
def stage(request: pytest.FixtureRequest, tmp_path: Path) -> StageDir:
    uri = str(tmp_path / "runs") if request.param == "disk" else f"memory://{tmp_path.name}/runs"
    return StageDir(uri, "learn", "leap@0.5", "key")


def written(stage: StageDir, *steps: int) -> dict[int, dict[str, torch.Tensor]]:
    found = {step: shard(step) for step in steps}
    for step, tensors in found.items():
        save(stage.uri_of(FOLDER), step, FACTS, tensors, SHAPES)
    return found


def test_two_checkpoints_stay_and_the_newest_is_read(stage: StageDir) -> None:
    tensors = written(stage, 5, 10, 15)
    fs, root = fsspec.core.url_to_fs(stage.uri_of(FOLDER))
    assert sorted(path.rsplit("/", 1)[1] for path in fs.ls(root, detail=False)) == [
        "step-000010",
        "step-000010.json",
        "step-000015",
        "step-000015.json",
    ]
    for found in (
        Checkpoint(stage.uri_of(FOLDER)),
        Checkpoint.find(stage.uri_of(FOLDER)),
        resume(stage.uri_of(FOLDER))[0],
    ):
        assert found is not None
        assert found.step == 15
        assert {key: found.facts[key] for key in FACTS} == FACTS
        for name, shape in SHAPES.items():
            assert torch.equal(found.logits(name), tensors[15][f"{name}.logits"].view(shape))


def test_no_flipped_bit_goes_unnoticed_and_the_one_before_stands_in(stage: StageDir) -> None:
    tensors = written(stage, 5, 10)
    uri = stage.uri_of(FOLDER)
    with stage.work(keep=True) as (_, facts):
        facts["files"] = Checkpoint(uri).files()
    assert stage.damage() is None
    fs, root = fsspec.core.url_to_fs(uri)
    files = {path: fs.cat_file(path) for path in fs.find(root)}
    newest = [path for path in files if "step-000010" in path]
    assert len(newest) == 2
    rng = random.Random(stage.uri)
    for path in newest * 24:
        fs.pipe_file(path, flipped(files[path], rng.randrange(8 * len(files[path]))))
        with pytest.raises(DamagedError, match=path.removeprefix(f"{root}/")):
            Checkpoint(uri).check()
        damage = stage.damage()
        assert damage is not None
        assert damage.file == path[path.index(FOLDER) :]
        assert damage.work == stage.uri_of()
        found, damaged = resume(uri)
        assert found is not None
        assert found.step == 5
        assert [error.file for error in damaged] == [damage.file]
        assert torch.equal(found.logits("a"), tensors[5]["a.logits"].view(SHAPES["a"]))
        # What is damaged is gone: it is not stumbled over again, and does not outlive newer ones.
        assert [error.file for error in resume(uri)[1]] == []
        for other in newest:
            fs.makedirs(other.rsplit("/", 1)[0], exist_ok=True)
            fs.pipe_file(other, files[other])
        _compared.clear()
    for path in files:
        if path.endswith(".json"):
            fs.pipe_file(path, b"")
    found, damaged = resume(uri)
    assert found is None
    assert len(damaged) == 2


def test_a_run_that_lost_its_last_checkpoint_is_not_taken_for_finished(stage: StageDir) -> None:
    written(stage, 5, 10)
    with stage.work(keep=True) as (_, facts):
        facts["files"] = Checkpoint(stage.uri_of(FOLDER)).files()
    fs, root = fsspec.core.url_to_fs(stage.uri_of(FOLDER))
    fs.rm_file(f"{root}/step-000010.json")
    assert stage.damage() is not None


def test_a_checkpoint_of_the_version_before_is_read_and_followed_by_one_with_checksums(tmp_path: Path) -> None:
    tensors = shard(3)
    (tmp_path / "step-000003").mkdir()
    save_file(tensors, tmp_path / "step-000003" / "rank-0000-of-0001.safetensors")
    facts = {"checkpoint": "step-000003", "step": 3, "world": 1, "shapes": SHAPES, **FACTS}
    (tmp_path / "latest.json").write_text(json.dumps(facts))
    found, damaged = resume(str(tmp_path))
    assert found is not None
    assert (found.step, damaged) == (3, [])
    assert torch.equal(found.logits("b"), tensors["b.logits"].view(SHAPES["b"]))
    assert found.files() == {}
    save(str(tmp_path), 6, FACTS, shard(6), SHAPES)
    assert Checkpoint(str(tmp_path)).step == 6


def test_nothing_saved_yet(tmp_path: Path) -> None:
    assert resume(str(tmp_path / "none")) == (None, [])
    assert Checkpoint.find(str(tmp_path / "none")) is None
    with pytest.raises(FileNotFoundError):
        Checkpoint(str(tmp_path / "none"))
