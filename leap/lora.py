"""LoRA adapters merged into a pruned model without losing its zeros."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from leap.sparse_training import Masks, masks_of
from leap.surgery import prunable_linears


@torch.no_grad()
def merge_lora(model: Any, masks: Masks | None = None) -> PreTrainedModel:
    """Merge the adapters of a model of the package peft into its pruned weights, and set these to zero where they were.

    What the adapters would add to pruned weights is dropped, so the merged model computes a little differently from the
    one with adapters.

    Args:
        model: what ``peft.get_peft_model`` or ``PeftModel.from_pretrained`` gave.
        masks: which weights to keep. None: those that are not zero without the adapters.

    Returns:
        The model under the adapters, without them.

    Raises:
        ValueError: ``model`` has no adapters, nothing is pruned, or the adapters are merged already and ``masks`` None.
    """
    base = model.get_base_model() if hasattr(model, "merge_and_unload") else model
    layers = {name: module for name, module in base.named_modules() if hasattr(module, "get_base_layer")}
    if not layers or base is model:
        raise ValueError(f"{type(model).__name__} has no adapters to merge: give the model that peft wrapped")
    if masks is None and (merged := [name for name, layer in layers.items() if getattr(layer, "merged", False)]):
        raise ValueError(
            f"the adapter is merged into {merged[0]} already, which left no zeros: call unmerge_adapter() first, or "
            "give masks"
        )
    kept = masks_of(_weights(base), masks, type(base).__name__)
    plain: PreTrainedModel = model.merge_and_unload()
    for name, linear in prunable_linears(plain).items():
        if name in kept:
            linear.weight.masked_fill_(~kept[name], 0)
    return plain


def _weights(base: nn.Module) -> dict[str, Tensor]:
    """Weights of the linear layers under the adapters, by the names that they have without these."""
    weights = {}
    for name, module in base.named_modules():
        layer = module.get_base_layer() if hasattr(module, "get_base_layer") else module
        if isinstance(layer, nn.Linear) and ".base_layer" not in name and ".lora_" not in name:
            weights[name] = layer.weight
    return weights
