"""Exact masks → a Hugging Face directory with zeros and ``masks.leap``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from leap.export import export, zeros
from leap.stream_export import StreamExport, stored_zeros
from leap.surgery import prunable_linears
from pipeline.model import loading
from pipeline.model.sizes import Sizes
from pipeline.stages.cost import Cost, Machine
from pipeline.stages.source import MaskSource, variant_name
from pipeline.stages.stage import PinnedModel, Stage

_LAYERS = "sparsity.json"


@dataclass(frozen=True)
class Exported:
    """A pruned model on disk."""

    directory: Path
    """On this machine."""
    real_sparsity: float
    """What was counted in the written weights, over the prunable ones."""
    weights_changed: bool
    """Whether kept weights differ from the dense model's."""
    sparsity_per_layer: dict[str, float]
    """By full module name, in model order."""


@dataclass(frozen=True, eq=False)
class Harden(Stage[Exported]):
    """The export of one variant."""

    KIND = PHASE = "harden"
    VERSION = 2

    model: PinnedModel
    method: str
    """Name of the variant without seed and sparsity."""
    seed: int | None
    """Of the learning run, where there are others that differ in nothing else."""
    sparsity: float
    source: MaskSource[Any]
    """Holds its mask at this sparsity, and new weights where there are any."""

    @property
    def item(self) -> str:
        return variant_name(self.method, self.seed, self.sparsity)

    def inputs(self) -> list[object]:
        return [self.source.key]

    def cost(self, sizes: Sizes, machine: Machine) -> Cost:  # noqa: ARG002 - of Stage
        return Cost(disk=sizes.export)

    def run(self) -> None:
        """Write the pruned model, and count its zeros."""
        model = self.model.config
        checkpoint, dtype = loading.checkpoint(model), getattr(torch, model.dtype)
        tokenizer = loading.load_tokenizer(model)
        about = {
            "model": model.source,
            "revision": model.revision,
            "model_hash": loading.identity(model),
            "method": self.method,
            "sparsity": self.sparsity,
            "scope": self.source.scope,
            "pattern": self.source.pattern,
        }
        with self.directory.work() as (directory, facts), StreamExport(checkpoint, dtype) as streamed:
            # Zeros are counted in what was written, not in what was meant.
            if streamed.possible:
                pruned, changed = self.source.pruned(streamed.layers, self.sparsity)
                layers = streamed.write(tokenizer, pruned, directory, about)
                zero, numel = stored_zeros(loading.checkpoint(model, directory))
            else:
                loaded = loading.load(checkpoint, model)
                pruned, changed = self.source.pruned(prunable_linears(loaded), self.sparsity)
                layers = export(loaded, tokenizer, pruned, directory, about)
                zero, numel = zeros(loading.load_model(model, directory))
            (directory / _LAYERS).write_text(json.dumps(layers, indent=1))
            facts |= {
                **about,
                "weights_changed": changed,
                "real_sparsity": zero / numel,
                "prunable_parameters": numel,
            }

    def read(self) -> Exported:
        directory, facts = self.directory.path(), self.facts
        layers: dict[str, float] = json.loads((directory / _LAYERS).read_text())
        return Exported(directory, facts["real_sparsity"], facts["weights_changed"], layers)
