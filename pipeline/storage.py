"""Where stages keep their results: one directory per (stage, item, fingerprint), finished when its manifest is there.

A store is a local directory or any URI that fsspec opens. Work is done in a local directory; on a remote store the
files are copied over and the manifest follows last.
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

MANIFEST = "manifest.json"


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
        return fsspec.core.url_to_fs(self._target)

    def manifest(self) -> dict[str, Any] | None:
        """The manifest of finished work, or none."""
        fs, root = self._fs
        path = f"{root}/{MANIFEST}"
        if not fs.exists(path):
            return None
        try:
            found = json.loads(fs.cat_file(path))
        except ValueError:  # not ours, or cut off: nothing that says the work is finished
            return None
        return found if isinstance(found, dict) and found.get("fingerprint") == self.key else None

    def path(self) -> Path:
        """A local directory with the files of finished work; a remote store is copied once to a cache."""
        return local_copy(self._target)

    def uri_of(self, name: str = "") -> str:
        """URI of a file in this directory."""
        return f"{self._target}/{name}" if name else self._target

    @contextmanager
    def work(self, keep: bool = False) -> Iterator[tuple[Path, dict[str, Any]]]:
        """A local directory to fill and a dict of facts for the manifest, which is written when the block ends well.

        Args:
            keep: leave what an interrupted attempt wrote (checkpoints); otherwise the directory starts empty.
        """
        fs, root = self._fs
        local = isinstance(fs, LocalFileSystem)
        directory = Path(root) if local else Path(tempfile.mkdtemp(dir=_scratch(create=True)))
        # The manifest goes first: whatever else of an old attempt remains, it does not pass for finished.
        if fs.exists(f"{root}/{MANIFEST}"):
            fs.rm_file(f"{root}/{MANIFEST}")
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
                **facts,
            }
            text = json.dumps(manifest, indent=1)
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
    """
    fs, root = fsspec.core.url_to_fs(uri)
    if isinstance(fs, LocalFileSystem):
        return Path(root)
    # Named after the manifest too: work that was deleted and done again is another copy.
    cache = _scratch() / hashlib.sha256(uri.encode() + fs.cat_file(f"{root}/{MANIFEST}")).hexdigest()[:24]
    if not (cache / MANIFEST).exists():
        partial = Path(tempfile.mkdtemp(dir=_scratch(create=True)))
        try:
            fs.get(f"{root}/", f"{partial}/", recursive=True)
            partial.rename(cache)
        except OSError:
            if not (cache / MANIFEST).exists():  # else another process was faster
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return cache


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` so that a reader, or a crash, sees the old or the new content and nothing between."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _scratch(create: bool = False) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "leap-prune" / "stages"
    if create:
        root.mkdir(parents=True, exist_ok=True)
    return root
