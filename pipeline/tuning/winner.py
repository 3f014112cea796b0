"""The settings of a trial as a recipe that ``run --recipe FILE.yaml`` takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from pipeline.artifacts.store import write_atomically
from pipeline.config import RunConfig, recipe
from pipeline.tracking.redaction import redact
from pipeline.tuning import space


def write(path: Path, base: str, config: RunConfig, learn: str, values: dict[str, Any], why: str) -> RunConfig:
    """Write what has to be changed in the recipe ``base`` to get ``config`` with ``values`` of its settings.

    An address with a password is left as ``base`` has it: the command line gives it again, where it is needed.

    Args:
        base: name or file of the recipe that was searched on.
        config: that recipe with the overrides of the command line.
    """
    parent = str(Path(base).expanduser().resolve()) if base.endswith((".yaml", ".yml")) else base
    entry = space.place(config, learn, values)
    target = config.model_copy(
        update={
            "name": f"{config.name}-{path.stem}",
            "base": parent,
            "why": why,
            "learn": {**config.learn, learn: entry},
        }
    )
    before = recipe.load(parent).model_dump(mode="json")
    target = RunConfig.model_validate(_without_secrets(target.model_dump(mode="json"), before))
    after = target.model_dump(mode="json")
    _dump(path, _difference(before, after))
    written = recipe.load(str(path))
    if written != target:
        # An entry that an override took out of a plain mapping: inheritance has no word for that.
        plain = _without_secrets(target.model_dump(mode="json"), {})
        target = RunConfig.model_validate(plain | {"base": None})
        _dump(path, target.model_dump(mode="json"))
        written = recipe.load(str(path))
        assert written == target
    return written


def _dump(path: Path, data: dict[str, Any]) -> None:
    write_atomically(path, yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100))


def _without_secrets(data: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """``data`` with the values of ``before`` where its own hold a secret, and without those that ``before`` lacks."""
    public: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            public[key] = _without_secrets(value, before.get(key) or {})
        elif redact({key: value}) == {key: value}:
            public[key] = value
        elif key in before:
            public[key] = before[key]
    return public


def _difference(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What of ``after`` has to be laid over ``before``; null takes out what is no longer there."""
    changed: dict[str, Any] = {key: None for key in before if key not in after}
    for key, value in after.items():
        if key not in before:
            changed[key] = value
        elif isinstance(value, dict) and isinstance(before[key], dict):
            if inner := _difference(before[key], value):
                changed[key] = inner
        elif value != before[key]:
            changed[key] = value
    return changed
