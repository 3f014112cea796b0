"""How large a model and its artifacts are, from the model's configuration alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM

from leap.surgery import prunable_linears
from pipeline import models
from pipeline.config import RunConfig


@dataclass(frozen=True)
class Sizes:
    """Parameters, and bytes on disk."""

    parameters: int
    prunable: int
    export: int
    """A pruned model with its mask file."""
    scores: int
    """Scores and mask of one layer-wise method."""
    logits: int
    """A checkpoint of logits and Adam's moments."""


def measure(config: RunConfig) -> Sizes:
    """Build the model without memory for its weights and count."""
    architecture = models.load_config(config.model)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture, trust_remote_code=config.model.trust_remote_code)
    parameters = sum(p.numel() for p in model.parameters())
    prunable = sum(linear.weight.numel() for linear in prunable_linears(model).values())
    width = getattr(torch, config.model.dtype).itemsize
    return Sizes(parameters, prunable, parameters * width + prunable // 8, prunable * 2 + prunable // 8, prunable * 12)
