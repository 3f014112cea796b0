"""Builds the C++ sources in ``native/`` at first use, once per machine type, and loads them through ctypes.

The library lands in ``$LEAP_NATIVE_CACHE``, else ``$XDG_CACHE_HOME/leap_kernels`` or ``~/.cache/leap_kernels``, under
a name made of the sources, the compiler, its flags and the CPU's features: a home directory shared by unlike machines
keeps one build for each. Processes that start together each compile to a temporary name and rename it into place.

``LEAP_NATIVE=0`` turns native code off; ``CXX`` names the compiler.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch  # before any of our libraries, so that they bind to its OpenMP runtime: one pool of threads

_SOURCES = Path(__file__).parent / "native"
_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp"]
_FLAGS += ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]

# Storage types as native/simd.h numbers them.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class NativeUnavailableError(RuntimeError):
    """Native code cannot be built or loaded here; the message says why."""


def _cpu_features() -> str:
    """What ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    kept = {
        line for line in lines if line.startswith(("flags", "Features", "model", "vendor_id", "cpu family", "CPU "))
    }
    return "\n".join(sorted(kept))


def _cache_dir() -> Path:
    if explicit := os.environ.get("LEAP_NATIVE_CACHE"):
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "leap_kernels"


def _compiler() -> str:
    for candidate in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if candidate and (found := shutil.which(candidate)):
            return found
    raise NativeUnavailableError("no C++ compiler found (g++, clang++, or the one CXX names)")


def build(name: str, *, tune_for_host: bool) -> Path:
    """Path of the shared library of ``native/<name>.cpp``, compiled now unless the cache has it.

    tune_for_host: compile for this CPU (``-march=native``); without it the source selects instructions at run time.
    Raises NativeUnavailableError.
    """
    compiler = _compiler()
    flags = [*_FLAGS, *(["-march=native"] if tune_for_host else [])]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    digest = hashlib.sha256("\n".join([compiler, version, *flags, _cpu_features()]).encode())
    for source in [*sorted(_SOURCES.glob("*.h")), _SOURCES / f"{name}.cpp"]:
        digest.update(source.read_bytes())
    library = _cache_dir() / f"{name}-{digest.hexdigest()[:24]}.so"
    if library.exists():
        return library
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            fresh = Path(scratch) / library.name
            command = [compiler, *flags, str(_SOURCES / f"{name}.cpp"), "-o", str(fresh)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                reason = (done.stderr.strip().splitlines() or ["no message"])[0]
                raise NativeUnavailableError(f"{compiler} failed: {reason}")
            os.replace(fresh, library)
    except OSError as error:
        raise NativeUnavailableError(f"cannot write the build cache {library.parent}: {error}") from error
    return library


@functools.cache
def load(name: str, *, tune_for_host: bool) -> ctypes.CDLL | None:
    """The library of ``native/<name>.cpp``; None where native code is off or cannot be had, after one warning."""
    if os.environ.get("LEAP_NATIVE") == "0":
        return None
    try:
        return ctypes.CDLL(str(build(name, tune_for_host=tune_for_host)))
    except (NativeUnavailableError, OSError) as error:
        warnings.warn(f"{name}: {error}; using the slower PyTorch path", RuntimeWarning, stacklevel=2)
        return None
