"""Checkpoints of logits and optimiser state in a layout of our own: safetensors, one file per worker.

DeepSpeed's own checkpoints are pickled and bound to the number of workers. Here worker r of w stores, for every tensor,
the slice [r·p, (r+1)·p) of the flattened tensor with p = ⌈numel / w⌉; any number of workers can read any slice back.
The files lie in ``step-NNNNNN/``, and ``step-NNNNNN.json`` beside it, written last, says what they are, with checksums.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

import fsspec
import torch
import torch.distributed as dist
from fsspec.implementations.local import LocalFileSystem
from safetensors import SafetensorError, safe_open
from torch import Tensor

from leap.tensor_file import spec, write_tensors
from pipeline.artifacts import checksums
from pipeline.artifacts.checksums import FILES
from pipeline.artifacts.store import write_atomically
from pipeline.errors import DamagedError

FOLDER = "checkpoints"
"""Below the directory of a learning run."""
_UNCHECKED = "latest.json"
"""What version 0.1.0 wrote in place of ``step-NNNNNN.json``, with no checksums."""


def bounds(numel: int, rank: int, world: int) -> tuple[int, int]:
    """Where the slice of worker ``rank`` of ``world`` begins and ends."""
    part = -(-numel // world)
    return min(rank * part, numel), min((rank + 1) * part, numel)


def save(
    uri: str, step: int, facts: dict[str, Any], shard: dict[str, Tensor], shapes: dict[str, list[int]], keep: int = 2
) -> None:
    """Collective: write this worker's ``shard`` ({tensor}.{part} → flat slice), then, on rank 0, what it all is.

    Slices are read where they lie, one after the other: no second copy of them is made.

    Args:
        facts: what else has to be known to continue, as JSON.
        keep: how many checkpoints to leave in place.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    fs, root = fsspec.core.url_to_fs(uri)
    name = f"step-{step:06d}"
    file = f"{name}/{_file_name(rank, world)}"
    fs.makedirs(f"{root}/{name}", exist_ok=True)
    if isinstance(fs, LocalFileSystem):
        _write(f"{root}/{file}", shard)
        mine = {file: checksums.entry(f"{root}/{file}")}
    else:
        with tempfile.TemporaryDirectory() as scratch:
            _write(f"{scratch}/shard", shard)
            mine = {file: checksums.entry(f"{scratch}/shard")}
            fs.put_file(f"{scratch}/shard", f"{root}/{file}")
    written: list[dict[str, Any]] = [{}] * world
    dist.all_gather_object(written, mine)  # also waits until all are through
    if rank == 0:
        files = {path: found for each in written for path, found in each.items()}
        text = checksums.seal({"step": step, "world": world, "shapes": shapes, FILES: files, **facts})
        if isinstance(fs, LocalFileSystem):
            write_atomically(Path(root) / f"{name}.json", text)
        else:
            fs.pipe_file(f"{root}/{name}.json", text.encode())
        for old in _names(fs, root)[keep:]:
            _remove(fs, root, old)
    dist.barrier()


def _write(path: str, shard: dict[str, Tensor]) -> None:
    write_tensors(path, {name: spec(tensor) for name, tensor in shard.items()}, shard.__getitem__)


def resume(uri: str) -> tuple[Checkpoint | None, list[DamagedError]]:
    """The newest whole checkpoint below ``uri``, if there is one; newer damaged ones are deleted and named.

    It reads all of it. Of several workers one does this, and the others open the same by its step.
    """
    fs, root = fsspec.core.url_to_fs(uri)
    damaged: list[DamagedError] = []
    for name in _names(fs, root):
        try:
            found = Checkpoint(uri, name)
            found.check()
            return found, damaged
        except DamagedError as error:
            damaged.append(error)
            _remove(fs, root, name)
    return None, damaged


def _names(fs: fsspec.AbstractFileSystem, root: str) -> list[str]:
    """The checkpoints in a directory, the newest first; whether they are whole is not looked at."""
    if not fs.exists(root):
        return []
    inside = [Path(path).name for path in fs.ls(root, detail=False, refresh=True)]
    names = [name.removesuffix(".json") for name in inside if name.startswith("step-") and name.endswith(".json")]
    return sorted(names, reverse=True) or [name for name in inside if name == _UNCHECKED]


def _remove(fs: fsspec.AbstractFileSystem, root: str, name: str) -> None:
    if name != _UNCHECKED:
        fs.rm_file(f"{root}/{name}.json")
        if fs.exists(f"{root}/{name}"):
            fs.rm(f"{root}/{name}", recursive=True)


def _file_name(rank: int, world: int) -> str:
    return f"rank-{rank:04d}-of-{world:04d}.safetensors"


class Checkpoint:
    """A checkpoint below ``uri``. Its files are compared with their checksums when they are first read.

    Args:
        name: ``step-NNNNNN``; none: the newest, which is that of the end where the run is finished.

    Raises:
        FileNotFoundError: there is none.
        DamagedError: it is not what was written. Reading raises that, too.
    """

    def __init__(self, uri: str, name: str | None = None) -> None:
        self._fs, self._root = fsspec.core.url_to_fs(uri)
        self._uri = uri
        name = name or next(iter(_names(self._fs, self._root)), None)
        if name is None:
            raise FileNotFoundError(f"no checkpoint in {uri}")
        self.name = name
        about = name if name == _UNCHECKED else f"{name}.json"
        text = self._fs.cat_file(f"{self._root}/{about}")
        try:
            self.facts: dict[str, Any] = checksums.unseal(text)
        except ValueError:
            raise self._damage(about) from None
        self.step: int = self.facts["step"]
        self.shapes: dict[str, list[int]] = self.facts["shapes"]
        self._world: int = self.facts["world"]
        self._files: dict[str, dict[str, Any]] = self.facts.get(FILES, {})
        self._all_files = self._files | ({about: checksums.entry_of_bytes(text)} if self._files else {})
        self._open: dict[int, Any] = {}
        self._copies = ""

    @staticmethod
    def find(uri: str) -> Checkpoint | None:
        """The newest checkpoint whose facts can be read, or none; its files are not looked at."""
        fs, root = fsspec.core.url_to_fs(uri)
        for name in _names(fs, root):
            try:
                return Checkpoint(uri, name)
            except DamagedError:
                continue
        return None

    def check(self) -> None:
        """Read all files and compare them with their checksums."""
        for rank in range(self._world):
            self._file(rank)

    def files(self) -> dict[str, dict[str, Any]]:
        """Size and checksum of each file, by its path below the run's directory, for the run's manifest."""
        return {f"{FOLDER}/{path}": found for path, found in self._all_files.items()}

    def _damage(self, file: str) -> DamagedError:
        return DamagedError(self._uri.removesuffix(f"/{FOLDER}"), f"{FOLDER}/{file}")

    def _file(self, rank: int) -> Any:
        if rank not in self._open:
            folder = self.facts.get("checkpoint", self.name)
            name = f"{folder}/{_file_name(rank, self._world)}"
            path = f"{self._root}/{name}"
            try:
                if not isinstance(self._fs, LocalFileSystem):
                    path = self._fetched(name)
                if self._files and self._files[name] != checksums.entry(path):
                    raise self._damage(name)
                self._open[rank] = safe_open(path, framework="pt")
            except (OSError, KeyError, SafetensorError):
                raise self._damage(name) from None
        return self._open[rank]

    def _fetched(self, name: str) -> str:
        """A local copy of a file, for as long as this object lives."""
        if not self._copies:
            self._copies = tempfile.mkdtemp()
            weakref.finalize(self, shutil.rmtree, self._copies, ignore_errors=True)
        path = f"{self._copies}/{Path(name).name}"
        self._fs.get_file(f"{self._root}/{name}", path)
        return path

    def flat(self, name: str, part: str, first: int, last: int) -> Tensor:
        """Elements ``first`` … ``last`` − 1 of a flattened tensor's part, whoever stored them."""
        numel = _numel(self.shapes[name])
        pieces = []
        for rank in range(self._world):
            low, high = bounds(numel, rank, self._world)
            a, b = max(first, low), min(last, high)
            if a < b:
                pieces.append(self._file(rank).get_slice(f"{name}.{part}")[a - low : b - low])
        return torch.cat(pieces) if pieces else torch.empty(0)

    def shard(self, name: str, part: str, rank: int, world: int) -> Tensor:
        """The slice of worker ``rank`` of ``world``."""
        return self.flat(name, part, *bounds(_numel(self.shapes[name]), rank, world))

    def logits(self, name: str) -> Tensor:
        """A whole logit tensor, in its shape."""
        return self.flat(name, "logits", 0, _numel(self.shapes[name])).view(self.shapes[name])


def _numel(shape: list[int]) -> int:
    return int(torch.Size(shape).numel())
