"""Compare two run directories bit for bit: what a refactor leaves equal. See CONTRIBUTING.md.

    python tests/equal_runs.py runs-before/nano runs-after/nano

Rows, priors, logits, masks, exports, measurements and the table have to agree. Times, dates, places and the keys in the
folders' names do not count, nor do measured speeds. Prints what differs; the exit code is 1 if anything does.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

#: Stages whose files are compared; a benchmark holds times alone.
STAGES = ("calibrate", "prior", "learn", "reconstruct", "harden", "evaluate")
#: Keys, at any depth of a JSON file, that differ between equal runs.
_OF_A_RUN = {"created", "directory", "finished", "fingerprint", "files", "model", "path", "seconds", "seconds_by_seed"}
_OF_A_RUN |= {"sha256", "speed", "model_hash", "uri"}
_KEY = re.compile(r"-[0-9a-f]{16}(?=/|$)")


def differences(before: Path, after: Path) -> list[str]:
    """What differs between two run directories, by path without keys."""
    found, old, new = [], _files(before), _files(after)
    found += [f"{name}: only in {before}" for name in sorted(old.keys() - new.keys())]
    found += [f"{name}: only in {after}" for name in sorted(new.keys() - old.keys())]
    for name in sorted(old.keys() & new.keys()):
        found += [f"{name}{place}" for place in _compared(old[name], new[name])]
    return found


def _files(run: Path) -> dict[str, Path]:
    paths = [path for stage in STAGES for path in (run / stage).rglob("*") if path.is_file()]
    if not paths:
        raise SystemExit(f"{run} holds no finished stages")
    return {_KEY.sub("", str(path.relative_to(run))): path for path in [*paths, run / "results.json"]}


def _compared(old: Path, new: Path) -> Iterator[str]:
    if old.suffix == ".json":
        contents = [json.loads(path.read_text()) for path in (old, new)]
        if old.name == "results.json":
            contents = [content["variants"] for content in contents]
        yield from _json(*contents, "")
    elif old.suffix == ".parquet":
        if not pq.read_table(old).equals(pq.read_table(new)):
            yield ": other rows"
    elif old.suffix == ".safetensors":
        yield from _tensors(load_file(old), load_file(new))
    elif old.read_bytes() != new.read_bytes():
        yield ": other bytes"


def _tensors(old: dict[str, torch.Tensor], new: dict[str, torch.Tensor]) -> Iterator[str]:
    for name in sorted(old.keys() | new.keys()):
        if name not in old or name not in new:
            yield f": {name} in one of the two only"
        elif old[name].dtype != new[name].dtype or old[name].shape != new[name].shape:
            yield f": {name} has another type or shape"
        elif not torch.equal(_bytes(old[name]), _bytes(new[name])):
            count = int((_bytes(old[name]) != _bytes(new[name])).sum())
            yield f": {name} differs in {count} bytes"


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _json(old: Any, new: Any, place: str) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted((old.keys() | new.keys()) - _OF_A_RUN):
            yield from _json(old.get(key), new.get(key), f"{place}.{key}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from _json(one, other, f"{place}[{number}]")
    elif old != new:
        yield f": {place.removeprefix('.')} {str(old)[:40]} became {str(new)[:40]}"


def main() -> int:
    """Entry point; returns the exit code."""
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    found = differences(*map(Path, sys.argv[1:]))
    print("\n".join(found) if found else "equal")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
