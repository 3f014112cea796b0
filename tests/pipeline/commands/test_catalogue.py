"""The lists of recipes and fields: what they show, and that nobody waits for torch or Ray to see them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from pipeline.config import recipe
from pipeline.run import main

#: Packages that take a second or more to import, together about eight.
HEAVY = {"datasets", "deepspeed", "lm_eval", "matplotlib", "mlflow", "ray", "torch", "transformers"}

ANSWER = """
import sys
from pipeline.run import main
try:
    code = main(sys.argv[1:])
except SystemExit as end:
    code = end.code
print("IMPORTED", *(name for name in sys.modules if "." not in name))
sys.exit(code)
"""


def test_recipes_are_listed_with_their_purpose(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    out = capsys.readouterr().out
    for name in recipe.names():
        assert name in out
        assert recipe.load(name).model.source in out
    assert max(map(len, out.splitlines())) <= 80


def test_every_field_has_one_line_that_can_be_searched_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fields"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "learn.NAME.settings.learning_rate  float = 0.01" in lines
    assert "data.calibration.share  [int, int] = [76, 88]" in lines
    assert "sparsities  list of float ≥ 0 < 1 = [0.5, 0.6]" in lines
    assert "evaluate.cloze  (or null)" in lines
    assert any(line.startswith("    Peak learning rate") for line in lines)


@pytest.mark.parametrize("command", ["recipes", "fields", "--help", "run --help", "tune --help", "compare --help"])
def test_an_answer_from_the_recipes_alone_imports_nothing_slow(command: str) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))}
    answer = [sys.executable, "-c", ANSWER, *command.split()]
    done = subprocess.run(answer, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    imported = set(done.stdout.splitlines()[-1].split()[1:])
    assert "pipeline" in imported
    assert not HEAVY & imported
