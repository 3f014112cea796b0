"""Imports point one way: pipeline → leap → leap_kernels."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

#: What no module below a folder imports.
FORBIDDEN = {
    "kernels/leap_kernels": {"leap", "pipeline", "transformers", "ray", "deepspeed", "mlflow", "lm_eval", "pydantic"},
    "leap": {"pipeline", "ray", "deepspeed", "mlflow", "lm_eval", "pydantic", "pyarrow", "datasets"},
}


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name.partition(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0]


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_nothing_is_imported_from_above(folder: str) -> None:
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    imports = [(str(path.relative_to(ROOT)), name) for path in files for name in _imported(path)]
    assert [(path, name) for path, name in imports if name in FORBIDDEN[folder]] == []
