"""Export from checkpoint to checkpoint, one tensor in memory at a time: what :func:`leap.export.export` writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.utils import SAFE_WEIGHTS_NAME

from leap.checkpoint import Checkpoint, StoredTensors, meta_model, tied_names
from leap.export import Pruned, check_pruned
from leap.packed import FILE_NAME, save_masks
from leap.surgery import prunable_linears, shared_linears
from leap.tensor_file import Spec, write_tensors
from leap.weight_index import write_index

#: A file of weights is closed before it would hold more; ``save_pretrained`` writes files of up to 50 GB.
SHARD_BYTES = 5 * 10**9


class StreamExport:
    """The export of a checkpoint whose tensors are stored as the model holds them.

    Args:
        checkpoint: the dense model.
        dtype: of the exported weights.
        shard_bytes: upper bound of a file of weights; a tensor is never split.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, shard_bytes: int = SHARD_BYTES) -> None:
        self._checkpoint, self._dtype, self._shard_bytes = checkpoint, dtype, shard_bytes
        self._model = meta_model(checkpoint.config, checkpoint.source, checkpoint.trust_remote_code)
        self._names = list(tied_names(self._model))
        self._stored = StoredTensors(checkpoint.files, self._model)
        self.layers: Mapping[str, nn.Linear] = _Layers(prunable_linears(self._model), self._read)
        """The prunable layers by name, in model order; a layer's dense weight is read when the layer is looked up."""

    def __enter__(self) -> StreamExport:
        return self

    def __exit__(self, *_: object) -> None:
        self._stored.__exit__()

    @property
    def possible(self) -> bool:
        """Whether the export is a matter of copying tensors.

        It is not where a tensor has another name in the files or is put together from several, where some stay in
        another dtype, where layers share a weight, and where code comes with the model.
        """
        model = self._model
        if getattr(model.config, "auto_map", None) or shared_linears(model):
            return False
        kept = (model._keep_in_fp32_modules, model._keep_in_fp32_modules_strict)
        if self._dtype != torch.float32 and any(kept):
            return False
        held = model.state_dict()
        if any(name in held and buffer.is_floating_point() for name, buffer in model.named_buffers()):
            return False
        return all(self._stored.as_stored(name) for name in self._names)

    def write(self, tokenizer: Any, pruned: Pruned, directory: Path, about: dict[str, Any]) -> dict[str, float]:
        """Write the pruned model, its tokenizer and its masks. Returns the sparsity of each layer by name.

        Args:
            tokenizer: None writes a directory without one.
            about: facts for the mask file, see :func:`leap.packed.save_masks`.

        Raises:
            ValueError: see :func:`leap.export.apply_masks`. Files of weights before that layer are written by then.
        """
        directory.mkdir(parents=True, exist_ok=True)
        numbers = {f"{name}.weight": (number, name) for number, name in enumerate(self.layers)}
        sparsity: dict[str, float] = {}

        def read(name: str) -> Tensor:
            tensor = self._read(name)
            if name not in numbers:
                return tensor
            number, layer = numbers[name]
            mask, weight = check_pruned(layer, tensor, *pruned(number, layer))
            sparsity[layer] = 1 - int(mask.count_nonzero()) / mask.numel()
            return (tensor if weight is None else weight).masked_fill(~mask, 0)

        held = self._model.state_dict()
        specs: dict[str, Spec] = {name: (self._dtype_of(held[name]), held[name].shape) for name in self._names}
        shards = list(_shards(specs, self._shard_bytes))
        files: dict[str, str] = {}
        for number, names in enumerate(shards, 1):
            file = SAFE_WEIGHTS_NAME if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            write_tensors(directory / file, {name: specs[name] for name in names}, read, {"format": "pt"})
            files |= dict.fromkeys(names, file)
        write_index(directory, files, sum(_bytes(spec) for spec in specs.values()))
        self._write_configuration(directory)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
        masks = ((name, pruned(number, name)[0]) for number, name in enumerate(self.layers))
        save_masks(directory / FILE_NAME, masks, about)
        return {name: sparsity[name] for name in self.layers}

    def _dtype_of(self, tensor: Tensor) -> torch.dtype:
        return self._dtype if tensor.is_floating_point() else tensor.dtype

    def _read(self, name: str) -> Tensor:
        tensor = self._stored.get(name)
        return tensor.to(self._dtype_of(tensor))

    def _write_configuration(self, directory: Path) -> None:
        config = self._model.config
        config.architectures = [type(self._model).__name__]
        config.dtype = self._dtype
        config.save_pretrained(directory)
        if self._model.can_generate():
            revision = self._checkpoint.revision or "main"  # of a hub name
            try:
                generation = GenerationConfig.from_pretrained(self._checkpoint.source, revision=revision)
            except OSError:  # the checkpoint has none
                generation = GenerationConfig.from_model_config(config)
            generation.save_pretrained(directory)


class _Layers(Mapping[str, nn.Linear]):
    """Linear layers without bias, whose weights [out, in] are read anew each time."""

    def __init__(self, shapes: Mapping[str, nn.Linear], read: Callable[[str], Tensor]) -> None:
        self._shapes, self._read = shapes, read

    def __getitem__(self, name: str) -> nn.Linear:
        shape = self._shapes[name]
        layer = nn.Linear(shape.in_features, shape.out_features, bias=False, device="meta")
        layer.weight = nn.Parameter(self._read(f"{name}.weight"), requires_grad=False)
        return layer

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


@torch.no_grad()
def stored_zeros(checkpoint: Checkpoint) -> tuple[int, int]:
    """Zeros among the prunable weights in the files of a model, and how many weights those are; read one by one."""
    model = meta_model(checkpoint.config, checkpoint.source, checkpoint.trust_remote_code)
    zero = numel = 0
    with StoredTensors(checkpoint.files, model) as stored:
        for name in prunable_linears(model):
            weight = stored.get(f"{name}.weight")
            zero, numel = zero + weight.numel() - int(weight.count_nonzero()), numel + weight.numel()
    return zero, numel


def _bytes(spec: Spec) -> int:
    dtype, shape = spec
    return shape.numel() * dtype.itemsize


def _shards(specs: dict[str, Spec], limit: int) -> Iterator[list[str]]:
    shard: list[str] = []
    size = 0
    for name, spec in specs.items():
        if shard and size + _bytes(spec) > limit:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += _bytes(spec)
    yield shard
