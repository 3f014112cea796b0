"""Paths as users give them."""

from __future__ import annotations

import os
import string
from pathlib import Path


def expand_variables(path: str) -> str:
    """``path`` with $NAME and ${NAME} replaced; a variable that nobody sets is left as it stands."""
    return string.Template(path).safe_substitute(os.environ)


def is_file(path: Path) -> bool:
    """Whether there is a file; a path that cannot be one, such as too long a name, is none."""
    try:
        return path.is_file()
    except OSError:
        return False
