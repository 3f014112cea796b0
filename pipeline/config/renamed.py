"""Names that recipes of older versions have, and what they are called now."""

from __future__ import annotations

from pipeline.config.fields import NAME

#: Fields by their dotted name, in which NAME stands for a name that the user chose.
FIELDS = {"learn.NAME.reconstruct": "reconstruct, a list of entries of learn"}
RECIPES: dict[str, str] = {}


def field(place: list[str]) -> str | None:
    """What the field at a place of a recipe is called now; none where it never had another name."""
    for old, new in FIELDS.items():
        parts = old.split(".")
        if len(parts) == len(place) and all(a in (b, NAME) for a, b in zip(parts, place, strict=True)):
            return new
    return None
