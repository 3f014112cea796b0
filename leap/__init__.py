"""LEAP: learn which weights of a language model to keep."""

import sys
from pathlib import Path

try:
    import leap_kernels  # noqa: F401
except ModuleNotFoundError:
    # A source checkout that nobody installed, such as the working directory of a Ray job.
    sys.path.append(str(Path(__file__).resolve().parents[1] / "kernels"))
