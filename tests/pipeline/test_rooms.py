"""The rooms of the pipeline: imports point downwards, and every module has a name of its own."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

#: From above to below: a room imports from itself and from what stands after it.
ROOMS = [
    "commands",
    "tuning",
    "execution",
    "reporting",
    "results",
    "stages",
    "learning",
    "evaluation",
    "tracking",
    "model",
    "data",
    "artifacts",
    "config",
    "nano",
]
#: Scripts, which import from every room and are imported from none.
SCRIPTS = {"run", "benchmarks"}
#: Beside the rooms, for all of them.
SHARED = {"errors", "formatting", "program"}
PIPELINE = ROOT / "pipeline"
MODULES = [path.relative_to(ROOT) for path in sorted(PIPELINE.rglob("*.py")) if path.name != "__init__.py"]


def _room(module: Path) -> str:
    return module.with_suffix("").parts[1]


def _imported(path: Path) -> Iterator[str]:
    """The rooms that a file imports from, in functions and for types too."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name.split(".")[1] for name in names if name.startswith("pipeline."))


def test_every_module_lives_in_a_room() -> None:
    assert {_room(module) for module in MODULES} == {*ROOMS, *SCRIPTS, *SHARED}


@pytest.mark.parametrize("room", [*ROOMS, *sorted(SHARED)])
def test_no_room_imports_from_above(room: str) -> None:
    below = {*ROOMS[ROOMS.index(room) :], *SHARED} if room in ROOMS else SHARED
    files = [path.relative_to(ROOT) for path in PIPELINE.rglob("*.py")]
    upwards = {
        f"{path} imports from {name}"
        for path in files
        if _room(path) == room
        for name in _imported(path)
        if name not in below
    }
    assert not upwards


def test_no_two_modules_have_one_name_or_names_that_differ_by_a_letter() -> None:
    names = sorted(module.stem for module in MODULES)
    assert [pair for pair in itertools.combinations(names, 2) if _alike(*pair)] == []


def _alike(one: str, other: str) -> bool:
    """Whether one letter put in, left out or changed makes one of the other."""
    short, long = sorted((one, other), key=len)
    if len(long) - len(short) > 1:
        return False
    same = next((n for n, (a, b) in enumerate(zip(short, long, strict=False)) if a != b), len(short))
    return short[same + (len(short) == len(long)) :] == long[same + 1 :]
