"""What is computed decoder block by decoder block: layer-wise scores and masks, and new weights for a learned mask."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from leap.harden import exact_hardener
from leap.layerwise import METHODS, LayerResult, Target, reconstruct_sweep, sweep
from leap.packed import pack, unpack
from leap.scopes import LayerScope, Scope
from leap.surgery import decoder_blocks, linears_by_block, prunable_linears
from pipeline import models
from pipeline.config import Method, ModelConfig, PriorConfig
from pipeline.learning.checkpoint import FOLDER, Checkpoint
from pipeline.rows import PackedRows
from pipeline.storage import StageDir

VERSION = 2
_INDEX = "index.json"


def run(
    stage: StageDir,
    method: Method,
    sparsity: float,
    scope: LayerScope,
    prior: PriorConfig,
    model: ModelConfig,
    calibration: StageDir,
    seed: int,
) -> dict[str, Any]:
    """Prune the model with one method at one sparsity; scores and masks, one file per decoder block.

    Args:
        scope: within what the method compares weights, where there is no pattern.
    """
    chosen = METHODS[method]
    loaded = _load(model)
    rows = None if chosen.needs == "none" else _rows(calibration, prior, seed)
    target = Target(sparsity, scope, prior.pattern)
    with stage.work() as (directory, facts):
        results = sweep(
            loaded,
            rows,
            method,
            target,
            batch_rows=prior.batch_rows,
            device=_device(),
            spill_dir=_spill_dir(prior),
            options=prior.options.get(method),
        )
        _write(directory, loaded, chosen.changes_weights, _block_by_block(loaded, model, results))
        facts |= {
            "method": method,
            "sparsity": sparsity,
            "scope": prior.scope_name(method, scope),
            "changes_weights": chosen.changes_weights,
        }
        facts["rows"] = 0 if rows is None else len(rows)
    return stage.manifest() or {}


def reconstruct(
    stage: StageDir,
    source: StageDir,
    sparsity: float,
    scope: Scope,
    prior: PriorConfig,
    model: ModelConfig,
    calibration: StageDir,
    seed: int,
) -> dict[str, Any]:
    """New values for the weights that a learned mask keeps, written like the result of a layer-wise method.

    Args:
        source: a finished ``learn`` stage.
        prior: how many rows, and how many at a time.
    """
    loaded = _load(model)
    names = list(prunable_linears(loaded))
    masks = learned_masks(source, names, sparsity, scope)
    with stage.work() as (directory, facts):
        results = reconstruct_sweep(
            loaded,
            _rows(calibration, prior, seed),
            lambda name: masks(names.index(name), name),
            batch_rows=prior.batch_rows,
            device=_device(),
            spill_dir=_spill_dir(prior),
        )
        _write(directory, loaded, True, _block_by_block(loaded, model, results))
        facts |= {"sparsity": sparsity, "scope": scope, "changes_weights": True}
    return stage.manifest() or {}


def learned_masks(source: StageDir, names: list[str], sparsity: float, scope: Scope) -> Callable[[int, str], Tensor]:
    """Exact masks [out, in] of a ``learn`` stage, by number and name of a layer.

    Args:
        names: all layers in model order.
    """
    checkpoint = Checkpoint(source.uri_of(FOLDER))

    def logits() -> Iterable[Tensor]:
        return (checkpoint.logits(name) for name in names)

    hardener = exact_hardener(logits, sparsity, scope)
    return lambda number, name: hardener.mask(number, checkpoint.logits(name))


def _load(config: ModelConfig) -> PreTrainedModel:
    """The model as its files hold it, but what stands outside the decoder blocks, in the number type asked for."""
    model = models.load_stored_model(config)
    inside = {id(parameter) for parameter in decoder_blocks(model)[1].parameters()}
    for parameter in model.parameters():
        if id(parameter) not in inside:
            parameter.data = parameter.data.to(getattr(torch, config.dtype))
    return model


def _block_by_block(
    model: PreTrainedModel, config: ModelConfig, results: Iterator[tuple[str, LayerResult]]
) -> Iterator[tuple[str, LayerResult]]:
    """Pass on the results of a sweep over a model of :func:`_load`, of which one block at a time is held in memory.

    A block's weights are converted, or read, before the sweep comes to it, and dropped when all its results are taken.
    """
    for block, linears in zip(decoder_blocks(model)[1], linears_by_block(model), strict=True):
        block.to(getattr(torch, config.dtype))
        yield from itertools.islice(results, len(linears))
        block.to("meta")


def _rows(calibration: StageDir, prior: PriorConfig, seed: int) -> Tensor:
    packed = PackedRows(calibration.path(), shuffle=seed)
    return torch.from_numpy(packed.take(0, min(prior.rows, len(packed))))


def _spill_dir(prior: PriorConfig) -> Path | None:
    return Path(tempfile.gettempdir()) if prior.spill else None


def _device() -> str | None:
    return "cuda" if torch.cuda.is_available() else None  # one decoder block at a time


def _write(
    directory: Path, model: PreTrainedModel, keep_weights: bool, results: Iterable[tuple[str, LayerResult]]
) -> None:
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

    def new_weight(self, name: str, dense: Tensor) -> Tensor:
        """The method's new values where it keeps a weight, ``dense`` [out, in] elsewhere."""
        weight = self._get(name, "weight")
        assert weight is not None
        return torch.where(self.layer(name)[0], weight.to(dense), dense)
