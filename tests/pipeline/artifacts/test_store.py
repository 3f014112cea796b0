"""Directories of stages: when work counts as finished, on local disk and on a store behind a URI."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import fsspec
import pytest

from leap.settings import LearnSettings
from pipeline.artifacts.store import MANIFEST, StageDir, fingerprint, local_copy, write_atomically
from pipeline.config import PriorConfig


@pytest.fixture(autouse=True)
def _caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(params=["disk", "memory"])
def stage(request: pytest.FixtureRequest, tmp_path: Path) -> StageDir:
    uri = str(tmp_path / "runs") if request.param == "disk" else f"memory://{tmp_path.name}/runs"
    return StageDir(uri, "prior", "wanda@0.5", "0123abcd")


def fill(stage: StageDir, text: str = "scores", keep: bool = False) -> None:
    with stage.work(keep=keep) as (directory, facts):
        (directory / "block").mkdir(exist_ok=True)
        (directory / "block" / "scores.txt").write_text(text)
        facts["rows"] = 3


def break_off(stage: StageDir, keep: bool = False, error: type[BaseException] = ValueError) -> None:
    """An attempt that finds no manifest, writes a file and goes no further."""
    with stage.work(keep=keep) as (directory, _):
        assert stage.manifest() is None
        assert keep or list(directory.iterdir()) == []
        (directory / "half").write_text("half")
        raise error("broken")


def test_finished_work_can_be_read_back(stage: StageDir) -> None:
    assert stage.manifest() is None
    fill(stage)
    manifest = stage.manifest()
    assert manifest is not None
    assert (manifest["rows"], manifest["fingerprint"]) == (3, stage.key)
    assert manifest["seconds"] >= 0
    assert (stage.path() / "block" / "scores.txt").read_text() == "scores"
    with fsspec.open(stage.uri_of("block/scores.txt"), "rt") as file:
        assert file.read() == "scores"
    assert local_copy(stage.uri_of()) == stage.path()


def test_an_exception_leaves_no_manifest_and_no_scratch(stage: StageDir, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="broken"):
        break_off(stage)
    assert stage.manifest() is None
    assert list((tmp_path / "cache").rglob("half")) == []


def test_work_done_again_starts_empty_and_is_not_finished_meanwhile(stage: StageDir) -> None:
    fill(stage)
    with pytest.raises(ValueError, match="broken"):
        break_off(stage)
    assert stage.manifest() is None


def test_what_was_done_again_is_what_is_read(stage: StageDir) -> None:
    fill(stage, "first")
    assert (stage.path() / "block" / "scores.txt").read_text() == "first"
    with stage.work() as (directory, facts):
        (directory / "other.txt").write_text("second")
        facts["rows"] = 4
    assert (stage.path() / "other.txt").read_text() == "second"
    assert not (stage.path() / "block").exists()


def test_keep_leaves_what_an_interrupted_attempt_wrote(tmp_path: Path) -> None:
    stage = StageDir(str(tmp_path), "learn", "leap@0.5", "k")
    with pytest.raises(KeyboardInterrupt):
        break_off(stage, keep=True, error=KeyboardInterrupt)
    assert stage.manifest() is None
    with stage.work(keep=True) as (directory, _):
        assert (directory / "half").read_text() == "half"
    assert stage.manifest() is not None
    assert (stage.path() / "half").is_file()


def test_keep_on_a_remote_store_leaves_the_files_there(tmp_path: Path) -> None:
    stage = StageDir(f"memory://{tmp_path.name}", "learn", "leap@0.5", "k")
    with fsspec.open(stage.uri_of("checkpoints/latest.json"), "wt") as file:
        file.write("{}")
    with stage.work(keep=True):
        pass
    assert (stage.path() / "checkpoints" / "latest.json").read_text() == "{}"


@pytest.mark.parametrize("text", ["", '{"fingerprint": "0123', "[]", '{"fingerprint": "another"}', "{}"])
def test_a_manifest_that_is_not_ours_is_none(tmp_path: Path, text: str) -> None:
    stage = StageDir(str(tmp_path), "prior", "wanda@0.5", "0123abcd")
    directory = Path(stage.uri_of())
    directory.mkdir(parents=True)
    (directory / MANIFEST).write_text(text)
    assert stage.manifest() is None


def test_another_key_is_another_directory(tmp_path: Path) -> None:
    fill(StageDir(str(tmp_path), "prior", "wanda@0.5", "a"))
    assert StageDir(str(tmp_path), "prior", "wanda@0.5", "b").manifest() is None


def test_a_remote_directory_that_is_not_finished_has_no_copy(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        StageDir(f"memory://{tmp_path.name}", "prior", "wanda@0.5", "a").path()


def _fill_memory(files: dict[str, bytes]) -> None:
    fsspec.filesystem("memory").pipe(files)


def _read_scores(stage: StageDir) -> str:
    return (stage.path() / "block" / "scores.txt").read_text()


def test_many_readers_at_once_get_one_whole_copy(tmp_path: Path) -> None:
    stage = StageDir(f"memory://{tmp_path.name}", "prior", "wanda@0.5", "a")
    fill(stage)
    store = fsspec.filesystem("memory")
    files = {name: store.cat_file(name) for name in store.find(f"/{tmp_path.name}")}
    # Processes, not threads: fsspec's memory files share one position. Each has its own copy of the store, and all have
    # one cache. Not forked: after other tests this process has threads, whose locks a fork would hold for ever.
    with multiprocessing.get_context("spawn").Pool(4, initializer=_fill_memory, initargs=(files,)) as pool:
        found = pool.map(_read_scores, [stage] * 12, chunksize=1)
    assert set(found) == {"scores"}
    copies = list((tmp_path / "cache" / "leap-prune" / "stages").iterdir())
    assert copies == [stage.path()]


def _write_many(path: Path, who: str) -> None:
    for _ in range(100):
        write_atomically(path, json.dumps([who] * 2000))


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "latest.json"
    write_atomically(path, json.dumps(["c"] * 2000))
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_many, args=(path, who)) for who in "ab"]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert len(set(json.loads(path.read_text()))) == 1
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert [p.name for p in tmp_path.iterdir() if "latest" in p.name] == ["latest.json"]


def test_a_fingerprint_follows_values_not_their_order_or_container() -> None:
    assert fingerprint({"a": 1, "b": (1, 2)}) == fingerprint({"b": [1, 2], "a": 1})
    assert fingerprint(LearnSettings()) != fingerprint(LearnSettings(steps=3))
    assert fingerprint(PriorConfig()) == fingerprint(PriorConfig().model_dump(mode="json"))
    assert fingerprint(0.1 + 0.2) != fingerprint(0.3)
    with pytest.raises(TypeError, match="no stable form of object"):
        fingerprint(object())
