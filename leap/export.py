"""Pruned models as plain Hugging Face directories, dense with zeros."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from leap.checkpoint import untie
from leap.packed import FILE_NAME, OLD_FILE_NAME, save_masks
from leap.surgery import prunable_linears, undo_rescaling
from leap.weight_index import index_single_file

#: Gives a layer's mask (bool [out, in]) and, where weights were changed, its new weight, by number and name. An export
#: asks twice, first layer by layer for the weights and then for the mask file, so that nobody holds all masks at once.
Pruned = Callable[[int, str], tuple[Tensor, Tensor | None]]


@torch.no_grad()
def apply_masks(model: nn.Module, pruned: Pruned) -> dict[str, float]:
    """Set pruned weights of ``model`` to zero, in place. Returns the sparsity of each layer by name.

    Raises:
        ValueError: a mask is not boolean or not of its weight's shape, or a new weight is not of that shape or not
            finite in the model's dtype. The layers before it are pruned by then.
    """
    sparsity = {}
    for number, (name, linear) in enumerate(prunable_linears(model).items()):
        mask, weight = check_pruned(name, linear.weight, *pruned(number, name))
        if weight is not None:
            linear.weight.copy_(weight)
        linear.weight.masked_fill_(~mask, 0)
        sparsity[name] = 1 - int(mask.count_nonzero()) / mask.numel()
    return sparsity


def check_pruned(name: str, dense: Tensor, mask: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Mask and new weight of a layer on the device of its dense weight, the weight in its dtype.

    Raises:
        ValueError: see :func:`apply_masks`.
    """
    if mask.shape != dense.shape or mask.dtype != torch.bool:
        raise ValueError(f"{name}: mask {mask.dtype} {list(mask.shape)} for a weight {list(dense.shape)}")
    if weight is not None:
        if weight.shape != dense.shape:
            raise ValueError(f"{name}: new weight {list(weight.shape)} for {list(dense.shape)}")
        weight = weight.to(dense)
        if not torch.isfinite(weight).all():
            raise ValueError(f"{name}: the new weight holds NaN or Inf")
    return mask.to(dense.device), weight


def export(
    model: PreTrainedModel, tokenizer: Any, pruned: Pruned, directory: Path, about: dict[str, Any]
) -> dict[str, float]:
    """Write the pruned model, its tokenizer and ``masks.leap``; ``model`` is pruned in place.

    Args:
        tokenizer: None writes a directory without one.
        about: facts for the mask file, see :func:`leap.packed.save_masks`.

    Returns:
        The sparsity of each layer by name.

    Raises:
        ValueError: see :func:`apply_masks`; nothing is written then.
    """
    sparsity = apply_masks(model, pruned)
    undo_rescaling(model)
    _say_untied(model)
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    index_single_file(directory)
    (directory / OLD_FILE_NAME).unlink(missing_ok=True)  # of an export before this one
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    masks = ((name, pruned(number, name)[0]) for number, name in enumerate(sparsity))
    save_masks(directory / FILE_NAME, masks, about)
    return sparsity


def check_exportable(model: PreTrainedModel) -> None:
    """Make sure, before anything is learned, that a model can be written; one that was read from GGUF is made so.

    The weights of such a model were dequantised in loading: only a note on where they came from forbids saving them.

    Raises:
        ValueError: its weights are quantised.
    """
    quantiser = getattr(model, "hf_quantizer", None)
    quantised = getattr(model.config, "quantization_config", None)
    if quantiser is None and quantised is None:
        return
    method = quantised.get("quant_method") if isinstance(quantised, dict) else getattr(quantised, "quant_method", None)
    method = getattr(method, "value", method)
    if method != "gguf" or getattr(quantiser, "packed_modules", None):
        raise ValueError(
            f"{type(model).__name__}: its weights are quantised ({method}); give the model that it was made from"
        )
    if quantiser is not None:
        quantiser.remove_quantization_config(model)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _say_untied(model: PreTrainedModel) -> None:
    """Correct a configuration that ties the head to the embedding where the model has two; servers go by it."""
    head = model.get_output_embeddings()
    if getattr(head, "weight", None) is not model.get_input_embeddings().weight:
        untie(model.config)


@torch.no_grad()
def zeros(model: nn.Module) -> tuple[int, int]:
    """Zeros among the prunable weights of a model, and how many weights those are."""
    weights = [linear.weight for linear in prunable_linears(model).values()]
    return sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)
