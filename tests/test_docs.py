"""What the documentation promises: its commands can be typed, what code cites is there. `make docs` checks links."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, sentences
from transformers import AutoModelForCausalLM

import leap
from pipeline import run
from pipeline.config import recipe

#: Pages that say what to type now; the log says what was typed then.
PAGES = ("*.md", "docs/*.md", "cluster/*.md", "kernels/*.md")
TARGETS = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)


def _pages() -> list[Path]:
    return sorted(path for pattern in PAGES for path in ROOT.glob(pattern) if path != ROOT / "docs" / "log.md")


def _lines(text: str) -> Iterator[str]:
    """Lines of fenced blocks without a language, continued ones as one, and code within sentences."""
    for block in re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield from block.replace("\\\n", " ").splitlines()
    yield from re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)


def _commands() -> Iterator[tuple[str, str]]:
    """Page and text of each command of ours in the documentation."""
    for page in _pages():
        for line in _lines(page.read_text()):
            command = line.rpartition(" -- ")[2] if line.startswith("ray job submit") else line
            whole = "…" not in command and not re.search(r"\b[A-Z]{4,}\b", command)
            if whole and re.match(r"(\S+=\S+ )*(\.venv/bin/)?(python \S+|make|leap-prune) \S", command):
                yield page.name, command


COMMANDS = sorted(set(_commands()))


def test_commands_are_found() -> None:
    words = " ".join(command for _, command in COMMANDS)
    for known in ("make demo", "run --recipe nano", "tune --recipe", "plan --recipe", "memory_plan.py", "-m leap"):
        assert known in words


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_a_command_of_the_documentation_can_be_typed(page: str, command: str) -> None:
    words = shlex.split(command, comments=True)
    while "=" in words[0]:
        words.pop(0)
    program, *rest = words
    if program == "make":
        assert {word for word in rest if "=" not in word} <= set(TARGETS)
    elif rest[0] == "-m":
        assert importlib.util.find_spec(rest[1]) is not None
    elif program.endswith("python") and rest[0] != "pipeline/run.py":
        assert (ROOT / rest[0]).is_file()
    else:
        arguments = run.parse(rest if program == "leap-prune" else rest[1:])
        if "recipe" in arguments:
            recipe.load(arguments.recipe, arguments.overrides)
        if "space" in arguments:
            assert (ROOT / "tune_spaces" / f"{arguments.space}.yaml").is_file()


def test_python_of_the_readme_runs(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it stands, on a tiny model and with two steps of learning."""
    few = leap.LearnSettings(steps=2, batch_rows=2)
    monkeypatch.setattr(leap.LearnSettings, "for_rows", lambda *_: few)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"name": str(tiny / "model"), "text": sentences(1, 2500)}
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    capsys.readouterr()
    assert len(names["tokens"][0]) > 4
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    zero, total = leap.zeros(pruned)
    assert zero == total // 2


def test_files_that_contributors_are_sent_to_are_there() -> None:
    named = set(re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|cpp|yaml))`", (ROOT / "CONTRIBUTING.md").read_text()))
    assert len(named) > 10
    placeholders = {name for name in named if re.search(r"[/_][A-Z]+(_\w+)?\.", name)}
    assert [name for name in sorted(named - placeholders) if not (ROOT / name).is_file()] == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_sections_that_the_code_cites_are_there() -> None:
    sections = re.findall(r"^## (\d+)\.", (ROOT / "docs" / "method.md").read_text(), re.MULTILINE)
    cited: dict[str, str] = {}
    for folder in ("leap", "kernels", "pipeline", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            text = " ".join(path.read_text().split())
            cited |= dict.fromkeys(re.findall(r"method\.md,? section (\d+)", text), path.name)
    assert cited
    assert cited.keys() <= set(sections)
