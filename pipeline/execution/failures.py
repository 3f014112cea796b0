"""What made a command fail, out of all that it is wrapped in, and whether a user can mend it."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from typing import Any

from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

from pipeline.errors import UserError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
#: What libraries that pass on no error numbers say of the same: safetensors and Ray, SQLite, numpy.
_FULL_TEXT = re.compile(
    r"No space left on device|File too large|disk quota exceeded|database or disk is full|\d requested and \d+ written",
    re.I,
)


def mendable(error: BaseException) -> UserError | None:
    """The error that a user can mend, in one line; none where there is none, and a traceback says more."""
    # A task's error takes on the class of what the task raised, and has the whole traceback in its text.
    causes = [cause for cause in _causes(error) if not isinstance(cause, RayTaskError)]
    for cause in causes:
        if isinstance(cause, UserError):
            return cause
    for cause in causes:
        if getattr(cause, "errno", None) in _FULL or _FULL_TEXT.search(str(cause)):
            return UserError(
                f"a disk is full, or a file as large as it may become: {_line(cause)}; make room and run the same "
                "command again, it continues from what is finished"
            )
    for cause in causes:
        if isinstance(cause, OutOfMemoryError):
            return UserError(f"the memory is full, and Ray ended a process: {_line(cause)}")
    for cause in causes:
        if isinstance(cause, RayError):
            return UserError(
                f"Ray lost a process or a node: {_line(cause)}; run the same command again, it continues from what is "
                "finished"
            )
    return None


def cause_of(error: Any) -> Any:
    """What a task or the workers of a learning run failed with, out of all that Ray wraps it in."""
    while inner := _inside(error):
        error = inner[0]
    return error


def _causes(error: Any) -> Iterator[Any]:
    """An error and all that caused it, from the outside in."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        error = waiting.pop(0)
        if id(error) not in seen:
            seen.add(id(error))
            yield error
            waiting += _inside(error)
            waiting += [error.__cause__] if getattr(error, "__cause__", None) else []


def _inside(error: Any) -> list[Any]:
    """What Ray, or one of its libraries, has wrapped in an error."""
    inner = [getattr(error, name, None) for name in ("cause", "_base_exc", "controller_failure")]
    failures = getattr(error, "worker_failures", None) or {}
    return [found for found in (*inner, *failures.values()) if isinstance(found, BaseException)]


def _line(error: Any) -> str:
    return " ".join(str(error).split())[:200]
