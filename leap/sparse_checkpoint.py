"""Sparse checkpoints: a model directory whose pruned layers are stored packed. ``kernels/README.md`` specifies it.

The tensors lie in safetensors shards; ``sparse.json``, written last, names each one's shard, dtype, shape and SHA-256.
The index that transformers knows lies beside it, and config.json names the quantiser, so that ``from_pretrained`` reads
the directory after ``import leap``, see :mod:`leap.quantiser`.
Writing holds one shard in memory, reading one tensor.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from leap_kernels import BMP128, pack
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from leap.checkpoint import Checkpoint, CheckpointError, StoredTensors, tied_names
from leap.packed import MaskFile, mask_file_in
from leap.sparse_format import FORMAT, METHOD, VERSION
from leap.surgery import prunable_linears, shared_linears
from leap.weight_index import write_index

INDEX = "sparse.json"
#: How a matrix may be packed, by the name that the index gives for each layer.
_MATRICES = {"BMP128": BMP128}
#: Version 1 named no format: there was none but this.
_FIRST = "BMP128"
#: A shard is closed when it holds this much; a tensor is never split.
SHARD_BYTES = 256 * 2**20
#: What makes the directory stand alone, besides the tensors.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.jinja",
    "*.py",  # code that comes with the model
)


class SparseCheckpointError(CheckpointError):
    """A sparse checkpoint that is incomplete, altered, or of another version; the message names the tensor."""


@dataclass(frozen=True)
class Entry:
    """What the index says of one tensor."""

    file: str
    dtype: str
    shape: list[int]
    sha256: str


def skeleton(config: Any, dtype: torch.dtype | None = None, trust_remote_code: bool = False) -> Any:
    """The model of a configuration without memory for its parameters; buffers (rotary frequencies, scales) are real."""
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def write_sparse(
    source: str | Path,
    target: str | Path,
    masks: MaskFile | None = None,
    *,
    trust_remote_code: bool = False,
) -> dict[str, int]:
    """Write the sparse checkpoint of a pruned model, tensor by tensor.

    Args:
        source: a Hugging Face directory with safetensors: an exported model, dense with zeros, or the dense one.
        target: the directory to write.
        masks: which weights to keep. None: the mask file in ``source`` if it has one, else the weights that are not 0.

    Returns:
        ``tensors``, ``packed`` layers and ``bytes`` that were written.

    Raises:
        ValueError: ``source`` lacks a tensor or has one too many, a mask does not fit, or two layers share one weight.
        FileExistsError: ``target`` holds a sparse checkpoint already.
    """
    source, target = Path(source), Path(target)
    if (target / INDEX).exists():
        raise FileExistsError(f"{target} holds a sparse checkpoint already")
    if masks is None and (file := mask_file_in(source)):
        masks = MaskFile(file)
    checkpoint = Checkpoint(source, trust_remote_code=trust_remote_code)
    model = skeleton(checkpoint.config, trust_remote_code=trust_remote_code)
    if shared := shared_linears(model):
        raise ValueError(f"{source}: {next(iter(shared))} shares its weight with another layer; these are not packed")
    weights = {f"{name}.weight" for name in prunable_linears(model)}
    if masks is not None and (strange := [name for name in masks if f"{name}.weight" not in weights]):
        raise ValueError(f"the masks name {strange[0]}, which is no prunable layer of {source}")
    target.mkdir(parents=True, exist_ok=True)
    writer = _ShardWriter(target)
    with StoredTensors(checkpoint.files, model) as dense:
        for name, aliases in tied_names(model).items():
            stored = next((alias for alias in aliases if alias in dense), None)
            if stored is None:
                raise ValueError(
                    f"{source}: {name} is put together from several tensors in loading; these are not packed"
                )
            tensor = dense.get(stored)
            if name not in weights:
                writer.add(name, tensor)
                continue
            layer = name.removesuffix(".weight")
            mask = masks[layer] if masks is not None and layer in masks else None
            try:
                packed = pack(tensor, mask)
            except ValueError as error:
                raise ValueError(f"{layer}: {error}") from error
            for part, value in packed.tensors().items():
                writer.add(f"{layer}.{part}", value)
    writer.close()
    for pattern in COMPANIONS:
        for path in source.glob(pattern):
            shutil.copyfile(path, target / path.name)
    if checkpoint.untied:
        checkpoint.config.save_pretrained(target)
    _name_quantiser(target / "config.json")
    write_index(target, {name: entry.file for name, entry in writer.entries.items()}, writer.bytes)
    index = {
        "format": FORMAT,
        "version": VERSION,
        "packed": dict.fromkeys(sorted(name.removesuffix(".weight") for name in weights), _FIRST),
        "tied": {alias: name for name, aliases in tied_names(model).items() for alias in aliases[1:]},
        "tensors": {name: asdict(entry) for name, entry in writer.entries.items()},
    }
    # Last, and by renaming: a directory without it is no checkpoint.
    (target / f".{INDEX}").write_text(json.dumps(index, indent=1))
    (target / f".{INDEX}").replace(target / INDEX)
    return {"tensors": len(writer.entries), "packed": len(weights), "bytes": writer.bytes}


class SparseCheckpoint:
    """Reads a directory that :func:`write_sparse` wrote.

    Attributes:
        packed: format of the weight of each packed layer, by dotted name.
        tied: names of tensors that are another one, by that other's name.

    Raises:
        SparseCheckpointError: no index, or one of another format or version.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        try:
            index = json.loads((self.directory / INDEX).read_text())
        except (OSError, ValueError) as error:
            raise SparseCheckpointError(f"{self.directory} has no readable {INDEX}: no sparse checkpoint") from error
        kind, version = index.get("format"), index.get("version")
        if kind != FORMAT or version not in (1, VERSION):
            newer = kind == FORMAT and isinstance(version, int) and version > VERSION
            raise SparseCheckpointError(
                f"{self.directory / INDEX} is {kind} {version}; this reads {FORMAT} 1 to {VERSION}"
                + (", a newer version of this package reads it" if newer else "")
            )
        packed = index["packed"]
        self.packed: dict[str, str] = dict.fromkeys(packed, _FIRST) if version == 1 else packed
        for layer, name in self.packed.items():
            if name not in _MATRICES:
                raise SparseCheckpointError(
                    f"{layer} is packed as {name}; this reads {', '.join(_MATRICES)}, a newer version of this package "
                    "reads it"
                )
        self.tied: dict[str, str] = index["tied"]
        self.entries = {name: Entry(**entry) for name, entry in index["tensors"].items()}

    @property
    def float_types(self) -> set[torch.dtype]:
        """The number types of weights, packed or not."""
        types = {getattr(torch, entry.dtype) for entry in self.entries.values()}
        return {found for found in types if found.is_floating_point}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every stored tensor with its name, in the order they were written, each checked against its hash.

        Raises:
            SparseCheckpointError: a tensor is missing, cut off, or not the one that was written.
        """
        with ExitStack() as stack:
            files: dict[str, Any] = {}
            for name, entry in self.entries.items():
                if entry.file not in files:
                    files[entry.file] = stack.enter_context(self._open(entry.file))
                yield name, self._checked(name, entry, files[entry.file].get_tensor)

    def matrix(self, layer: str, parts: dict[str, Tensor]) -> BMP128:
        """The packed weight of a layer from its tensors by their names in its format."""
        try:
            return _MATRICES[self.packed[layer]].from_tensors(parts)
        except ValueError as error:
            raise SparseCheckpointError(f"{layer}: {error}") from error

    def _open(self, file: str) -> Any:
        path = self.directory / file
        try:
            return safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise SparseCheckpointError(f"{self._first_unreadable(file)}: {path} is cut off or altered") from error

    def _first_unreadable(self, file: str) -> str:
        """The first tensor of a shard that lies beyond the file's end; the shard's first where even that is unknown."""
        inside = [name for name, entry in self.entries.items() if entry.file == file]
        try:
            with (self.directory / file).open("rb") as shard:
                length = int.from_bytes(shard.read(8), "little")
                header = json.loads(shard.read(length))
                size = shard.seek(0, 2) - 8 - length
            return next(name for name in inside if header[name]["data_offsets"][1] > size)
        except (OSError, ValueError, KeyError, StopIteration, OverflowError, MemoryError):
            return inside[0]

    def _checked(self, name: str, entry: Entry, read: Callable[[str], Tensor]) -> Tensor:
        try:
            tensor = read(name)
        except SafetensorError as error:
            raise SparseCheckpointError(f"{name}: missing from {self.directory / entry.file}") from error
        if (_dtype(tensor), list(tensor.shape)) != (entry.dtype, entry.shape) or _hash(tensor) != entry.sha256:
            raise SparseCheckpointError(f"{name}: {self.directory / entry.file} was altered, its hash does not fit")
        return tensor


def _name_quantiser(path: Path) -> None:
    """Say in a config.json which quantiser reads the weights; other engines refuse them by it."""
    config = json.loads(path.read_text())
    config["quantization_config"] = {"quant_method": METHOD, "format": FORMAT, "version": VERSION}
    path.write_text(json.dumps(config, indent=2) + "\n")


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _hash(tensor: Tensor) -> str:
    octets = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(octets.data).hexdigest()


class _ShardWriter:
    """Collects tensors until a shard is full."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._shard: dict[str, Tensor] = {}
        self._size = 0
        self._number = 1
        self.entries: dict[str, Entry] = {}
        self.bytes = 0

    @property
    def _file(self) -> str:
        return f"sparse-{self._number:05d}.safetensors"

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._shard and self._size + size > SHARD_BYTES:
            self.close()
        self.entries[name] = Entry(self._file, _dtype(tensor), list(tensor.shape), _hash(tensor))
        self._shard[name] = tensor.contiguous()
        self._size += size
        self.bytes += size

    def close(self) -> None:
        if self._shard:
            save_file(self._shard, self._directory / self._file, metadata={"format": "pt"})
            self._shard, self._size = {}, 0
            self._number += 1
