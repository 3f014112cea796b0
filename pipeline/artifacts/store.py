"""Where stages keep their results: one directory per (stage, item, fingerprint), finished when its manifest is there.

A store is a local directory or any URI that fsspec opens. Work is done in a local directory; on a remote store the
files are copied over and the manifest follows last. It holds a checksum of each file, which every process that reads
the work compares once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from pydantic import BaseModel

from pipeline.artifacts import checksums
from pipeline.artifacts.checksums import FILES
from pipeline.errors import DamagedError

MANIFEST = "manifest.json"
#: Work on a remote store up to this size is read before it is taken for whole; of larger work the sizes of its files
#: are looked at, and who fetches it compares the rest.
READ_BYTES = 64 * 2**20


def fingerprint(*parts: Any) -> str:
    """Hash of values that JSON can hold, dataclasses and pydantic models among them."""

    def plain(value: Any) -> Any:
        if isinstance(value, BaseModel):
            return value.model_dump(mode="json")
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return dataclasses.asdict(value)
        raise TypeError(f"no stable form of {type(value).__name__}")

    text = json.dumps(parts, sort_keys=True, default=plain)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class StageDir:
    """The directory of one piece of work. Picklable: Ray tasks on other nodes open it by its URI."""

    uri: str
    stage: str
    item: str
    key: str
    """Fingerprint of the inputs, the settings and the version of the code."""

    @property
    def name(self) -> str:
        return f"{self.stage}/{self.item}" if self.item else self.stage

    @property
    def _target(self) -> str:
        return "/".join([self.uri.rstrip("/"), self.stage, f"{self.item}-{self.key}" if self.item else self.key])

    @property
    def _fs(self) -> tuple[fsspec.AbstractFileSystem, str]:
        filesystem, path = fsspec.core.url_to_fs(self._target)
        return filesystem, path

    def manifest(self) -> dict[str, Any] | None:
        """The manifest of finished work, or none."""
        fs, root = self._fs
        try:
            found = _manifest_at(fs, root)
        except ValueError:  # not ours, cut off or altered: nothing that says the work is finished
            return None
        return found if found and found.get("fingerprint") == self.key else None

    def damage(self) -> DamagedError | None:
        """What is wrong with finished work: the first file that is not what was written, or none.

        What another version wrote without checksums is taken as it is.
        """
        fs, root = self._fs
        name = _damaged(Path(root)) if isinstance(fs, LocalFileSystem) else _damaged_on_store(fs, root)
        return DamagedError(self._target, name) if name else None

    def forget(self) -> None:
        """Take finished work for unfinished; its files stay until it is done again."""
        fs, root = self._fs
        if fs.exists(f"{root}/{MANIFEST}"):
            fs.rm_file(f"{root}/{MANIFEST}")

    def path(self) -> Path:
        """A local directory with the files of finished work; a remote store is copied once to a cache.

        Raises:
            DamagedError: a file is not what was written.
        """
        return local_copy(self._target)

    def uri_of(self, name: str = "") -> str:
        """URI of a file in this directory."""
        return f"{self._target}/{name}" if name else self._target

    @contextmanager
    def work(self, keep: bool = False) -> Iterator[tuple[Path, dict[str, Any]]]:
        """A local directory to fill and a dict of facts for the manifest, which is written when the block ends well.

        Args:
            keep: leave what an interrupted attempt wrote (checkpoints); otherwise the directory starts empty. Who
                keeps files knows their checksums, and may give them as the fact ``files``.
        """
        fs, root = self._fs
        local = isinstance(fs, LocalFileSystem)
        directory = Path(root) if local else Path(tempfile.mkdtemp(dir=_scratch(create=True)))
        # The manifest goes first: whatever else of an old attempt remains, it does not pass for finished.
        self.forget()
        if not keep and fs.exists(root):
            fs.rm(root, recursive=True)
        directory.mkdir(parents=True, exist_ok=True)
        facts: dict[str, Any] = {}
        began = time.time()
        try:
            yield directory, facts
            manifest = {
                "stage": self.stage,
                "item": self.item,
                "fingerprint": self.key,
                "seconds": round(time.time() - began, 3),
                "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                FILES: {} if keep else _entries(directory),
                **facts,
            }
            text = checksums.seal(manifest)
            if local:
                write_atomically(directory / MANIFEST, text)
            else:
                fs.put(f"{directory}/", f"{root}/", recursive=True)
                fs.pipe_file(f"{root}/{MANIFEST}", text.encode())
        finally:
            if not local:
                shutil.rmtree(directory, ignore_errors=True)


def local_copy(uri: str) -> Path:
    """The directory of finished work at ``uri``, itself if it is local, else a copy that is made once.

    Raises:
        FileNotFoundError: the work on a remote store is not finished.
        DamagedError: a file is not what was written.
    """
    fs, root = fsspec.core.url_to_fs(uri)
    if isinstance(fs, LocalFileSystem):
        if damaged := _damaged(Path(root)):
            raise DamagedError(uri, damaged)
        return Path(root)
    # Named after the manifest too: work that was deleted and done again is another copy.
    cache = _scratch() / hashlib.sha256(uri.encode() + fs.cat_file(f"{root}/{MANIFEST}")).hexdigest()[:24]
    if (cache / MANIFEST).exists() and _damaged(cache):
        shutil.rmtree(cache, ignore_errors=True)  # the copy, that is; the store's own may be whole
    if not (cache / MANIFEST).exists():
        partial = Path(tempfile.mkdtemp(dir=_scratch(create=True)))
        try:
            fs.get(f"{root}/", f"{partial}/", recursive=True)
            if damaged := _damaged(partial):
                raise DamagedError(uri, damaged)
            partial.rename(cache)
        except OSError:
            if not (cache / MANIFEST).exists():  # else another process was faster
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return cache


def _manifest_at(fs: fsspec.AbstractFileSystem, root: str) -> dict[str, Any] | None:
    """The manifest of a directory, whatever its work is; None where there is none.

    Raises:
        ValueError: it was cut off or altered.
    """
    path = f"{root}/{MANIFEST}"
    return checksums.unseal(fs.cat_file(path)) if fs.exists(path) else None


def _entries(directory: Path) -> dict[str, dict[str, Any]]:
    """Size and checksum of every file below ``directory``, by its path there."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): checksums.entry(path) for path in files}


def _damaged(directory: Path) -> str | None:
    """The first file of finished work that is not what its manifest says; none where all are, or nothing is finished.

    Within one process a file is read once, unless somebody has written to it since.
    """
    path = directory / MANIFEST
    try:
        manifest = checksums.unseal(path.read_bytes()) if path.exists() else {}
    except ValueError:
        return MANIFEST
    files: dict[str, dict[str, Any]] = manifest.get(FILES, {})
    for name, file in files.items():
        try:
            found = (directory / name).stat()
            state = (str(directory / name), found.st_ino, found.st_size, found.st_mtime_ns, file["xxh3"])
            if state in _compared:
                continue
            if found.st_size != file["bytes"] or checksums.of_file(directory / name) != file["xxh3"]:
                return name
        except OSError:
            return name
        _compared.add(state)
    return None


def _damaged_on_store(fs: fsspec.AbstractFileSystem, root: str) -> str | None:
    """The same on a remote store, of work up to ``READ_BYTES``; of larger work only sizes are looked at."""
    try:
        files: dict[str, Any] = (_manifest_at(fs, root) or {}).get(FILES, {})
    except ValueError:
        return MANIFEST
    found = fs.find(root, detail=True) if files else {}
    sizes = {path: about["size"] for path, about in found.items()}
    small = sum(file["bytes"] for file in files.values()) <= READ_BYTES
    for name, file in files.items():
        path = f"{root}/{name}"
        if sizes.get(path) != file["bytes"] or (small and checksums.of_bytes(fs.cat_file(path)) != file["xxh3"]):
            return name
    return None


_compared: set[tuple[str, int, int, int, str]] = set()
"""Files that this process has found whole: path, inode, size, time of the last change, checksum."""


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` so that a reader, or a crash, sees the old or the new content and nothing between."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def cache_directory() -> Path:
    """What of this user can be made again lies below it."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "leap-prune"


def _scratch(create: bool = False) -> Path:
    root = cache_directory() / "stages"
    if create:
        root.mkdir(parents=True, exist_ok=True)
    return root
