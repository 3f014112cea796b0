"""Recipes: YAML files that inherit from one another, and dotted overrides from the command line."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline.config import RunConfig
from pipeline.errors import UserError

DIRECTORY = Path(__file__).parent / "recipes"


def names() -> list[str]:
    """The recipes that come with the project."""
    return sorted(p.stem for p in DIRECTORY.glob("*.yaml") if p.stem != "base")


def _read(recipe: str) -> tuple[dict[str, Any], Path]:
    path = Path(recipe) if recipe.endswith((".yaml", ".yml")) else DIRECTORY / f"{recipe}.yaml"
    if not path.is_file():
        close = difflib.get_close_matches(recipe, names(), 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UserError(f"--recipe {recipe}: no such recipe{hint} Known: {', '.join(names())}, or a .yaml file")
    try:
        data = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"--recipe {recipe}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise UserError(f"--recipe {recipe}: expected a mapping of keys to values")
    return data, path


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """``above`` over ``below``, mapping by mapping; null in place of a mapping removes it."""
    merged = dict(below)
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def _resolve(recipe: str, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    data, path = _read(recipe)
    parent = data.get("base")
    data.setdefault("name", path.stem)
    if parent is None:
        return data
    if parent in seen:
        raise UserError(f"--recipe {recipe}: base {parent} inherits from itself")
    local = path.parent / f"{parent}.yaml"
    return merge(_resolve(str(local) if local.is_file() else parent, (*seen, parent)), data)


def _override(data: dict[str, Any], assignment: str) -> None:
    key, equals, text = assignment.partition("=")
    if not equals or not key:
        raise UserError(f"{assignment}: expected key.sub=value")
    *path, last = key.split(".")
    at = data
    for part in path:
        child = at.setdefault(part, {})
        if not isinstance(child, dict):
            raise UserError(f"{key}: {part} is a value, not a section")
        at = child
    try:
        at[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{key}: {text!r} is not a YAML value") from error


def _explain(error: ValidationError) -> str:
    """The first problem, as one line that names the key, what was wrong and what is allowed."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] in {"extra_forbidden", "unexpected_keyword_argument"}:
        allowed = known_keys(RunConfig, [str(p) for p in first["loc"][:-1]])
        close = difflib.get_close_matches(str(first["loc"][-1]), allowed, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        return f"{key}: unknown key; {hint}allowed here: {', '.join(sorted(allowed))}"
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    given = "" if isinstance(first["input"], (dict, tuple)) or "ctx" in first and "error" in first["ctx"] else (
        f", not {first['input']!r}"
    )
    return f"{key}: {message}{given}" if key else message


def known_keys(model: Any, path: list[str]) -> list[str]:
    """Keys allowed at ``path`` below the pydantic model or dataclass ``model``."""
    from typing import get_args

    fields = getattr(model, "model_fields", None) or getattr(model, "__dataclass_fields__", {})
    if not path:
        return list(fields)
    if path[0] in fields:
        field = fields[path[0]]
        annotation = getattr(field, "annotation", None) or _evaluated(model, path[0])
        options = [annotation, *get_args(annotation)]
        rest = path[2:] if getattr(annotation, "__origin__", None) is dict else path[1:]
        for option in reversed(options):
            if hasattr(option, "model_fields") or hasattr(option, "__dataclass_fields__"):
                return known_keys(option, rest)
    return []


def _evaluated(model: Any, name: str) -> Any:
    from typing import get_type_hints

    return get_type_hints(model)[name]


def load(recipe: str, overrides: list[str] | None = None) -> RunConfig:
    """The checked configuration of a recipe name or file with ``key.sub=value`` overrides.

    Raises:
        UserError: unknown recipe, unreadable file, unknown key or a value that is not allowed.
    """
    data = _resolve(recipe)
    for assignment in overrides or []:
        _override(data, assignment)
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise UserError(_explain(error)) from error
