"""The fields of a recipe, read from the configuration classes: dotted name, type, default and docstring.

A section is a pydantic model or a dataclass. Both say the same about a field in different ways.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel

from leap.families.base import TaggedByKind
from leap.validation import OneOf
from pipeline.config import RunConfig

#: Stands for the names that users give to the entries of a mapping.
NAME = "NAME"
SECTION = "section"


@dataclass(frozen=True)
class FieldHelp:
    """A field, or a section (which has no default)."""

    name: str
    """Dotted, as on the command line; NAME stands for a name that the user gives. A ``kind`` other than the default's,
    which alone has the field, follows in brackets."""
    type: str
    default: Any
    help: str


def all_fields() -> Iterator[FieldHelp]:
    """Every section and every field of a recipe, in order."""
    # A recipe has to have a name; the one of its file, where it does not say another.
    return _walk(RunConfig(name="name of the file"), "")


def known_key(path: list[str]) -> tuple[list[str], list[str]]:
    """The part of ``path`` that are keys of a recipe, and the keys allowed in its section.

    Pydantic adds to the place of an error the member of a union that it tried, and the ``kind`` that chose one; these
    are no keys.
    """
    section: Any = RunConfig
    known: list[str] = []
    rest = list(path)
    while rest:
        annotations = _annotations(section)
        if rest[0] not in annotations:
            break
        annotation = annotations[rest[0]]
        known.append(rest.pop(0))
        inner = section_of(annotation)
        if inner is None:
            # An index into a list, or a key of a plain mapping, is part of what the user wrote.
            if rest and (rest[0].isdigit() or is_mapping(annotation)):
                known.append(rest[0])
            break
        if is_mapping(annotation) and rest:
            known.append(rest.pop(0))
        kinds = _kinds(annotation)
        section = kinds[rest.pop(0)] if rest and rest[0] in kinds else inner
    return known, list(_annotations(section))


def section_of(annotation: Any) -> Any:
    """The section within ``X``, ``X | None`` or ``dict[str, X]``; none if X is a plain value."""
    if dataclasses.is_dataclass(annotation) or (inspect.isclass(annotation) and issubclass(annotation, BaseModel)):
        return annotation
    if get_origin(annotation) is Annotated:
        return section_of(get_args(annotation)[0])  # what else it holds says something of the value
    if get_origin(annotation) in (dict, Union, types.UnionType):
        return next((found for a in get_args(annotation) if (found := section_of(a)) is not None), None)
    return None


def is_mapping(annotation: Any) -> bool:
    """Whether the user chooses the keys."""
    return get_origin(annotation) is dict


def _kinds(annotation: Any) -> dict[str, Any]:
    """The sections of a union that a field ``kind`` chooses from, by kind; none of another annotation."""
    if get_origin(annotation) is Annotated and any(isinstance(a, TaggedByKind) for a in annotation.__metadata__):
        inside = get_args(annotation)[0]
        return {member.kind: member for member in get_args(inside) or (inside,)}
    return {}


def _walk(section: Any, prefix: str) -> Iterator[FieldHelp]:
    kind: Any = type(section)
    docs = _docs(kind)
    for name, annotation in _annotations(kind).items():
        value, key = getattr(section, name), f"{prefix}{name}"
        inner = section_of(annotation)
        if inner is None:
            yield FieldHelp(key, _type_text(annotation, _constraints(kind, name)), value, docs[name])
            continue
        if is_mapping(annotation):
            # The entry that is there by default shows what an entry has.
            key, value = f"{key}.{NAME}", next(iter(value.values()))
        yield FieldHelp(key, SECTION if value is not None else f"{SECTION} | none", None, docs[name])
        yield from _walk(value or inner(), f"{key}.")
        for kind_of, member in _kinds(annotation).items():
            if not isinstance(value, member):
                for entry in _walk(member(), f"{key}."):
                    yield dataclasses.replace(entry, name=f"{entry.name} ({kind_of})")


@functools.cache
def _annotations(section: Any) -> dict[str, Any]:
    names = section.model_fields if issubclass(section, BaseModel) else section.__dataclass_fields__
    hints = get_type_hints(section, include_extras=True)
    return {name: hints[name] for name in names}


@functools.cache
def _docs(section: Any) -> dict[str, str]:
    """The string under each field, in one line."""
    if issubclass(section, BaseModel):
        texts = {name: field.description or "" for name, field in section.model_fields.items()}
    else:
        # A dataclass does not keep these strings; they are in its source only, or in that of the class it extends.
        texts = {}
        bases: list[Any] = [base for base in reversed(section.__mro__) if dataclasses.is_dataclass(base)]
        for base in bases:
            (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
            assert isinstance(definition, ast.ClassDef)
            texts |= {
                field.target.id: text.value.value
                for field, text in zip(definition.body, definition.body[1:], strict=False)
                if isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
                and isinstance(text.value.value, str)
            }
    return {name: " ".join(texts.get(name, "").split()) for name in _annotations(section)}


def _constraints(section: Any, name: str) -> tuple[Any, ...]:
    return tuple(section.model_fields[name].metadata) if issubclass(section, BaseModel) else ()


def _type_text(annotation: Any, constraints: tuple[Any, ...] = ()) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is type(None):
        return "none"
    if origin is Annotated:
        if names := [a.names for a in arguments if isinstance(a, OneOf)]:
            return " | ".join(names[0])
        extra = [c for a in arguments[1:] for c in getattr(a, "metadata", [a])]
        return _type_text(arguments[0], (*constraints, *extra))
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " | ".join(_type_text(a, constraints) for a in arguments)
    if origin is list:
        return f"list of {_type_text(arguments[0])}"
    if origin is dict:
        return f"{NAME}: {_type_text(arguments[1])}"
    if origin is tuple:
        return f"[{', '.join(map(_type_text, arguments))}]"
    limits = _limits(constraints) if annotation in (int, float) else ""
    return f"{annotation.__name__}{limits}"


def _limits(constraints: tuple[Any, ...]) -> str:
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}  # named after the attributes of annotated_types.Gt and so on
    return "".join(f" {signs[n]} {getattr(c, n)}" for c in constraints for n in signs if hasattr(c, n))
