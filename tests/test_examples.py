"""The examples in docs/ run as they stand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest

ROOT = Path(__file__).resolve().parents[1]
EMBEDDED = ROOT / "pipeline" / "nano" / "model"
ENVIRONMENT = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "CUDA_VISIBLE_DEVICES": ""}


def run(directory: Path, *arguments: str) -> str:
    """What a Python program prints that runs in ``directory``."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, env=os.environ | ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_script_for_one_gpu_prunes_nano_on_a_cpu(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n\n\n".join(text for _, text in sorted(topics.items())))
    script = str(ROOT / "docs" / "prune_one_gpu.py")
    said = run(
        tmp_path, script, "--model", str(EMBEDDED), "--text", "text.txt", "--tokens", "2048", "--row-length", "64"
    )
    assert "perplexity" in said
    assert (tmp_path / "pruned" / "README.md").exists()
    assert (tmp_path / "pruned-packed" / "sparse.json").exists()
