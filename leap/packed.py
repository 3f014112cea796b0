"""Masks at one bit per weight in a safetensors file.

A mask [out, in] is stored as uint8 [⌈out·in / 8⌉]: row-major, the lowest bit first, 1 = kept. The file's metadata holds
the shapes and whatever identifies the model the masks belong to.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


def pack(mask: Tensor) -> Tensor:
    """uint8 [⌈numel / 8⌉] from a boolean mask of any shape."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1), bitorder="little"))


def unpack(bits: Tensor, shape: torch.Size | list[int]) -> Tensor:
    """The boolean mask of ``shape``.

    Raises:
        ValueError: the number of bytes does not fit the shape.
    """
    numel = int(torch.Size(shape).numel())
    if bits.numel() != -(-numel // 8):
        raise ValueError(f"{bits.numel()} bytes do not hold a mask of shape {list(shape)}")
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=numel, bitorder="little").astype(bool)).view(*shape)


def save_masks(path: Path, masks: Iterator[tuple[str, Tensor]], about: dict[str, Any]) -> None:
    """Write masks, (dotted name of the layer, bool [out, in]), with the facts ``about`` them.

    Args:
        about: model, revision, hash, method, sparsity, pattern; anything that JSON holds.
    """
    tensors, shapes = {}, {}
    for name, mask in masks:
        tensors[name], shapes[name] = pack(mask), list(mask.shape)
    save_file(tensors, path, metadata={"format": "leap-masks-1", "shapes": json.dumps(shapes), "about": json.dumps(about)})


class MaskFile:
    """Reads a file that :func:`save_masks` wrote, layer by layer."""

    def __init__(self, path: Path) -> None:
        self._file = safe_open(path, framework="pt")
        metadata = self._file.metadata() or {}
        if metadata.get("format") != "leap-masks-1":
            raise ValueError(f"{path} is not a mask file of format leap-masks-1")
        self.shapes: dict[str, list[int]] = json.loads(metadata["shapes"])
        self.about: dict[str, Any] = json.loads(metadata["about"])

    def __getitem__(self, layer: str) -> Tensor:
        """Boolean mask [out, in] of a layer."""
        return unpack(self._file.get_tensor(layer), self.shapes[layer])

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Layers in the order they were written."""
        return ((name, self[name]) for name in self.shapes)
