"""Search spaces: small YAML files that name fields of ``learn.NAME.settings`` and what they may be.

why: how fast the gates close
trials: 24
parameters:
  family.temperature.end: {low: 0.02, high: 0.5, log: true}
  family.temperature.shape: [linear, exponential, cosine]
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from leap.settings import LearnSettings
from pipeline.config import LearnConfig, RunConfig, recipe
from pipeline.config.paths import is_file
from pipeline.errors import UserError
from pipeline.tuning.domains import Choice, Domain, Span

DIRECTORY = Path(__file__).resolve().parents[2] / "tune_spaces"

#: Fields that make a trial longer, or that say what is asked of it: not a matter of finding better ones.
_FIXED = {"steps", "batch_rows", "microbatch_rows", "family.kind", "family.scope", "seed"}


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    why: str = ""
    trials: int = Field(default=24, gt=0)
    parameters: dict[str, Any] = Field(min_length=1)


class _Range(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    low: float
    high: float
    log: bool = False


@dataclass(frozen=True)
class Space:
    """A space that fits a recipe.

    Attributes:
        domains: by field, dotted below ``learn.NAME.settings``.
        published: the published values (:meth:`leap.settings.LearnSettings.published`) of these fields.
        current: the recipe's values of these fields.
    """

    name: str
    why: str
    trials: int
    domains: dict[str, Domain]
    published: dict[str, Any]
    current: dict[str, Any]


def names() -> list[str]:
    """The spaces that come with the project."""
    return sorted(path.stem for path in DIRECTORY.glob("*.yaml"))


def load(name: str, config: RunConfig, learn: str) -> Space:
    """The space of a name or file, checked against the recipe that it is for.

    Args:
        learn: the entry of ``config.learn`` whose settings are searched.

    Raises:
        UserError: no such space, a field that the recipe does not have, a value that the field does not allow, or a
            domain without the published value, the first trial of every search. The recipe's own, the second trial, is
            added to a domain that lacks it.
    """
    path = _find(name)
    try:
        file = _File.model_validate(yaml.safe_load(path.read_text()))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"--space {name}: not valid YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        raise UserError(f"--space {name}: {_explain(error)}") from error
    domains, published, current = {}, {}, {}
    for key, given in file.parameters.items():
        where = f"--space {name}: {key}"
        if key in _FIXED:
            raise UserError(f"{where}: belongs to what is asked of every trial; set it in the recipe")
        domains[key] = _domain(where, key, given, config, learn)
        settings = config.learn[learn].settings
        published[key] = get(LearnSettings.published(settings.family.kind), key)
        current[key] = get(settings, key)
        if published[key] not in domains[key]:
            raise UserError(f"{where}: the published value {published[key]} is not within {domains[key]}")
        try:
            domains[key] = domains[key].including(current[key])
        except ValueError as error:
            raise UserError(f"{where}: the recipe's value {error}") from error
    return Space(path.stem, file.why, file.trials, domains, published, current)


def get(settings: LearnSettings, key: str) -> Any:
    """The field with the dotted name ``key``."""
    return functools.reduce(getattr, key.split("."), settings)


def place(config: RunConfig, learn: str, values: dict[str, Any]) -> LearnConfig:
    """The entry ``learn`` of a recipe with other ``values`` of its settings, by dotted name.

    Raises:
        UserError: a field that does not exist or a value that it does not allow.
    """
    data = config.model_dump(mode="json")
    data["learn"][learn]["seeds"] = []  # one run: that of the settings' own seed
    for key, value in values.items():
        recipe.put(data["learn"][learn]["settings"], key, value)
    return recipe.validate(data).learn[learn]


def _find(name: str) -> Path:
    path = Path(name).expanduser() if name.endswith((".yaml", ".yml")) else DIRECTORY / f"{name}.yaml"
    if not is_file(path):
        close = difflib.get_close_matches(name, names(), 1)
        hint = f"; did you mean {close[0]}?" if close else "."
        raise UserError(f"--space {name}: no such space{hint} Known: {', '.join(names())}, or a .yaml file")
    return path


def _domain(where: str, key: str, given: Any, config: RunConfig, learn: str) -> Domain:
    def checked(value: Any) -> Any:
        """The value as the field holds it: YAML reads 1e-3 as text."""
        try:
            return get(place(config, learn, {key: value}).settings, key)
        except UserError as error:
            raise UserError(f"--space {where.split()[1]} {error}") from error

    if isinstance(given, list) and given:
        values = tuple(checked(value) for value in given)
        if any(isinstance(value, dict | tuple) or dataclasses.is_dataclass(value) for value in values):
            raise UserError(f"{where}: name single fields, {key} has several")
        if len(set(values)) != len(values):
            raise UserError(f"{where}: the values must differ, not {given}")
        return Choice(values)
    if not isinstance(given, dict):
        raise UserError(f"{where}: expected {{low: …, high: …}} or a list of values, not {given!r}")
    try:
        limits = _Range.model_validate(given)
    except ValidationError as error:
        raise UserError(f"{where}: {_explain(error)}") from error
    low, high = checked(limits.low), checked(limits.high)
    if isinstance(low, bool) or not isinstance(low, int | float):
        raise UserError(f"{where}: a range is for numbers; give a list of values")
    if not low < high or (limits.log and low <= 0):
        raise UserError(f"{where}: low must lie below high, and above 0 on a logarithmic scale, not {low} and {high}")
    return Span(low, high, limits.log, whole=isinstance(low, int))


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    message = "unknown key" if first["type"] == "extra_forbidden" else first["msg"][0].lower() + first["msg"][1:]
    return f"{place}: {message}" if place else message
