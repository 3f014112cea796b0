"""What tells files that others bring from any other: hashes over the whole of them.

A hash is kept, with inode, size and time of the last change, in a file of the user's cache that all processes share.
"""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import fsspec

from pipeline.artifacts import checksums
from pipeline.artifacts.store import cache_directory, write_atomically

#: Files whose hashes are kept: those asked for last.
KEPT = 10_000
#: A file that changed less than this before it was read may change again without another time, so it is read again.
_SETTLED_NS = 2 * 10**9


def of_files(paths: Sequence[str | Path]) -> list[str]:
    """The hash of each file's content; a file that did not change since it was last asked for is not read."""
    known = _known()
    hashes, news = [], {}
    for path in (Path(path).resolve() for path in paths):
        found = path.stat()
        state = [found.st_ino, found.st_size, found.st_mtime_ns]
        entry = known.get(str(path))
        if not entry or entry[:-1] != state:
            settled = time.time_ns() - found.st_mtime_ns > _SETTLED_NS
            entry = [*state, checksums.of_file(path)]
            if settled:
                news[str(path)] = entry
        hashes.append(entry[-1])
    if news:
        _remember(news)
    return hashes


def of_directory(directory: str | Path, suffixes: Iterable[str]) -> str:
    """Hash over names and contents of the files right in a directory that have one of ``suffixes``."""
    paths = sorted(path for path in Path(directory).iterdir() if path.suffix in suffixes and path.is_file())
    named = zip((path.name for path in paths), of_files(paths), strict=True)
    return checksums.of_bytes(json.dumps(list(named)).encode())


def of_tree(path: str | Path) -> str:
    """The same over all files below a directory; of a file, its own hash."""
    root = Path(path)
    if root.is_file():
        return of_files([root])[0]
    paths = sorted(inside for inside in root.rglob("*") if inside.is_file())
    named = zip((inside.relative_to(root).as_posix() for inside in paths), of_files(paths), strict=True)
    return checksums.of_bytes(json.dumps(list(named)).encode())


def of_places(places: Sequence[str]) -> list[str]:
    """The hash of each local file, and of what its store says of each file at a URI: size, time or tag."""
    local = [place for place in places if "://" not in place]
    hashes = dict(zip(local, of_files(local), strict=True))
    return [hashes[place] if place in hashes else _of_uri(place) for place in places]


def _of_uri(uri: str) -> str:
    fs, path = fsspec.core.url_to_fs(uri)
    try:
        return str(fs.ukey(path))
    except Exception:  # each store has errors of its own; reading it will say what is wrong
        return uri


def _file() -> Path:
    return cache_directory() / "hashes.json"


def _known() -> dict[str, list[Any]]:
    try:
        found = json.loads(_file().read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _remember(news: dict[str, list[Any]]) -> None:
    """Add to what is known, whatever other processes add meanwhile."""
    file = _file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with (file.parent / f".{file.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            known = _known()
            for path in news:
                known.pop(path, None)
            kept = list((known | news).items())[-KEPT:]
            write_atomically(file, json.dumps(dict(kept)))
    except OSError:  # a cache that cannot be written costs time and nothing else
        return
