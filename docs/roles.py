"""Extension of griffe: cross-references of docstrings, as :func:`name`, become code."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:attr|class|func|meth|mod):`~?([^`]+)`")


class Roles(griffe.Extension):
    """Rewrites the docstring of every object when it is read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """See the base class."""
        if obj.docstring:
            obj.docstring.value = _ROLE.sub(r"`\1`", obj.docstring.value)
