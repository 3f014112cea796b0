"""Masks at one bit per weight, in a file that is laid out as safetensors are.

A mask [out, in] is stored as uint8 [⌈out·in / 8⌉]: row-major, the lowest bit first, 1 = kept. The file's metadata holds
the shapes, whatever identifies the model the masks belong to, and a hash of the whole file. Equal masks and facts make
equal files, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

#: Name of the file beside the weights of an exported model. No engine takes one with this suffix for weights.
FILE_NAME = "masks.leap"
#: Its name in exports of version 0.1.0.
OLD_FILE_NAME = "masks.safetensors"
#: The one key of the metadata: safetensors writes several in random order.
_KEY = "leap-masks"
_VERSION = 2
#: What version 0.1.0 wrote: a key for each of ``format``, ``shapes`` and ``about``, and no hash.
_UNCHECKED = "leap-masks-1"
#: Stands for the hash while the file is hashed.
_NO_HASH = "0" * 64


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
    facts = {"version": _VERSION, "sha256": _NO_HASH, "shapes": shapes, "about": about}
    save_file(tensors, path, metadata={_KEY: json.dumps(facts)})
    digest = _hash(path, _NO_HASH)
    with path.open("r+b") as file:
        file.seek(_header(path).index(_NO_HASH.encode()))
        file.write(digest.encode())


def _header(path: Path) -> bytes:
    """What stands before the tensors."""
    with path.open("rb") as file:
        length = file.read(8)
        return length + file.read(int.from_bytes(length, "little"))


def _hash(path: Path, digest: str) -> str:
    """SHA-256 of a file with zeros in place of the first ``digest`` in its header."""
    header = _header(path)
    found = hashlib.sha256(header.replace(digest.encode(), _NO_HASH.encode(), 1))
    with path.open("rb") as file:
        file.seek(len(header))
        while chunk := file.read(1 << 20):
            found.update(chunk)
    return found.hexdigest()


def _checked(path: Path, text: str | None) -> dict[str, Any]:
    """The facts in the metadata of a file that is what was written."""
    if text is None:
        raise ValueError(f"{path} is not a mask file of format {_KEY}")
    try:
        facts: dict[str, Any] = json.loads(text)
        whole = _hash(path, facts["sha256"]) == facts["sha256"]
        version = facts["version"]
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(f"{path} was altered, its hash does not fit")
    if version != _VERSION:
        raise ValueError(f"{path} is of format {version}, which a newer version of this package reads")
    return facts


def mask_file_in(directory: Path) -> Path | None:
    """The mask file of a pruned model's directory, if it has one."""
    return next((path for name in (FILE_NAME, OLD_FILE_NAME) if (path := directory / name).exists()), None)


class MaskFile:
    """Reads a file that :func:`save_masks` wrote, layer by layer.

    Args:
        path: the file, or the directory of a pruned model that holds it as ``masks.leap``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is something else, cut off or altered.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        if path.is_dir():
            path = mask_file_in(path) or path / FILE_NAME
        try:
            self._file = safe_open(path, framework="pt")
            metadata = self._file.metadata() or {}
        except SafetensorError as error:
            raise ValueError(f"{path} is not a mask file: {error}") from error
        if metadata.get("format") == _UNCHECKED:
            metadata = {name: json.loads(metadata[name]) for name in ("shapes", "about")}
        else:
            metadata = _checked(path, metadata.get(_KEY))
        self.shapes: dict[str, list[int]] = metadata["shapes"]
        self.about: dict[str, Any] = metadata["about"]

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
