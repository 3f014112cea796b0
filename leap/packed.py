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
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

#: Name of the file beside the weights of an exported model.
FILE_NAME = "masks.safetensors"
_FORMAT = "leap-masks-1"


def pack(mask: Tensor) -> Tensor:
    """uint8 [⌈numel / 8⌉] on the CPU from a boolean mask of any shape, on any device."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1), bitorder="little"))


def unpack(bits: Tensor, shape: torch.Size | list[int]) -> Tensor:
    """The boolean mask of ``shape`` on the CPU, from what :func:`pack` gave.

    Raises:
        ValueError: ``bits`` are not bytes, or their number does not fit the shape.
    """
    size = torch.Size(shape)
    if bits.dtype != torch.uint8 or bits.numel() != -(-size.numel() // 8):
        raise ValueError(f"{bits.numel()} × {bits.dtype} do not hold a mask of shape {list(shape)}")
    flat = np.unpackbits(bits.cpu().numpy().reshape(-1), count=size.numel(), bitorder="little")
    return torch.from_numpy(flat.view(np.bool_)).view(size)


def save_masks(path: Path, masks: Iterator[tuple[str, Tensor]], about: dict[str, Any]) -> None:
    """Write masks, (dotted name of the layer, bool [out, in]), with the facts ``about`` them.

    Args:
        about: model, revision, hash, method, sparsity, pattern; anything that JSON holds.
    """
    tensors, shapes = {}, {}
    for name, mask in masks:
        tensors[name], shapes[name] = pack(mask), list(mask.shape)
    metadata = {"format": _FORMAT, "shapes": json.dumps(shapes), "about": json.dumps(about)}
    save_file(tensors, path, metadata=metadata)


class MaskFile:
    """Reads a file that :func:`save_masks` wrote, layer by layer.

    Args:
        path: the file, or the directory of a pruned model that holds it as ``masks.safetensors``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is something else.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        if path.is_dir():
            path /= FILE_NAME
        try:
            self._file = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{path} is not a mask file: {error}") from error
        metadata = self._file.metadata() or {}
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"{path} is not a mask file of format {_FORMAT}")
        self.shapes: dict[str, list[int]] = json.loads(metadata["shapes"])
        self.about: dict[str, Any] = json.loads(metadata["about"])

    def __getitem__(self, layer: str) -> Tensor:
        """Boolean mask [out, in] of a layer. Raises KeyError where the file has none of this name."""
        shape = self.shapes[layer]
        return unpack(self._file.get_tensor(layer), shape)

    def __len__(self) -> int:
        return len(self.shapes)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Layers in the order they were written."""
        return ((name, self[name]) for name in self.shapes)
