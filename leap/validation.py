"""Checks that the configuration dataclasses share."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin, get_type_hints

#: ``__pydantic_config__`` of the dataclasses, for those who read them from a file; pydantic itself is not needed here.
NO_UNKNOWN_KEYS = {"extra": "forbid"}


def check_choices(config: Any) -> None:
    """Check every field of a dataclass that is annotated with a ``Literal``.

    Recipes go through pydantic, which does this too; a notebook builds the dataclasses directly.

    Raises:
        ValueError: a field holds none of the values its annotation names.
    """
    for name, hint in get_type_hints(type(config)).items():
        if get_origin(hint) is Literal and getattr(config, name) not in get_args(hint):
            allowed = ", ".join(map(str, get_args(hint)))
            raise ValueError(f"{name} must be one of {allowed}, not {getattr(config, name)!r}")
