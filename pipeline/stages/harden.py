"""Logits or a layer-wise result → exact masks → a Hugging Face directory with zeros and ``masks.safetensors``."""

from __future__ import annotations

import json
from typing import Any

from torch import nn

from leap.export import Pruned, export, zeros
from leap.scopes import Scope
from leap.surgery import prunable_linears
from pipeline import models
from pipeline.config import ModelConfig
from pipeline.stages.prior import PriorArtifact, learned_masks
from pipeline.storage import StageDir

VERSION = 1
LAYERS = "sparsity.json"


def run(
    stage: StageDir,
    model: ModelConfig,
    method: str,
    sparsity: float,
    scope: Scope,
    source: StageDir,
    weights: StageDir | None,
) -> dict[str, Any]:
    """Export one variant.

    Args:
        source: a finished ``learn``, ``prior`` or ``reconstruct`` stage.
        scope: within what the sparsity is exact; a prior's masks are taken as they are.
        weights: the ``prior`` stage whose new weights the mask was learned over.
    """
    loaded = models.load_model(model)
    linears = prunable_linears(loaded)
    about = {
        "model": model.source,
        "revision": model.revision,
        "model_hash": models.identity(model),
        "method": method,
        "sparsity": sparsity,
        "scope": scope,
        "pattern": "unstructured",
    }
    with stage.work() as (directory, facts):
        if source.stage == "learn":
            pruned, changed = _learned(source, linears, sparsity, scope, weights)
        else:
            pruned, changed = _layer_wise(source)
        layers = export(loaded, models.load_tokenizer(model), pruned, directory, about)
        (directory / LAYERS).write_text(json.dumps(layers, indent=1))
        zero, numel = zeros(models.load_model(model, directory))  # of what was written, not of what was meant
        facts |= {**about, "weights_changed": changed, "real_sparsity": zero / numel, "prunable_parameters": numel}
    return stage.manifest() or {}


def _learned(
    source: StageDir, linears: dict[str, nn.Linear], sparsity: float, scope: Scope, weights: StageDir | None
) -> tuple[Pruned, bool]:
    masks = learned_masks(source, list(linears), sparsity, scope)
    if weights is None:
        return (lambda number, name: (masks(number, name), None)), False
    prior = PriorArtifact(weights.path())
    return (lambda number, name: (masks(number, name), prior.new_weight(name, linears[name].weight))), True


def _layer_wise(source: StageDir) -> tuple[Pruned, bool]:
    prior = PriorArtifact(source.path())
    changed = bool((source.manifest() or {})["changes_weights"])
    return (lambda _, name: (prior.layer(name)[0], prior.weight(name))), changed
