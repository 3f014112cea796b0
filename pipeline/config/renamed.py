"""Names that recipes of older versions have, and what they are called now."""

from __future__ import annotations

from pipeline.config.fields import NAME

#: Fields by their dotted name, in which NAME stands for a name that the user chose.
FIELDS = {
    "learn.NAME.reconstruct": "reconstruct, a list of entries of learn",
    "learn.NAME.settings.noise": "learn.NAME.settings.family.noise",
    "learn.NAME.settings.temperature": "learn.NAME.settings.family.temperature",
    "learn.NAME.settings.scale": "learn.NAME.settings.family.scale",
    "learn.NAME.settings.prior_strength": "learn.NAME.settings.family.strength",
    "learn.NAME.settings.prior_grading": "learn.NAME.settings.family.grading",
    "learn.NAME.settings.init_std": "learn.NAME.settings.family.init_std",
    "learn.NAME.settings.scope": "learn.NAME.settings.family.scope",
}
RECIPES: dict[str, str] = {}


def field(place: list[str]) -> str | None:
    """What the field at a place of a recipe is called now; none where it never had another name."""
    for old, new in FIELDS.items():
        parts = old.split(".")
        if len(parts) == len(place) and all(a in (b, NAME) for a, b in zip(parts, place, strict=True)):
            chosen = (b for a, b in zip(parts, place, strict=True) if a == NAME)
            return ".".join(next(chosen) if part == NAME else part for part in new.split("."))
    return None
