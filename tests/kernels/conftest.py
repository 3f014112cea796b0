"""What the tests of native code share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

import pytest


@pytest.fixture(scope="session")
def require_native() -> Callable[[object], None]:
    """Skips where there is no compiler or native code is turned off; fails where a library could not be built."""

    def require(library: object) -> None:
        if not any(map(shutil.which, ("g++", "clang++", "c++"))):
            pytest.skip("no C++ compiler (g++, clang++ or c++), so there is no native code")
        if os.environ.get("LEAP_NATIVE") == "0":
            pytest.skip("LEAP_NATIVE=0 turns native code off")
        assert library is not None, "there is a C++ compiler, but the native code did not build"

    return require
