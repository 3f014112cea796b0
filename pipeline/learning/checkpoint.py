"""Checkpoints of logits and optimiser state in a layout of our own: safetensors, one file per worker.

DeepSpeed's own checkpoints are pickled and bound to the number of workers. Here worker r of w stores, for every layer,
the slice [r·p, (r+1)·p) of the flattened tensor with p = ⌈numel / w⌉; any number of workers can read any slice back.
``latest.json`` is written last and names the checkpoint that is whole.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import fsspec
import torch
import torch.distributed as dist
from fsspec.implementations.local import LocalFileSystem
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.storage import write_atomically

LATEST = "latest.json"


def bounds(numel: int, rank: int, world: int) -> tuple[int, int]:
    """Where the slice of worker ``rank`` of ``world`` begins and ends."""
    part = -(-numel // world)
    return min(rank * part, numel), min((rank + 1) * part, numel)


def save(
    uri: str, step: int, facts: dict[str, Any], shard: dict[str, Tensor], shapes: dict[str, list[int]], keep: int = 2
) -> None:
    """Collective: write this worker's ``shard`` ({layer}.{part} → flat slice), then, on rank 0, ``latest.json``.

    Args:
        facts: what else has to be known to continue, as JSON.
        keep: how many checkpoints to leave in place.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    fs, root = fsspec.core.url_to_fs(uri)
    name = f"step-{step:06d}"
    file = f"{root}/{name}/rank-{rank:04d}-of-{world:04d}.safetensors"
    fs.makedirs(f"{root}/{name}", exist_ok=True)
    if isinstance(fs, LocalFileSystem):
        save_file(shard, file)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            save_file(shard, f"{scratch}/shard")
            fs.put_file(f"{scratch}/shard", file)
    dist.barrier()
    if rank == 0:
        text = json.dumps({"checkpoint": name, "step": step, "world": world, "shapes": shapes, **facts})
        if isinstance(fs, LocalFileSystem):
            write_atomically(Path(root) / LATEST, text)
        else:
            fs.pipe_file(f"{root}/{LATEST}", text.encode())
        for old in sorted(p for p in fs.ls(root, detail=False) if Path(p).name.startswith("step-"))[:-keep]:
            fs.rm(old, recursive=True)
    dist.barrier()


class Checkpoint:
    """The last whole checkpoint below ``uri``."""

    def __init__(self, uri: str) -> None:
        self._fs, self._root = fsspec.core.url_to_fs(uri)
        self._copies: str | None = None
        self.facts: dict[str, Any] = json.loads(self._fs.cat_file(f"{self._root}/{LATEST}"))
        self.step: int = self.facts["step"]
        self.shapes: dict[str, list[int]] = self.facts["shapes"]
        self._world: int = self.facts["world"]
        self._open: dict[int, Any] = {}

    @staticmethod
    def find(uri: str) -> Checkpoint | None:
        """The checkpoint, or none where nothing was saved yet."""
        fs, root = fsspec.core.url_to_fs(uri)
        return Checkpoint(uri) if fs.exists(f"{root}/{LATEST}") else None

    def _file(self, rank: int) -> Any:
        if rank not in self._open:
            path = f"{self._root}/{self.facts['checkpoint']}/rank-{rank:04d}-of-{self._world:04d}.safetensors"
            if not isinstance(self._fs, LocalFileSystem):
                self._copies = self._copies or tempfile.mkdtemp()
                local = f"{self._copies}/{rank}"
                self._fs.get_file(path, local)
                path = local
            try:
                self._open[rank] = safe_open(path, framework="pt")
            except Exception as error:
                raise RuntimeError(f"checkpoint file {path} cannot be read: {error}; delete {self._root}") from error
        return self._open[rank]

    def flat(self, layer: str, part: str, first: int, last: int) -> Tensor:
        """Elements ``first`` … ``last`` − 1 of a flattened tensor, whoever stored them."""
        numel = _numel(self.shapes[layer])
        pieces = []
        for rank in range(self._world):
            low, high = bounds(numel, rank, self._world)
            a, b = max(first, low), min(last, high)
            if a < b:
                pieces.append(self._file(rank).get_slice(f"{layer}.{part}")[a - low : b - low])
        return torch.cat(pieces) if pieces else torch.empty(0)

    def shard(self, layer: str, part: str, rank: int, world: int) -> Tensor:
        """The slice of worker ``rank`` of ``world``."""
        return self.flat(layer, part, *bounds(_numel(self.shapes[layer]), rank, world))

    def logits(self, layer: str) -> Tensor:
        """The whole logits [out, in] of a layer."""
        return self.flat(layer, "logits", 0, _numel(self.shapes[layer])).view(self.shapes[layer])

    def close(self) -> None:
        self._open.clear()
        if self._copies:
            shutil.rmtree(self._copies)


def _numel(shape: list[int]) -> int:
    return int(torch.Size(shape).numel())
