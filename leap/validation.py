"""Checks that the configuration dataclasses share."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

#: ``__pydantic_config__`` of the dataclasses, for those who read them from a file; pydantic itself is not needed here.
NO_UNKNOWN_KEYS = {"extra": "forbid"}


@dataclass(frozen=True, eq=False)
class OneOf:
    """Annotation of a text that names an entry of a registry, as in ``Annotated[str, OneOf(METHODS)]``."""

    names: Collection[str]

    def __call__(self, value: str) -> str:
        """``value``, if it is one of the names.

        Raises:
            ValueError: it is none.
        """
        if value not in self.names:
            raise ValueError(f"must be one of {', '.join(self.names)}, not {value!r}")
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """For pydantic, which is there if it asks."""
        from pydantic_core import core_schema

        return core_schema.no_info_after_validator_function(self, handler(source))


def check_choices(config: Any) -> None:
    """Check every field of a dataclass that is annotated with a ``Literal`` or with :class:`OneOf`.

    Recipes go through pydantic, which does this too; a notebook builds the dataclasses directly.

    Raises:
        ValueError: a field holds none of the values its annotation names.
    """
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        if get_origin(hint) is Literal and getattr(config, name) not in get_args(hint):
            allowed = ", ".join(map(str, get_args(hint)))
            raise ValueError(f"{name} must be one of {allowed}, not {getattr(config, name)!r}")
        for one_of in get_args(hint)[1:] if get_origin(hint) is Annotated else ():
            if isinstance(one_of, OneOf):
                try:
                    one_of(getattr(config, name))
                except ValueError as error:
                    raise ValueError(f"{name} {error}") from None
