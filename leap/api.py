"""Pruning a Hugging Face model in a notebook: one process, no pipeline.

    result = leap.prune(model, rows, sparsity=0.5)
    result.export("pruned/", tokenizer)

The steps are those of the pipeline: a layer-wise prior, masks learned on frozen weights, an exact hard mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from leap.engine import LocalEngine
from leap.export import apply_masks, export, zeros
from leap.gates import Gate, Layout, PriorMask
from leap.hidden import with_hidden_states
from leap.layerwise import LayerResult, Target, sweep
from leap.learner import MaskLearner
from leap.loop import Rows, learn
from leap.masked_linear import layout_of, masks_installed, provide_logits
from leap.optimisers import Updater
from leap.packed import pack, unpack
from leap.scopes import layer_scope
from leap.settings import LearnSettings
from leap.surgery import BlockWeights, block_weights, check_finite, check_runs, linears_by_block, prunable_linears


@dataclass(frozen=True)
class PruneResult:
    """A pruned model and how it came about."""

    model: PreTrainedModel
    """The model that was given: plain linear layers again, pruned weights zero."""
    sparsity: float
    """What was asked for."""
    settings: LearnSettings
    layer_sparsity: dict[str, float]
    """Sparsity of each pruned layer by dotted name."""
    history: list[dict[str, float]]
    """Metrics of each optimiser step; in the last one also the losses with the sampled, the mean and the hard mask."""
    packed_masks: dict[str, Tensor]
    """Mask of each layer at one bit per weight, see :mod:`leap.packed`."""
    blocks: BlockWeights
    """How much of the decoder blocks is prunable: what ``sparsity`` counts."""

    @property
    def block_sparsity(self) -> float:
        """Share of zeros among all weights of the decoder blocks, those that stay dense too."""
        zero, _ = zeros(self.model)
        return zero / self.blocks.total

    def mask(self, layer: str) -> Tensor:
        """Boolean mask [out, in] of a layer."""
        return unpack(self.packed_masks[layer], self.model.get_submodule(layer).weight.shape)  # type: ignore[arg-type]

    def export(self, directory: str | Path, tokenizer: Any = None) -> None:
        """Write a Hugging Face directory, dense with zeros, and ``masks.safetensors``.

        Weights that were changed since, by fine-tuning say, are masked again.
        """
        config = self.model.config
        about = {
            "model": config.name_or_path,
            "revision": getattr(config, "_commit_hash", None),
            "method": "leap",
            "sparsity": self.sparsity,
            "scope": self.settings.family.scope_name,
            "pattern": self.settings.family.pattern_name,
        }
        export(self.model, tokenizer, lambda _, name: (self.mask(name), None), Path(directory), about)


def prune(
    model: PreTrainedModel,
    rows: Tensor,
    *,
    sparsity: float,
    settings: LearnSettings | None = None,
    prior_rows: int = 128,
    prior_options: dict[str, Any] | None = None,
    prior: Mapping[str, LayerResult] | None = None,
    allow_dense: bool = False,
    on_step: Callable[[dict[str, float]], None] | None = None,
) -> PruneResult:
    """Learn which weights of ``model`` to keep, and set the others to zero, in place.

    Works where the model is, CPU or GPU, in its dtype, and needs 6 bytes more per prunable weight, for fp32 logits and
    Adam's moments, and another 4, for gradients, where a step has several micro-batches (``settings.optimiser`` tells
    what the others need). Interrupted or failed, it leaves the model dense as it was. With ``settings.weights`` on
    ``prior``, what is kept has the prior's values in the end.

    Args:
        model: any causal LM whose decoder blocks hold ``nn.Linear`` layers.
        rows: token ids [R, S] without padding. Training goes through them in order and over again.
        sparsity: share of the prunable weights in the decoder blocks to remove, in [0, 1).
        settings: of the learning; by default those that suit the model and its rows, see ``LearnSettings.for_rows``.
        prior_rows: how many of the rows the layer-wise prior looks at.
        prior_options: keyword arguments of the prior's method.
        prior: what :func:`layerwise_prior` returned for this model, sparsity and prior, to save its time.
        allow_dense: prune a model of whose blocks a good part stays dense, such as one with fused experts.
        on_step: called with the metrics of each step. A progress bar is shown unless those of transformers are off.

    Raises:
        ValueError: rows, sparsity or an option that cannot be used; a model without decoder blocks to prune, with an
            adapter attached, with weights that are not finite, with less than nine tenths of its blocks prunable, or
            with layers that do not run once in a forward pass.
        NonFiniteLossError: the loss became NaN or infinite.
    """
    if rows.ndim != 2 or rows.shape[0] < 1 or rows.shape[1] < 2 or rows.is_floating_point():
        raise ValueError(f"rows must be token ids [R, S] with S >= 2, not {rows.dtype} {list(rows.shape)}")
    blocks = block_weights(model)
    if not allow_dense and (reason := blocks.refusal()):
        raise ValueError(f"{type(model).__name__}: {reason}; say allow_dense=True to prune what can be")
    check_finite(model.named_parameters())
    for linear in prunable_linears(model).values():
        linear.weight.data = linear.weight.data.contiguous()  # as the kernels want it; a transposed view is not
    if settings is None:
        settings = LearnSettings.for_rows(len(rows), blocks.prunable)
    rows = rows.to(next(model.get_input_embeddings().parameters()).device)
    gate, updater = settings.family.gate(), Updater(settings)
    layout = layout_of(prunable_linears(model), gate)
    was_training = model.training
    model.eval()  # no dropout: the noise of the masks is the only one
    try:
        check_runs(model, rows[: settings.microbatch_rows])
        results = prior.items() if prior else _prior(model, rows[:prior_rows], settings, sparsity, prior_options)
        new_weights: dict[str, Tensor] = {}
        logits = _first_logits(gate, layout, results, settings, updater.optimiser.dtype, new_weights)
        with masks_installed(model, gate) as (state, layers):
            over = {name: nn.Parameter(weight, requires_grad=False) for name, weight in new_weights.items()}
            provide_logits(layers, logits, over)
            del logits
            engine = LocalEngine(
                lambda batch: model(input_ids=batch, use_cache=False).logits,
                state,
                layers,
                updater,
                partial(with_hidden_states, model),
            )
            learner, take = MaskLearner(engine, settings, [1 - sparsity]), _in_turn(rows)
            history = _learn(learner, take, on_step)
            hardener = learner.hardener(sparsity, exact=True)
            last = range((settings.steps - 1) * settings.batch_rows, settings.steps * settings.batch_rows)
            batches = [take(first, settings.microbatch_rows) for first in last[:: settings.microbatch_rows]]
            losses = learner.mask_losses(batches, settings.steps - 1, hardener)
            history[-1] |= {f"mask_loss.{mode}": loss for mode, loss in losses.items()}
            masks = {name: pack(hardener.mask(layer.matrix, layer.logits)) for name, layer in layers.items()}
    finally:
        model.train(was_training)
    shapes = {name: layer.weight.shape for name, layer in layers.items()}
    layer_sparsity = apply_masks(model, lambda _, name: (unpack(masks[name], shapes[name]), new_weights.get(name)))
    return PruneResult(model, sparsity, settings, layer_sparsity, history, masks, blocks)


def layerwise_prior(
    model: PreTrainedModel,
    rows: Tensor,
    *,
    sparsity: float,
    settings: LearnSettings,
    options: dict[str, Any] | None = None,
) -> dict[str, LayerResult]:
    """Mask, weight and score of each layer by the prior that ``settings`` names; leaves the model as it was.

    Args:
        rows: token ids [R, S] that the prior looks at.
        options: keyword arguments of the prior's method.
    """
    return dict(_prior(model, rows.to(model.device), settings, sparsity, options))


def _prior(
    model: PreTrainedModel, rows: Tensor, settings: LearnSettings, sparsity: float, options: dict[str, Any] | None
) -> Iterator[tuple[str, LayerResult]]:
    """Name and result of each layer, in module order; leaves the weights as they were.

    The weight of a result has the method's values where the mask keeps one, and the dense ones elsewhere.

    The sweep prunes in place, so that each block sees the pruned ones before it, but it is through with a block when it
    hands out the block's results: one block of dense weights is all that has to be kept.
    """
    target = Target(sparsity, layer_scope(settings.prior, settings.prior_scope), settings.family.pattern)
    results = sweep(model, rows, settings.prior, target, options=options)
    for linears in linears_by_block(model):
        dense = [linear.weight.detach().clone() for linear in linears.values()]
        try:
            of_block = [
                (name, result._replace(weight=torch.where(result.mask, result.weight, weight)))
                for weight, (name, result) in zip(dense, results, strict=False)
            ]
        finally:
            with torch.no_grad():
                for linear, weight in zip(linears.values(), dense, strict=True):
                    linear.weight.copy_(weight)
        yield from of_block


def _first_logits(
    gate: Gate,
    layout: Layout,
    results: Iterable[tuple[str, LayerResult]],
    settings: LearnSettings,
    dtype: torch.dtype,
    new_weights: dict[str, Tensor],
) -> dict[str, nn.Parameter]:
    """All logit tensors by name; ``new_weights`` is filled by layer, if settings have them.

    The prior's result for a layer is kept until all that read a tensor with it are through.
    """
    matrices = {matrix.name: matrix for matrix in layout.matrices}
    numbers = {name: number for number, name in enumerate(layout.shapes)}
    logits: dict[str, nn.Parameter] = {}
    waiting: dict[str, PriorMask] = {}
    for name, (mask, weight, score) in results:
        waiting[name] = PriorMask(matrices[name], mask, score)
        if settings.weights == "prior":
            new_weights[name] = weight
        for tensor in layout.reads[name]:
            readers = [reader.name for reader in layout.readers[tensor]]
            if all(reader in waiting for reader in readers):
                # The seeds of a pipeline run with seed 0.
                seed = (settings.seed * 1_000_003 + numbers[tensor]) % 2**63
                generator = torch.Generator(mask.device).manual_seed(seed)
                first = gate.initial(tensor, [waiting[reader] for reader in readers], generator)
                logits[tensor] = nn.Parameter(first.to(dtype))
        for done in [reader for reader in waiting if logits.keys() >= set(layout.reads[reader])]:
            del waiting[done]
    return logits


def _in_turn(rows: Tensor) -> Rows:
    """Consecutive rows, counted modulo the number of ``rows``."""
    return lambda first, count: rows[torch.arange(first, first + count, device=rows.device) % len(rows)]


def _learn(
    learner: MaskLearner, rows: Rows, on_step: Callable[[dict[str, float]], None] | None
) -> list[dict[str, float]]:
    """Optimise the logits under a progress bar; returns the metrics of all steps."""
    history: list[dict[str, float]] = []
    with transformers_logging.tqdm(total=learner.settings.steps, desc="learning masks", unit="step") as bar:

        def after_step(metrics: dict[str, float]) -> None:
            history.append(metrics)
            bar.update()
            bar.set_postfix(loss=f"{metrics['loss']:.3f}", density=f"{metrics['density']:.4f}")
            if on_step is not None:
                on_step(metrics)

        learn(learner, rows, after_step)
    return history
