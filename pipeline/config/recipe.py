"""Recipes: YAML files that inherit from one another, and dotted overrides from the command line."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline.config import CorpusConfig, DataConfig, RunConfig, renamed
from pipeline.config.fields import known_key
from pipeline.config.mappings import merge
from pipeline.config.paths import is_file
from pipeline.errors import UserError

DIRECTORY = Path(__file__).parents[1] / "recipes"
#: What others inherit from; not to be run as they are.
_BASES = {"base", "gpu", "gpu-paper", "short"}


def names() -> list[str]:
    """The recipes that come with the project."""
    return sorted(p.stem for p in DIRECTORY.glob("*.yaml") if p.stem not in _BASES)


def load(recipe: str, overrides: list[str] | None = None) -> RunConfig:
    """The checked configuration of a recipe name or file with ``key.sub=value`` overrides.

    Raises:
        UserError: unknown recipe, unreadable file, unknown key or a value that is not allowed.
    """
    data = _resolve(recipe)
    for assignment in overrides or []:
        _override(data, assignment)
    return validate(data)


def validate(data: dict[str, Any]) -> RunConfig:
    """The checked configuration of ``data``, the content of a recipe with all that it inherits.

    Raises:
        UserError: unknown key or a value that is not allowed.
    """
    try:
        return RunConfig.model_validate(_complete(data))
    except ValidationError as error:
        raise UserError(_explain(error)) from error


def _read(recipe: str, folder: Path | None, key: str) -> tuple[dict[str, Any], Path]:
    """The content of a recipe and its file. ``key`` is what the user named it by."""
    if recipe.endswith((".yaml", ".yml")):
        path = (folder or Path()) / Path(recipe).expanduser()
    else:
        beside = (folder or DIRECTORY) / f"{recipe}.yaml"
        path = beside if is_file(beside) else DIRECTORY / f"{recipe}.yaml"
    if not is_file(path):
        if new := renamed.RECIPES.get(recipe):
            raise UserError(f"{key} {recipe}: this recipe is now called {new}")
        close = difflib.get_close_matches(recipe, names(), 1)
        hint = f"; did you mean {close[0]}?" if close else "."
        raise UserError(f"{key} {recipe}: no such recipe{hint} Known: {', '.join(names())}, or a .yaml file")
    try:
        data = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{key} {recipe}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise UserError(f"{key} {recipe}: expected a mapping of keys to values")
    return data, path.resolve()


def _resolve(
    recipe: str, folder: Path | None = None, key: str = "--recipe", seen: tuple[Path, ...] = ()
) -> dict[str, Any]:
    """A recipe merged with all that it inherits. A file's ``base`` is looked for beside it first."""
    data, path = _read(recipe, folder, key)
    if path in seen:
        raise UserError(f"{key} {recipe}: a recipe cannot inherit from itself")
    data.setdefault("name", path.stem)
    parent = data.get("base")
    if parent is None:
        return data
    return merge(_resolve(str(parent), path.parent, f"{path.name}: base", (*seen, path)), data)


def _override(data: dict[str, Any], assignment: str) -> None:
    key, equals, text = assignment.partition("=")
    if not equals or not key:
        raise UserError(f"{assignment}: expected key.sub=value")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:  # the latter: brackets within brackets without end
        raise UserError(f"{key}: {text[:80]!r} is not a YAML value") from error
    put(data, key, value)


def put(data: dict[str, Any], key: str, value: Any) -> None:
    """Set the field with the dotted name ``key`` in nested mappings.

    Raises:
        UserError: a part of the path is no mapping.
    """
    *path, last = key.split(".")
    at = data
    for part in path:
        if at.get(part) is None:
            at[part] = {}
        at = at[part]
        if not isinstance(at, dict):
            raise UserError(f"{key}: {part} is a value, not a section")
    at[last] = value


def _complete(data: dict[str, Any]) -> dict[str, Any]:
    """Fill in what a partly given entry leaves open, where that is more than the defaults of its class.

    null in place of an entry of ``learn`` or ``data.evaluation`` takes out an inherited one. The rest of a corpus is
    that of its role; the share of the embedded documents, which keeps texts for learning and for measuring apart, is
    not meant for other sources.
    """
    data = dict(data)
    if isinstance(data.get("learn"), dict):
        entries = data["learn"]
        data["learn"] = {name: _like(name, entries) for name, entry in entries.items() if entry is not None}
    if isinstance(data.get("data"), dict):
        defaults = DataConfig()
        section = {
            key: _corpus(entry, getattr(defaults, key)) if key in ("calibration", "heldout") else entry
            for key, entry in data["data"].items()
        }
        if isinstance(section.get("evaluation"), dict):
            section["evaluation"] = {
                name: _corpus(entry, defaults.evaluation["docs"])
                for name, entry in section["evaluation"].items()
                if entry is not None
            }
        data["data"] = section
    return data


def _like(name: str, entries: dict[str, Any], seen: tuple[str, ...] = ()) -> Any:
    """An entry of ``learn`` over the one that it is like."""
    entry = entries[name]
    other = entry.get("like") if isinstance(entry, dict) else None
    if other is None:
        return entry
    key = f"learn.{name}.like"
    if not isinstance(other, str):
        raise UserError(f"{key}: expected the name of another entry, not {other!r}")
    if other in (name, *seen):
        raise UserError(f"{key}: an entry cannot be like itself")
    if not isinstance(entries.get(other), dict):
        allowed = ", ".join(n for n in entries if n != name and isinstance(entries[n], dict))
        raise UserError(f"{key}: no entry {other} in learn; allowed here: {allowed or 'none'}")
    return merge(_like(other, entries, (*seen, name)), entry)


def _corpus(entry: Any, default: CorpusConfig) -> Any:
    if not isinstance(entry, dict):
        return entry
    share = default.share if entry.get("source", "embedded") == "embedded" else CorpusConfig().share
    return default.model_dump() | {"share": share} | entry


def _explain(error: ValidationError) -> str:
    """The first problem, as one line that names the key, what was wrong and what is allowed."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"]]
    known, allowed = known_key(place)
    if first["type"] in {"extra_forbidden", "unexpected_keyword_argument"}:
        if new := renamed.field(place):
            return f"{'.'.join(place)}: is now {new}"
        close = difflib.get_close_matches(place[-1], allowed, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        return f"{'.'.join([*known, place[-1]])}: unknown key; {hint}allowed here: {', '.join(sorted(allowed))}"
    key = ".".join(known)
    # The members of a union fail one by one, each with an error of its own.
    same = [e for e in error.errors() if known_key([str(part) for part in e["loc"]])[0] == known]
    messages = dict.fromkeys(" ".join(e["msg"].removeprefix("Value error, ").split()) for e in same)
    message = " or ".join(m[0].lower() + m[1:] for m in messages)
    # Our own errors say what was given; for a section it would be the whole of it.
    ours = first["type"] == "value_error" or not isinstance(first["input"], str | int | float | list | None)
    given = "" if ours or first["type"].startswith("missing") else f", not {first['input']!r}"
    return f"{key}: {message}{given}" if key else f"{message}{given}"
