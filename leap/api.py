"""Pruning a Hugging Face model in a notebook: one process, no pipeline.

    result = leap.prune("Qwen/Qwen2.5-0.5B", texts, sparsity=0.5)
    result.save("pruned/")

The steps are those of the pipeline: a layer-wise prior, masks learned on frozen weights, an exact hard mask.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from leap.budget import Budget
from leap.checkpoint import Checkpoint, CheckpointError, attempt
from leap.engine import LocalEngine
from leap.export import apply_masks, check_exportable, export, zeros
from leap.gates import Gate, Layout, PriorMask
from leap.heldout import heldout_loss
from leap.hidden import with_hidden_states
from leap.layerwise import LayerResult, Target, sweep
from leap.learner import MaskLearner
from leap.loop import Rows, learn
from leap.masked_linear import layout_of, masks_installed, provide_logits
from leap.model_card import model_card
from leap.optimisers import Updater
from leap.packed import pack, unpack
from leap.scopes import layer_scope
from leap.settings import LearnSettings
from leap.surgery import BlockWeights, block_weights, check_finite, check_runs, linears_by_block, prunable_linears
from leap.texts import Text, token_rows

_ROW_LENGTH = 512
_HELDOUT_TOKENS = 1 << 18
"""As many are measured at most."""


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
    tokenizer: Any = None
    """The model's, as far as it is known."""
    text: str = ""
    """How much of what it was learned from."""
    perplexity: dict[str, float] = field(default_factory=dict)
    """On the held-out text, ``dense`` and ``pruned``; empty where there was none."""

    @property
    def block_sparsity(self) -> float:
        """Share of zeros among all weights of the decoder blocks, those that stay dense too."""
        zero, _ = zeros(self.model)
        return zero / self.blocks.total

    def mask(self, layer: str) -> Tensor:
        """Boolean mask [out, in] of a layer."""
        return unpack(self.packed_masks[layer], self.model.get_submodule(layer).weight.shape)  # type: ignore[arg-type]

    def export(self, directory: str | Path, tokenizer: Any = None) -> None:
        """Write a Hugging Face directory, dense with zeros, and ``masks.leap``.

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

    def save(self, directory: str | Path) -> None:
        """Write all that others need: :meth:`export` with the tokenizer, and a model card (``README.md``)."""
        directory = Path(directory)
        self.export(directory, self.tokenizer)
        (directory / "README.md").write_text(model_card(self, str(directory)))

    def push_to_hub(self, name: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload what :meth:`save` writes to the Hugging Face hub.

        Args:
            name: of the repository, ``user/model``; it is made if there is none.
            token: of the hub; by default that of ``hf auth login``.

        Returns:
            The address of the model.
        """
        api = HfApi(token=token)
        created = api.create_repo(name, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as directory:
            self.save(directory)
            (Path(directory) / "README.md").write_text(model_card(self, created.repo_id))
            api.upload_folder(repo_id=created.repo_id, folder_path=directory, commit_message="Pruned with LEAP")
        return str(created)


def prune(
    model: PreTrainedModel | str | Path,
    text: Text,
    *,
    sparsity: float,
    steps: int | None = None,
    tokens: int | None = None,
    heldout: Text | None = None,
    tokenizer: Any = None,
    text_field: str = "text",
    row_length: int | None = None,
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
        model: any causal LM whose decoder blocks hold ``nn.Linear`` layers; or a Hugging Face directory or hub name,
            which is loaded to the GPU if there is one.
        text: strings, a ``datasets.Dataset`` of texts, or token ids: rows [R, S] without padding, or documents.
            Learning goes through it in order and over again.
        sparsity: share of the prunable weights in the decoder blocks to remove, in [0, 1).
        steps: how many optimiser steps to make. With neither these nor ``tokens``, one for every 8 rows, 100 to 1000.
        tokens: how many tokens to learn from, in about 150 steps.
        heldout: text to measure the perplexity on, before and after; none is measured without.
        tokenizer: for strings; by default the one that lies with the model.
        text_field: column of a data set that holds the text.
        row_length: tokens in a row made of texts; by default 512, or as many as the model takes.
        settings: of the learning, in place of ``steps`` and ``tokens``.
        prior_rows: how many of the rows the layer-wise prior looks at.
        prior_options: keyword arguments of the prior's method.
        prior: what :func:`layerwise_prior` returned for this model, sparsity and prior, to save its time.
        allow_dense: prune a model of whose blocks a good part stays dense, such as one with fused experts.
        on_step: called with the metrics of each step. A progress bar is shown unless those of transformers are off.

    Raises:
        ValueError: a text, sparsity or an option that cannot be used; a model that cannot be exported, without decoder
            blocks to prune, with an adapter attached, with weights that are not finite, with less than nine tenths of
            its blocks prunable, or with layers that do not run once in a forward pass.
        CheckpointError: the model that ``model`` names cannot be loaded, or is not whole.
        NonFiniteLossError: the loss became NaN or infinite.
    """
    budget = Budget(steps, tokens)
    if settings is not None and budget != Budget():
        raise ValueError("give steps or tokens, or settings, which have steps of their own")
    if not isinstance(model, PreTrainedModel):
        model = _load(model)
    check_exportable(model)
    blocks = block_weights(model)
    if not allow_dense and (reason := blocks.refusal()):
        raise ValueError(f"{type(model).__name__}: {reason}; say allow_dense=True to prune what can be")
    check_finite(model.named_parameters())
    for linear in prunable_linears(model).values():
        linear.weight.data = linear.weight.data.contiguous()  # as the kernels want it; a transposed view is not
    if tokenizer is None:
        tokenizer = _tokenizer_of(model)
    length = row_length or min(_ROW_LENGTH, getattr(model.config, "max_position_embeddings", None) or _ROW_LENGTH)
    rows_of = partial(token_rows, tokenizer=tokenizer, length=length, field=text_field)
    to_read = budget.tokens_to_read(length) if settings is None else settings.steps * settings.batch_rows * length
    rows = rows_of(text, tokens=to_read)
    perplexity = {}
    if heldout is not None:
        heldout = rows_of(heldout, tokens=_HELDOUT_TOKENS)
        perplexity["dense"] = math.exp(heldout_loss(model, heldout))
    if settings is None:
        settings = budget.settings(rows.shape[0], rows.shape[1], blocks.prunable, model.device)
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
    if heldout is not None:
        perplexity["pruned"] = math.exp(heldout_loss(model, heldout))
    learned = (
        f"{settings.steps * settings.batch_rows * rows.shape[1]:,} tokens from {len(rows)} rows of {rows.shape[1]}"
    )
    return PruneResult(
        model, sparsity, settings, layer_sparsity, history, masks, blocks, tokenizer, learned, perplexity
    )


def _load(source: str | Path) -> PreTrainedModel:
    """The model of a directory or hub name: on a GPU as it is stored, else in float32."""
    gpu = torch.cuda.is_available()
    model: Any = Checkpoint(source).load(dtype="auto" if gpu else torch.float32)
    return model.to("cuda") if gpu else model


def _tokenizer_of(model: PreTrainedModel) -> Any:
    """The tokenizer that lies where the model was loaded from, if there is one."""
    if not model.config.name_or_path:
        return None
    try:
        return attempt("the tokenizer", lambda: AutoTokenizer.from_pretrained(model.config.name_or_path))
    except CheckpointError:
        return None


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
    for linears in transformers_logging.tqdm(linears_by_block(model), desc="scoring weights", unit="block"):
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
            bar.set_postfix(_shown(metrics, learner.settings))
            if on_step is not None:
                on_step(metrics)

        learn(learner, rows, after_step)
    return history


def _shown(metrics: Mapping[str, float], settings: LearnSettings) -> dict[str, str]:
    """What a progress bar says of a step: losses as such, and apart from them what the density adds to the total.

    ``loss`` is the cross-entropy in nats with the soft masks, ``to dense`` the divergence from the dense model.
    """
    shown = {"loss": metrics["lm_loss"]}
    task = (1 - settings.distillation) * metrics["lm_loss"]
    for name, weight in (("divergence", settings.distillation), ("hidden_divergence", settings.hidden_distillation)):
        if name in metrics:
            task += weight * metrics[name]
    if "divergence" in metrics:
        shown["to dense"] = metrics["divergence"]
    shown |= {"density": metrics["density"], "density terms": metrics["loss"] - task}
    return {name: f"{value:.4f}" if name == "density" else f"{value:.3f}" for name, value in shown.items()}
