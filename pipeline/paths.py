"""Variables in the paths of a recipe."""

from __future__ import annotations

import os
import string
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

#: What a variable stands for where the environment does not set it.
DEFAULTS = {"LEAP_DATA": str(ROOT.parent / "shared" / "data")}


def expand_variables(path: str) -> str:
    """``path`` with $NAME and ${NAME} replaced; a variable that nobody sets is left as it stands."""
    return string.Template(path).safe_substitute(DEFAULTS | os.environ)
