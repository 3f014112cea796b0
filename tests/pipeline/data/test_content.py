"""Hashes of what others bring: whole, kept while a file does not change, safe among processes."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import fsspec
import pytest

from pipeline.artifacts import checksums
from pipeline.data import content


@pytest.fixture(autouse=True)
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    names: list[str] = []
    compute = checksums.of_file
    monkeypatch.setattr(checksums, "of_file", lambda path: names.append(Path(path).name) or compute(path))
    return names


def old(path: Path, text: str, seconds: int = 100) -> Path:
    path.write_text(text)
    changed = path.stat().st_mtime - seconds
    os.utime(path, (changed, changed))
    return path


def test_a_file_is_read_again_only_when_it_changed(tmp_path: Path, read: list[str]) -> None:
    file = old(tmp_path / "a", "one")
    first = content.of_files([file])
    assert content.of_files([file, file]) == first * 2
    assert read == ["a"]
    old(file, "two", seconds=200)
    assert content.of_files([file]) != first
    assert read == ["a", "a"]
    # In place of it another file of the same size and time.
    other = old(tmp_path / "b", "six")
    os.utime(other, ns=(file.stat().st_mtime_ns,) * 2)
    other.rename(file)
    assert content.of_files([file])[0] == checksums.of_bytes(b"six")


def test_a_file_that_just_changed_is_not_taken_for_settled(tmp_path: Path, read: list[str]) -> None:
    file = tmp_path / "a"
    file.write_text("one")
    content.of_files([file])
    content.of_files([file])
    assert read == ["a", "a"]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1}'])
def test_a_broken_cache_is_made_anew(tmp_path: Path, read: list[str], text: str) -> None:
    file = old(tmp_path / "a", "one")
    cache = tmp_path / "cache" / "leap-prune" / "hashes.json"
    cache.parent.mkdir(parents=True)
    cache.write_text(text)
    assert content.of_files([file]) == [checksums.of_bytes(b"one")]
    assert str(file) in json.loads(cache.read_text())


def test_without_a_place_for_the_cache_files_are_read_each_time(
    tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    file = old(tmp_path / "a", "one")
    content.of_files([file])
    content.of_files([file])
    assert read == ["a", "a"]


def _ask(path: Path) -> str:
    return content.of_files([path])[0]


def test_processes_at_once_lose_nothing(tmp_path: Path) -> None:
    files = [old(tmp_path / f"f{number}", str(number)) for number in range(24)]
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        found = pool.map(_ask, files, chunksize=1)
    assert found == [checksums.of_bytes(str(number).encode()) for number in range(24)]
    known = json.loads((tmp_path / "cache" / "leap-prune" / "hashes.json").read_text())
    assert set(known) == {str(file) for file in files}


def test_one_changed_byte_anywhere_in_a_directory_changes_its_hash(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    big = old(folder / "model.safetensors", "0" * 3_000_000)
    old(folder / "notes.md", "1")
    old(folder / "sub" / "a", "2")
    directory, tree = content.of_directory(folder, {".safetensors"}), content.of_tree(folder)
    with big.open("r+b") as file:
        file.seek(1_234_567)
        file.write(b"1")
    assert content.of_directory(folder, {".safetensors"}) != directory
    assert content.of_tree(folder) != tree
    directory, tree = content.of_directory(folder, {".safetensors"}), content.of_tree(folder)
    old(folder / "notes.md", "3")
    old(folder / "sub" / "a", "4")
    assert content.of_directory(folder, {".safetensors"}) == directory
    assert content.of_tree(folder) != tree
    big.rename(folder / "other.safetensors")
    assert content.of_directory(folder, {".safetensors"}) != directory


def test_a_file_on_a_store_is_known_by_what_the_store_says_of_it(tmp_path: Path) -> None:
    uri = f"memory://{tmp_path.name}/a.jsonl"
    with fsspec.open(uri, "wb") as file:
        file.write(b"one")
    first = content.of_places([uri])
    assert content.of_places([uri]) == first
    with fsspec.open(uri, "wb") as file:
        file.write(b"three")
    assert content.of_places([uri]) != first
    local = old(tmp_path / "a", "one")
    assert content.of_places([str(local), uri])[0] == checksums.of_bytes(b"one")
