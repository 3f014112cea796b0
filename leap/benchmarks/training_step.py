"""One training step of a masked model, and of the same model with plain weight gradients, to be timed or measured."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from leap.engine import LocalEngine
from leap.gates import PriorMask
from leap.learner import MaskLearner
from leap.losses import output_losses
from leap.masked_linear import install_masks, logit_tensors
from leap.optimisers import Updater
from leap.settings import LearnSettings, Optimiser
from leap.surgery import prunable_linears


def plain_step(model: PreTrainedModel, rows: Tensor, own_loss: bool = False) -> Callable[[], None]:
    """Forward and backward pass with gradients of the prunable weights, which are dropped; no optimiser.

    Args:
        own_loss: the cross-entropy that a masked step computes, in place of the model's own.
    """
    model.requires_grad_(False)
    weights = [linear.weight.requires_grad_() for linear in prunable_linears(model).values()]

    def step() -> None:
        if own_loss:
            output_losses(model(input_ids=rows, use_cache=False).logits, rows)[0].backward()
        else:
            model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
        for weight in weights:
            weight.grad = None

    return step


def masked_step(
    model: PreTrainedModel,
    rows: Tensor,
    noise: bool,
    optimiser: Optimiser | None = None,
    microbatches: int = 1,
    matrix_rate: float = 0.0,
    distillation: float = 0.0,
) -> Callable[[], None]:
    """Forward and backward pass with gradients of the logits; masks are installed in ``model`` for good.

    Args:
        optimiser: moves the logits too; without one their gradients are dropped.
        distillation: share of the loss that takes a forward pass of the dense model.
    """
    settings = LearnSettings.published(
        steps=1000,
        batch_rows=microbatches,
        weight_reward=0.0,
        clip=0.0,  # the logits move inside backward, as they do with the project's own settings
        optimiser=optimiser or "adam",
        matrix_rate=matrix_rate,
        distillation=distillation,
    ).with_family(noise=noise)
    gate, updater = settings.family.gate(), Updater(settings)
    state, layers = install_masks(model, gate)
    for layer in layers.values():
        device = layer.weight.device
        keep = torch.rand(layer.weight.shape, device=device) > 0.5
        prior = PriorMask(layer.matrix, keep, keep.float())
        first = gate.initial(layer.matrix.name, [prior], torch.Generator(device).manual_seed(0))
        layer.provide([nn.Parameter(first.to(updater.optimiser.dtype))])
    engine = LocalEngine(
        lambda r: model(input_ids=r, use_cache=False).logits, state, layers, updater if optimiser else None
    )
    learner = MaskLearner(engine, settings, [0.5])

    def step() -> None:
        for number in range(microbatches):
            updater.begin(0, 1e-3, number, microbatches)
            learner.loss(rows, 0, number).backward()
        for parameter in logit_tensors(layers).values():
            parameter.grad = None

    return step
