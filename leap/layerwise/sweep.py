"""Pruning a whole causal LM with a layer-wise method, decoder block by decoder block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leap.layerwise.activations import Activations, on_device
from leap.layerwise.base import LayerResult, Needs, compute_dtype
from leap.layerwise.collect import collect_statistics
from leap.layerwise.reconstruct import reconstruct
from leap.layerwise.selection import Target
from leap.layerwise.statistics import InputStatistics
from leap.methods import METHODS
from leap.surgery import decoder_blocks, linears_by_block, prunable_linears


def sweep(
    model: nn.Module,
    rows: Tensor | None,
    method: str,
    target: Target,
    *,
    batch_rows: int = 8,
    device: torch.device | str | None = None,
    spill_dir: Path | None = None,
    options: dict[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[str, LayerResult]]:
    """Prunes every linear layer of the decoder blocks in turn, in place.

    The inputs of a block come from the already pruned blocks before it; within a block, all layers see the inputs that
    the block's dense weights give. A layer is installed in the model as soon as it is pruned: its weight (the new
    values, for methods that change weights) with zeros where the mask is False. Whoever needs the dense weights later
    keeps a copy. Results of a block arrive together, in module order, and an iteration that is broken off leaves whole
    blocks pruned and the rest dense.

    Memory, besides the model: the hidden states of all rows once (or a file in ``spill_dir``), and the statistics and
    results of one block.

    Args:
        model: a Hugging Face causal LM; put in eval mode until the iterator ends.
        rows: token ids [rows, seq], full rows without padding; methods that need no inputs ignore them, and take None.
        method: key of ``METHODS``.
        target: of each layer.
        batch_rows: rows in one forward.
        device: where to bring one block at a time for forwards and pruning; None works where the model is.
        spill_dir: folder for a temporary file that holds the hidden states.
        options: keyword arguments of the method; with ``precision="float64"`` the statistics are float64 too.
        progress: called with (layers pruned, layers in all) after each layer.

    Yields:
        (dotted name, result). ``result.weight`` is the model's parameter, already pruned; all tensors are where the
        layer's weight is at home.

    Raises:
        ValueError: at the call, for an unknown method or option, missing or misshapen rows, or columns that an N:M
            target does not divide; at the first step, for a model whose blocks cannot be run one by one.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    chosen = METHODS[method]
    chosen.check_options(options or {})
    for name, linear in prunable_linears(model).items():
        try:
            target.check_columns(linear.in_features)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    if chosen.needs != "none":
        _check_rows(method, rows, batch_rows)

    def prune(_name: str, weight: Tensor, stats: InputStatistics | None) -> LayerResult:
        return chosen(weight, stats, target, **options or {})

    return _sweep(
        model,
        rows,
        chosen.name,
        chosen.needs,
        prune,
        dtype=compute_dtype((options or {}).get("precision", "float32")),
        batch_rows=batch_rows,
        device=torch.device(device) if device is not None else None,
        spill_dir=spill_dir,
        progress=progress,
    )


def reconstruct_sweep(
    model: nn.Module,
    rows: Tensor,
    masks: Callable[[str], Tensor],
    *,
    damping: float = 1.0,
    batch_rows: int = 8,
    device: torch.device | str | None = None,
    spill_dir: Path | None = None,
) -> Iterator[tuple[str, LayerResult]]:
    """New values for the weights that given masks keep, by :func:`leap.layerwise.reconstruct.reconstruct`.

    Each layer's output, on inputs that come from the already reconstructed blocks before it, is fitted to that of its
    dense weights. Order, memory and the state that the model is left in are those of :func:`sweep`.

    Args:
        model, rows, batch_rows, device, spill_dir: as for :func:`sweep`.
        masks: gives the mask (bool [out, in], True = keep) of a layer by its dotted name.
        damping: see ``reconstruct``. A learned mask has been fitted to the dense weights it keeps, all layers together;
            the more a layer is fitted on its own, the more of that is lost, so the default is a hundred times that of a
            single layer.

    Yields:
        (dotted name, result); the result's score is the magnitude of the new weights.

    Raises:
        ValueError: as for :func:`sweep`, and for a mask that is not of its weight's shape.
    """
    _check_rows("reconstruction", rows, batch_rows)

    def fit(name: str, weight: Tensor, stats: InputStatistics | None) -> LayerResult:
        assert stats is not None
        mask = masks(name).to(weight.device)
        new = reconstruct(weight, mask, stats.gram, damping=damping)
        return LayerResult(mask, new, new.abs().float())

    return _sweep(
        model,
        rows,
        "reconstruction",
        "gram",
        fit,
        batch_rows=batch_rows,
        device=torch.device(device) if device is not None else None,
        spill_dir=spill_dir,
        progress=None,
    )


def _check_rows(method: str, rows: Tensor | None, batch_rows: int) -> None:
    if rows is None:
        raise ValueError(f"{method} needs calibration rows")
    if rows.ndim != 2 or rows.numel() == 0:
        raise ValueError(f"rows must be token ids [rows, seq], at least one, got shape {list(rows.shape)}")
    if batch_rows < 1:
        raise ValueError(f"batch_rows must be at least 1, got {batch_rows}")


@torch.no_grad()
def _sweep(
    model: nn.Module,
    rows: Tensor | None,
    method: str,
    needs: Needs,
    prune: Callable[[str, Tensor, InputStatistics | None], LayerResult],
    *,
    dtype: torch.dtype = torch.float32,
    batch_rows: int,
    device: torch.device | None,
    spill_dir: Path | None,
    progress: Callable[[int, int], None] | None,
) -> Iterator[tuple[str, LayerResult]]:
    _, blocks = decoder_blocks(model)
    total = len(prunable_linears(model))
    done = 0
    was_training = model.training
    model.eval()
    try:
        activations = None
        if needs != "none" and rows is not None:
            activations = Activations(model, blocks, rows, batch_rows=batch_rows, device=device, spill_dir=spill_dir)
        for index, (block, linears) in enumerate(zip(blocks, linears_by_block(model), strict=True)):
            results: dict[str, LayerResult] = {}
            with on_device(block, device):
                statistics: dict[str, InputStatistics] = {}
                if activations is not None:
                    assert needs != "none"
                    with collect_statistics(linears, needs, dtype) as statistics:
                        activations.run(block, index, advance=False)
                for name, linear in linears.items():
                    results[name] = _install(name, linear, method, statistics.pop(name, None), prune)
                    done += 1
                    if progress is not None:
                        progress(done, total)
                if activations is not None and index + 1 < len(blocks):
                    activations.run(block, index, advance=True)
            for name, linear in linears.items():
                result = results.pop(name)
                home = linear.weight.device
                yield name, LayerResult(result.mask.to(home), linear.weight.detach(), result.score.to(home))
    finally:
        model.train(was_training)


def _install(
    name: str,
    linear: nn.Linear,
    method: str,
    stats: InputStatistics | None,
    prune: Callable[[str, Tensor, InputStatistics | None], LayerResult],
) -> LayerResult:
    try:
        result = prune(name, linear.weight.detach(), stats)
    except (ValueError, torch.linalg.LinAlgError) as error:  # numbers that are too large, mostly
        raise ValueError(f"{name}, {method}: {error}") from error
    except Exception as error:
        error.add_note(f"while pruning {name} with {method}")
        raise
    linear.weight.copy_(torch.where(result.mask, result.weight, 0))
    # Newly computed weights now live in the model; keeping them here too would double a block's memory.
    return result._replace(weight=linear.weight)
