"""Writes safetensors files tensor by tensor, so that what is written need not be in memory, or on the CPU, at once.

The library's own writer takes all tensors of a file together and a copy of each that lies on a GPU. The format: eight
bytes with the length of a JSON header (little-endian), the header with dtype, shape and place of each tensor, the data.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from os import PathLike

import torch
from torch import Tensor

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
#: Dtype and shape of a tensor.
Spec = tuple[torch.dtype, torch.Size]


def spec(tensor: Tensor) -> Spec:
    """Dtype and shape of ``tensor``."""
    return tensor.dtype, tensor.shape


def write_tensors(
    path: str | PathLike[str],
    specs: Mapping[str, Spec],
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file.

    Tensors of wide dtypes come first, so that each one is aligned; else the order of ``specs`` is kept.

    Args:
        specs: dtype and shape of each tensor by name.
        read: gives a tensor by name, on any device; called once for each, in the order of the file.
        metadata: text by key, for the header.

    Raises:
        ValueError: ``read`` gives a tensor of another dtype or shape, or a dtype is none of the format.
        OSError: the file cannot be written.
    """
    names = sorted(specs, key=lambda name: -specs[name][0].itemsize)
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        dtype, shape = specs[name]
        if dtype not in _NAMES:
            raise ValueError(f"{name}: a safetensors file does not hold {dtype}")
        begin, end = end, end + shape.numel() * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = read(name)
            if spec(tensor) != specs[name]:
                raise ValueError(f"{name}: {tensor.dtype} {list(tensor.shape)} is not the tensor that was announced")
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
