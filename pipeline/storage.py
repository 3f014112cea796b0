"""Where stages keep their results: one directory per (stage, item, fingerprint), finished when its manifest is there.

A store is a local directory or any URI that fsspec opens. Work is done in a local directory; on a remote store the
files are copied over and the manifest follows last.
"""

from __future__ import annotations

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
        found = json.loads(fs.cat_file(path))
        return found if found.get("fingerprint") == self.key else None

    def path(self) -> Path:
        """A local directory with the files of finished work; a remote store is copied once to a cache."""
        fs, root = self._fs
        if isinstance(fs, LocalFileSystem):
            return Path(root)
        cache = _scratch() / hashlib.sha256(self._target.encode()).hexdigest()[:24]
        if not (cache / MANIFEST).exists():
            cache.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(dir=cache.parent))
            fs.get(f"{root}/", f"{partial}/", recursive=True)
            try:
                partial.rename(cache)
            except OSError:  # another process was faster
                shutil.rmtree(partial)
        return cache

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
        if local and not keep and directory.exists():
            shutil.rmtree(directory)
        directory.mkdir(parents=True, exist_ok=True)
        facts: dict[str, Any] = {}
        began = time.time()
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
            shutil.rmtree(directory)


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
