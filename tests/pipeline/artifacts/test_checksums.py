"""No flipped bit and no cut of what a run wrote goes unnoticed, on disk and on a store behind a URI."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest
from damage import flipped
from transformers import LlamaForCausalLM

from leap.export import export
from leap.layerwise import LayerResult
from leap.surgery import prunable_linears
from pipeline.artifacts import checksums, prior_files
from pipeline.artifacts.packed_rows import PackedRows
from pipeline.artifacts.store import MANIFEST, StageDir, _compared
from pipeline.errors import DamagedError
from pipeline.stages.calibrate import ShardWriter

FLIPS = 24


@pytest.fixture(autouse=True)
def _caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_rows(directory: Path, model: LlamaForCausalLM) -> None:
    writer = ShardWriter(directory, 32)
    writer.add(np.random.default_rng(0).integers(0, 400, (64, 32), dtype=np.int32))
    writer.close()
    (directory / "documents.json").write_text(json.dumps(["0123", "4567"]))


def write_prior(directory: Path, model: LlamaForCausalLM) -> None:
    results = [
        (name, LayerResult(linear.weight > 0, linear.weight.detach(), linear.weight.detach().abs()))
        for name, linear in prunable_linears(model).items()
    ]
    prior_files.write(directory, model, True, results)


def write_export(directory: Path, model: LlamaForCausalLM) -> None:
    export(model, None, lambda _, name: (model.get_submodule(name).weight > 0, None), directory, {"model": "tiny"})


@pytest.fixture(scope="module")
def model(tiny: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(tiny / "model")


@pytest.mark.parametrize("store", ["disk", "memory"])
@pytest.mark.parametrize("write", [write_rows, write_prior, write_export])
def test_damage_is_named_with_the_file(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: LlamaForCausalLM,
    write: Callable[[Path, LlamaForCausalLM], None],
    store: str,
) -> None:
    uri = str(tmp_path / "runs") if store == "disk" else f"memory://{tmp_path.name}/runs"
    stage = StageDir(uri, "stage", "item", "key")
    with stage.work() as (directory, facts):
        write(directory, model)
        facts["real_sparsity"] = 0.5
    assert stage.damage() is None
    fs, root = fsspec.core.url_to_fs(stage.uri_of())
    files = {path.removeprefix(f"{root}/"): fs.cat_file(path) for path in fs.find(root)}
    assert MANIFEST in files
    rng = random.Random(write.__name__ + store)
    flips = [(name, flipped(content, rng.randrange(8 * len(content)))) for name, content in files.items()]
    flips += [
        (name, flipped(files[name], rng.randrange(8 * len(files[name])))) for name in rng.choices(list(files), k=FLIPS)
    ]
    cuts = [(name, content[:-1]) for name, content in files.items()]
    for number, (name, content) in enumerate(flips + cuts):
        fs.pipe_file(f"{root}/{name}", content)
        _compared.clear()  # a disk that fails leaves a file's times as they were
        damage = stage.damage()
        assert damage is not None, name
        assert (damage.work, damage.file) == (stage.uri_of(), name)
        assert "\n" not in str(damage)
        if name == MANIFEST:
            assert stage.manifest() is None
        if name != MANIFEST or store == "disk":
            monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache" / f"{number}"))  # another machine's
            with pytest.raises(DamagedError, match=name.replace(".", r"\.")):
                stage.path()
        fs.pipe_file(f"{root}/{name}", files[name])
        _compared.clear()
        assert stage.damage() is None
    missing = next(name for name in files if name != MANIFEST)
    fs.rm_file(f"{root}/{missing}")
    damage = stage.damage()
    assert damage is not None
    assert damage.file == missing


def test_a_damaged_copy_of_whole_work_is_fetched_again(tmp_path: Path, model: LlamaForCausalLM) -> None:
    stage = StageDir(f"memory://{tmp_path.name}", "stage", "item", "key")
    with stage.work() as (directory, _):
        write_rows(directory, model)
    before = PackedRows(stage.path()).take(0, 64)
    (file,) = stage.path().glob("*.parquet")
    file.write_bytes(flipped(file.read_bytes(), 8000))
    assert np.array_equal(PackedRows(stage.path()).take(0, 64), before)


def test_of_large_work_on_a_store_the_sizes_are_looked_at_without_fetching_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = StageDir(f"memory://{tmp_path.name}", "stage", "item", "key")
    with stage.work() as (directory, _):
        (directory / "a").write_bytes(b"0" * 100)
    monkeypatch.setattr("pipeline.artifacts.store.READ_BYTES", 10)
    assert stage.damage() is None
    assert not list((tmp_path / "cache").rglob("a"))
    fs, root = fsspec.core.url_to_fs(stage.uri_of())
    fs.pipe_file(f"{root}/a", b"0" * 99)
    damage = stage.damage()
    assert damage is not None
    assert damage.file == "a"


def test_a_file_is_read_once_by_a_process_and_again_when_somebody_wrote_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = StageDir(str(tmp_path), "stage", "item", "key")
    with stage.work() as (directory, _):
        (directory / "a").write_text("content")
    read: list[str] = []
    compare = checksums.of_file
    monkeypatch.setattr(checksums, "of_file", lambda path: read.append(str(path)) or compare(path))
    for _ in range(3):
        stage.path()
    assert len(read) == 1
    (stage.path() / "a").write_text("contents")
    with pytest.raises(DamagedError):
        stage.path()


def test_work_of_the_version_before_is_taken_as_it_is(tmp_path: Path) -> None:
    stage = StageDir(str(tmp_path), "stage", "item", "key")
    directory = Path(stage.uri_of())
    directory.mkdir(parents=True)
    (directory / "rows.parquet").write_bytes(b"rows")
    (directory / MANIFEST).write_text(json.dumps({"fingerprint": "key", "rows": 3}, indent=1))
    assert stage.manifest() == {"fingerprint": "key", "rows": 3}
    assert stage.damage() is None
    assert stage.path() == directory


def test_forgotten_work_is_not_finished(tmp_path: Path) -> None:
    stage = StageDir(str(tmp_path), "stage", "item", "key")
    with stage.work() as (directory, _):
        (directory / "a").write_text("content")
    stage.forget()
    stage.forget()
    assert stage.manifest() is None
    assert (Path(stage.uri_of()) / "a").exists()


def test_sealed_facts_come_back_as_they_went() -> None:
    facts = {"a": [1, 2.5, None, "é"], "files": {}, "nested": {"b": float("inf")}}
    assert checksums.unseal(checksums.seal(facts)) == facts
    for text in ("", "[]", '{"files": {}}', checksums.seal(facts).replace("2.5", "2.6")):
        with pytest.raises(ValueError, match=r".*"):
            checksums.unseal(text)
