"""Native code under AddressSanitizer: it touches no memory that is not its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(shutil.which("g++") is None or sys.platform != "linux", reason="needs g++ on Linux"),
]

NATIVE = """
import torch
torch.set_default_dtype(torch.{default})
from leap_kernels.benchmarks.gpu_correctness import smallest_case
smallest_case(torch.device("cpu"))
from leap_kernels import adam8bit, mask_ops, output_losses, radix_counts
assert all(m.native_library() for m in (adam8bit, mask_ops, output_losses, radix_counts)), "no native code ran"
print("clean")
"""
#: As many bytes too many as a wrong number type writes.
OVERRUN = "import ctypes, torch; t = torch.empty(7, 2); ctypes.memset(t.data_ptr(), 0, 2 * t.nbytes); print('clean')"


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which native code is compiled and loaded with AddressSanitizer."""
    directory = tmp_path_factory.mktemp("sanitized")
    compiler = directory / "g++"
    compiler.write_text(f'#!/bin/sh\nexec {shutil.which("g++")} -fsanitize=address -g "$@"\n')
    compiler.chmod(0o755)
    found = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    library = Path(found.stdout.strip())
    if not library.is_absolute():
        pytest.skip("g++ came without libasan")
    return os.environ | {
        "CXX": str(compiler),
        "LEAP_NATIVE_CACHE": str(directory / "cache"),
        "LD_PRELOAD": str(library),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }


def run(code: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("default", ["float32", "bfloat16"])
def test_native_code_stays_within_its_tensors(sanitized, default):
    done = run(NATIVE.format(default=default), sanitized)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "clean"


def test_an_overrun_is_seen(sanitized):
    done = run(OVERRUN, sanitized)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
