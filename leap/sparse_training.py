"""Zeros that stay zeros while a pruned model is trained on.

    keeper = leap.keep_sparse(model)   # then train as ever
    keeper.remove()

The gradient of a pruned weight is set to zero before anybody sees it: so clipping does not count it, an optimiser's
moments stay zero, and so do copies of the weights in another precision. After each step of an optimiser the weights are
masked again, for optimisers that move a weight without a gradient of its own.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import TrainerCallback

from leap.packed import MaskFile
from leap.surgery import prunable_linears

#: Masks by name of the layer, bool [out, in]; or the directory of an export, or its mask file.
Masks = Mapping[str, Tensor] | MaskFile | str | Path


def keep_sparse(model: nn.Module, masks: Masks | None = None) -> SparsityKeeper:
    """Keep the pruned weights of ``model`` at zero in training, until :meth:`SparsityKeeper.remove`.

    Works with any ``torch.optim.Optimizer``, with Hugging Face's Trainer (see :class:`KeepSparse` for a callback), DDP,
    FSDP2 and DeepSpeed's ZeRO: call it before they wrap the model. Takes a byte for each prunable weight on its device.

    Args:
        model: a causal LM with plain linear layers.
        masks: which weights to keep. None: those that are not zero now.

    Raises:
        ValueError: a mask fits no layer, nothing is pruned, or an adapter is attached (:func:`leap.merge_lora` is for
            those).
    """
    weights: dict[str, Tensor] = {name: linear.weight for name, linear in prunable_linears(model).items()}
    return SparsityKeeper(model, masks_of(weights, masks, type(model).__name__))


@torch.no_grad()
def masks_of(weights: Mapping[str, Tensor], masks: Masks | None, model: str) -> dict[str, Tensor]:
    """Masks of the layers that are pruned, each where its weight lies; of the zeros in ``weights`` if None are given.

    Args:
        weights: [out, in] by name of the layer.
        model: what errors call it.

    Raises:
        ValueError: a mask fits no layer, or nothing is pruned.
    """
    if isinstance(masks, str | Path):
        masks = MaskFile(masks)
    given = {name: weight != 0 for name, weight in weights.items()} if masks is None else dict(masks.items())
    for name, mask in given.items():
        if name not in weights:
            raise ValueError(f"the masks name {name}, which is no prunable layer of {model}")
        weight = weights[name]
        if mask.dtype != torch.bool or mask.shape != weight.shape:
            raise ValueError(f"{name}: mask {mask.dtype} {list(mask.shape)} for a weight {list(weight.shape)}")
        given[name] = mask.to(weight.device)
    pruned = {name: mask for name, mask in given.items() if not mask.all()}
    if not pruned:
        raise ValueError(f"{model} has no pruned weights to keep; give masks, or prune it first")
    return pruned


class SparsityKeeper:
    """What :func:`keep_sparse` attached to a model.

    Attributes:
        masks: bool [out, in] of each pruned layer, by its dotted name.
    """

    def __init__(self, model: nn.Module, masks: dict[str, Tensor]) -> None:
        self.masks = masks
        self._layers = [_MaskedLayer(model.get_submodule(name), mask) for name, mask in masks.items()]
        _mask_after_steps()
        _live.update(self._layers)
        self.apply()

    def apply(self) -> None:
        """Set the pruned weights to zero now. A sharded weight is masked in its own shard, without communication."""
        for layer in self._layers:
            layer.apply()

    def remove(self) -> None:
        """Detach from the model; what is zero stays as it is until somebody changes it."""
        for layer in self._layers:
            layer.remove()
            _live.discard(layer)
        self._layers.clear()

    def __enter__(self) -> SparsityKeeper:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


class KeepSparse(TrainerCallback):
    """:func:`keep_sparse` as a callback of Hugging Face's Trainer, for as long as it trains.

        Trainer(model, arguments, train_dataset=rows, callbacks=[leap.KeepSparse()])

    Args:
        masks: see :func:`keep_sparse`.
    """

    def __init__(self, masks: Masks | None = None) -> None:
        self._masks = masks
        self._keeper: SparsityKeeper | None = None

    def on_train_begin(self, *_: Any, **given: Any) -> None:
        self._keeper = keep_sparse(given["model"], self._masks)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        # DeepSpeed copies an optimiser's weights into the model after the optimiser's step.
        if self._keeper is not None:
            self._keeper.apply()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        if self._keeper is not None:
            self._keeper.apply()
            self._keeper.remove()
            self._keeper = None


class _MaskedLayer:
    """Masks the gradient of a layer's weight, and the weight on demand. Lives as a forward pre-hook of the layer."""

    def __init__(self, layer: nn.Module, mask: Tensor) -> None:
        self._layer, self._mask = layer, mask
        self._hooked: weakref.ref[Tensor] | None = None
        self._of_gradient: Any = None
        self._of_layer = layer.register_forward_pre_hook(self)

    def __call__(self, layer: nn.Module, _inputs: Any) -> None:
        # Looked up anew in each forward pass: FSDP puts another tensor in the weight's place.
        weight: Any = layer.weight
        if weight.requires_grad and (self._hooked is None or self._hooked() is not weight):
            self._of_gradient = weight.register_hook(lambda gradient: gradient.masked_fill(~self._on(gradient), 0))
            self._hooked = weakref.ref(weight)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model is hooked when it runs.
        return self.__dict__ | {"_hooked": None, "_of_gradient": None}

    @torch.no_grad()
    def apply(self) -> None:
        weight: Any = self._layer.weight
        if isinstance(weight, DTensor):
            local: Tensor = weight.to_local()
            mask = distribute_tensor(self._on(local), weight.device_mesh, weight.placements, src_data_rank=None)
            local.masked_fill_(~mask.to_local(), 0)
        elif hasattr(weight, "ds_tensor"):  # ZeRO-3: an even part of the flattened weight, padded at the end
            local = weight.ds_tensor.view(-1)
            start = torch.distributed.get_rank(weight.ds_process_group) * local.numel()
            part = self._on(local).reshape(-1)[start : start + local.numel()]
            local[: part.numel()].masked_fill_(~part, 0)
        else:
            weight.masked_fill_(~self._on(weight), 0)

    def remove(self) -> None:
        self._of_layer.remove()
        if self._of_gradient is not None:
            self._of_gradient.remove()

    def _on(self, tensor: Tensor) -> Tensor:
        """The mask, moved for good to where ``tensor`` lies: models are moved after they were masked."""
        if self._mask.device != tensor.device:
            self._mask = self._mask.to(tensor.device)
        return self._mask


#: The masked layers of all models that are kept sparse.
_live: weakref.WeakSet[_MaskedLayer] = weakref.WeakSet()


@functools.cache
def _mask_after_steps() -> None:
    """Once in a process: mask weights again whenever an optimiser of torch has made a step."""

    def apply(*_: Any) -> None:
        for layer in list(_live):
            layer.apply()

    register_optimizer_step_post_hook(apply)
