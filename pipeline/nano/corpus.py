"""English text that every Python installation carries: help topics and docstrings.

A *document* is one help topic or one docstring. It is assigned to a split by a hash of its own words, never by where
it was found, so that any two installations agree on the split of a text and a text can be in one split only: the
embedded model was trained on ``train``; pruning uses ``calibration``, settings are chosen on ``heldout`` and the
final tables are measured on ``eval``.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

#: Hash range of each split, in percent: from the first number up to, not including, the second.
SPLITS: dict[str, tuple[int, int]] = {
    "train": (0, 76),
    "calibration": (76, 88),
    "heldout": (88, 92),
    "eval": (92, 100),
}

#: Shorter docstrings say too little to be a document.
MIN_CHARS = 160

#: Packages read at run time beside the standard library: installed with this project, rich in prose, quick to parse.
RUNTIME_PACKAGES = ("numpy", "pandas")


def bucket_of(text: str) -> int:
    """Number in [0, 100) that decides which split a document belongs to.

    The hash is over the first 200 letters in lower case: reflowed text, other version numbers and a longer tail in
    another release of the same package do not move a document to another split.
    """
    letters = "".join(c for c in text.lower() if c.isalpha())[:200]
    return int.from_bytes(hashlib.sha256(letters.encode()).digest()[:8], "big") % 100


def _docstrings(source: str) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's sources are not ours to report
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError):
            return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            doc = ast.get_docstring(node)
            if doc and len(doc) >= MIN_CHARS:
                yield doc.strip()


def _python_files(root: Path) -> Iterator[Path]:
    skip = {"site-packages", "__pycache__", "test", "tests", "idlelib", "lib2to3"}
    for path in sorted(root.rglob("*.py")):
        if not skip.intersection(path.relative_to(root).parts):
            yield path


def source_files(packages: tuple[str, ...] | None = RUNTIME_PACKAGES) -> list[Path]:
    """Python files to read: the standard library, then ``packages`` (``None``: everything in site-packages)."""
    files = list(_python_files(Path(sysconfig.get_path("stdlib"))))
    if packages is None:
        return files + list(_python_files(Path(sysconfig.get_path("purelib"))))
    for name in packages:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            files += _python_files(Path(next(iter(spec.submodule_search_locations))))
    return files


def topics() -> list[str]:
    """The help topics of the language reference."""
    from pydoc_data import topics as module

    return [text.strip() for _, text in sorted(module.topics.items()) if len(text) >= MIN_CHARS]


def file_documents(path: Path) -> list[str]:
    """Docstrings of one source file that are long enough to be documents; empty where it cannot be parsed."""
    return list(_docstrings(path.read_text(encoding="utf-8", errors="ignore")))


def documents(split: str, packages: tuple[str, ...] | None = RUNTIME_PACKAGES) -> Iterator[str]:
    """Documents of ``split`` without repeats, in a fixed order (topics first, then files by path)."""
    seen: set[bytes] = set()
    low, high = SPLITS[split]

    def fresh(text: str) -> bool:
        key = hashlib.sha256("".join(text.split()).encode()).digest()
        if not low <= bucket_of(text) < high or key in seen:
            return False
        seen.add(key)
        return True

    yield from filter(fresh, topics())
    for path in source_files(packages):
        yield from filter(fresh, file_documents(path))
