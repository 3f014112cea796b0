"""The result of a layer-wise method, decoder block by decoder block: masks, scores and, for some, new weights."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from leap.layerwise import LayerResult
from leap.packed import pack, unpack
from leap.surgery import decoder_blocks

_INDEX = "index.json"


def write(
    directory: Path, model: PreTrainedModel, keep_weights: bool, results: Iterable[tuple[str, LayerResult]]
) -> None:
    """Write the results of a sweep over ``model``, one file per decoder block.

    Args:
        keep_weights: whether the results have new weights, which are written too.
    """
    writer = _BlockWriter(directory, decoder_blocks(model)[0], keep_weights)
    for name, result in results:
        writer.add(name, result)
    writer.close()


class _BlockWriter:
    """Holds the results of one decoder block at a time."""

    def __init__(self, directory: Path, prefix: str, keep_weights: bool) -> None:
        self._directory, self._prefix, self._keep_weights = directory, prefix, keep_weights
        self._block = ""
        self._tensors: dict[str, Tensor] = {}
        self._index: dict[str, dict[str, Any]] = {}

    def add(self, name: str, result: LayerResult) -> None:
        block = name.removeprefix(self._prefix + ".").split(".")[0]
        if block != self._block:
            self._flush()
            self._block = block
        self._index[name] = {"file": f"block-{int(block):04d}.safetensors", "shape": list(result.mask.shape)}
        self._tensors[f"{name}.mask"] = pack(result.mask)
        # Scores are used for their order only; bfloat16 keeps their range at half the size.
        self._tensors[f"{name}.score"] = result.score.to(torch.bfloat16).contiguous()
        if self._keep_weights:
            self._tensors[f"{name}.weight"] = result.weight.detach().clone().contiguous()

    def _flush(self) -> None:
        if self._tensors:
            save_file(self._tensors, self._directory / f"block-{int(self._block):04d}.safetensors")
            self._tensors = {}

    def close(self) -> None:
        self._flush()
        (self._directory / _INDEX).write_text(json.dumps(self._index))


class PriorArtifact:
    """Reads the result of a prior stage layer by layer."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._index: dict[str, dict[str, Any]] = json.loads((directory / _INDEX).read_text())

    def _get(self, name: str, part: str) -> Tensor | None:
        with safe_open(self._directory / self._index[name]["file"], framework="pt") as file:
            key = f"{name}.{part}"
            return file.get_tensor(key) if key in file.keys() else None  # noqa: SIM118 - not a dict

    def layer(self, name: str) -> tuple[Tensor, Tensor]:
        """Mask (bool) and score (bfloat16) of a layer, both [out, in]."""
        bits, score = self._get(name, "mask"), self._get(name, "score")
        assert bits is not None
        assert score is not None
        return unpack(bits, self._index[name]["shape"]), score

    def weight(self, name: str) -> Tensor | None:
        """The layer's new weight [out, in], zero where it is pruned; None where the method changes no weights."""
        return self._get(name, "weight")

    def pruned(self, number: int, name: str) -> tuple[Tensor, Tensor | None]:
        """Mask and new weight of a layer, as :data:`leap.export.Pruned` has them; its number plays no part."""
        del number
        return self.layer(name)[0], self.weight(name)

    def new_weight(self, name: str, dense: Tensor) -> Tensor:
        """The method's new values where it keeps a weight, ``dense`` [out, in] elsewhere."""
        weight = self._get(name, "weight")
        assert weight is not None
        return torch.where(self.layer(name)[0], weight.to(dense), dense)
