"""Variables in the paths of a recipe."""

from __future__ import annotations

import os
import string


def expand_variables(path: str) -> str:
    """``path`` with $NAME and ${NAME} replaced; a variable that nobody sets is left as it stands."""
    return string.Template(path).safe_substitute(os.environ)
