"""One process at a time writes the results of a name: a second one is refused and told of the first.

On this machine, and on what it mounts, the system holds a lock for a process and lets go of it however that ends. On an
object store an object says who is there, and since when; the process says so again every minute.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import fsspec

from pipeline.errors import UserError

FILE = "run.lock"
#: Seconds between two signs of life on a store, and those without one after which a process is taken for gone.
BEAT, GONE = 60.0, 300.0
#: Seconds after which two processes that came at the same moment see each other.
SETTLED = 1.0
_WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


@contextmanager
def occupied(place: str, local: Path) -> Iterator[None]:
    """Keep other processes from ``place``, a directory or URI, for as long as the block runs.

    Args:
        local: the directory where the run keeps its own records.

    Raises:
        UserError: another process is there.
    """
    with ExitStack() as stack:
        stack.enter_context(_locked(local))
        if "://" in place:
            stack.enter_context(_announced(place))
        yield


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / FILE).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise _refusal(str(directory), _parsed(file.read())) from None
        except OSError as error:
            if error.errno not in _WITHOUT_LOCKS:
                raise
        file.truncate(0)
        file.write(json.dumps(_own()))
        file.flush()
        yield
        file.truncate(0)


@contextmanager
def _announced(uri: str) -> Iterator[None]:
    fs, root = fsspec.core.url_to_fs(uri)
    path, own = f"{root.rstrip('/')}/{FILE}", _own()

    def other() -> dict[str, Any] | None:
        """Who else is there."""
        fs.invalidate_cache()
        found = _parsed(fs.cat_file(path).decode(errors="replace")) if fs.exists(path) else {}
        return found if found and found["id"] != own["id"] and not _is_gone(found) else None

    def announce() -> None:
        fs.makedirs(root, exist_ok=True)
        fs.pipe_file(path, json.dumps(own | {"alive": time.time()}).encode())

    def beat() -> None:
        while not ended.wait(BEAT):
            try:
                announce()
            except Exception:  # a store that is away for a while; stores have errors of their own
                continue

    if found := other():
        raise _refusal(uri, found)
    announce()
    time.sleep(SETTLED)
    if found := other():  # the last to announce itself stays
        raise _refusal(uri, found)
    ended = threading.Event()
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if fs.exists(path) and not other():
            fs.rm_file(path)


def _own() -> dict[str, Any]:
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": since, "id": uuid.uuid4().hex}


def _parsed(text: str) -> dict[str, Any]:
    """What a process said of itself; empty where nothing can be read."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) and {"pid", "host", "since", "id"} <= found.keys() else {}


def _is_gone(found: dict[str, Any]) -> bool:
    """Whether a process that announced itself on a store is there no longer."""
    if time.time() - found.get("alive", 0.0) > GONE:
        return True
    if found["host"] != socket.gethostname():
        return False
    try:
        os.kill(found["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:  # somebody else's
        return False
    return False


def _refusal(place: str, found: dict[str, Any]) -> UserError:
    who = "process {pid} on {host}, since {since}".format(**found) if found else "another process"
    return UserError(f"output: {place} is in use by {who}; wait for it to end, or give another name or output")
