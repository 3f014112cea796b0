"""What is packed: wheel and sdist hold all that a run needs, and the installed command answers in any folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow

#: Folder in the checkout by the folder that its package is installed in.
PACKAGES = {Path(folder).name: folder for folder in ("leap", "pipeline", "kernels/leap_kernels", "tune_spaces")}
BUILD_SDIST = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"


def _needed(folder: str) -> list[str]:
    """Every file of a package, by its path below the package."""
    files = (path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return [path.relative_to(ROOT / folder).as_posix() for path in files]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, unpacked. Built from a copy: a build leaves folders in its source."""
    folder = tmp_path_factory.mktemp("sdist")
    left_out = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder / "copy", ignore=left_out)
    build = [sys.executable, "-c", BUILD_SDIST, str(folder)]
    subprocess.run(build, cwd=folder / "copy", check=True, capture_output=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source distribution alone."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder)]
    subprocess.run([*build, str(sdist)], check=True, capture_output=True)
    (file,) = folder.glob("*.whl")
    return file


def test_wheel_and_sdist_hold_every_file_of_the_packages(sdist: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        packed = set(file.namelist())
    for package, folder in PACKAGES.items():
        needed = _needed(folder)
        assert needed
        assert [name for name in needed if not (sdist / folder / name).is_file()] == []
        assert [name for name in needed if f"{package}/{name}" not in packed] == []
    assert {name.split("/")[0] for name in packed if ".dist-info" not in name} == set(PACKAGES)
    for name in ("CHANGELOG.md", "CITATION.cff", "LICENSE", "Makefile", "constraints.txt", "tests/conftest.py"):
        assert (sdist / name).is_file()


def test_the_science_asks_for_nothing_of_the_pipelines(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        (name,) = (name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        lines = file.read(name).decode().splitlines()
    required = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    plain = {line.split(">")[0].split(";")[0] for line in required if "extra ==" not in line}
    assert plain == {"numpy", "safetensors", "torch", "transformers", "triton"}
    assert any(line.startswith("ray[") and "pipeline" in line for line in required)


def test_the_installed_command_answers_in_any_folder(wheel: Path, bare_python: Path, tmp_path: Path) -> None:
    install = ["install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(bare_python), *install], check=True)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["PATH"] = f"{bare_python.parent}{os.pathsep}{environment['PATH']}"

    def leap_prune(*arguments: str, code: int = 0) -> str:
        command = [str(bare_python.parent / "leap-prune"), *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400)
        assert done.returncode == code, (done.stdout + done.stderr)[-4000:]
        return done.stdout + done.stderr

    assert "usage: leap-prune" in leap_prune("--help")
    assert "smollm2" in leap_prune("recipes")
    assert "nano: nano, " in leap_prune("plan", "--recipe", "nano")
    unknown = leap_prune("tune", "--recipe", "nano", "--space", "nope", code=2)
    assert f"Known: {', '.join(sorted(path.stem for path in (ROOT / 'tune_spaces').glob('*.yaml')))}" in unknown
