"""The Triton kernels on CPU tensors, in Triton's interpreter, against float64.

Triton reads TRITON_INTERPRET when it is imported, so each script runs in a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize(
    "script", ["interpreted_sparse_kernels.py", "interpreted_mask_kernels.py", "interpreted_learning_kernels.py"]
)
def test_agrees_with_float64(script):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, Path(__file__).parent / script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
