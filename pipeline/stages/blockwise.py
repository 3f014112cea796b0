"""What is shared by the work that goes through a model decoder block by decoder block."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from leap.layerwise import LayerResult
from leap.surgery import decoder_blocks, linears_by_block
from pipeline.artifacts.packed_rows import PackedRows
from pipeline.config import ModelConfig, PriorConfig
from pipeline.model import loading
from pipeline.model.sizes import Sizes
from pipeline.stages.calibrate import Calibrate


def load(config: ModelConfig) -> PreTrainedModel:
    """The model as its files hold it, but what stands outside the decoder blocks, in the number type asked for."""
    model = loading.load_stored_model(config)
    inside = {id(parameter) for parameter in decoder_blocks(model)[1].parameters()}
    for parameter in model.parameters():
        if id(parameter) not in inside:
            parameter.data = parameter.data.to(getattr(torch, config.dtype))
    return model


def block_by_block(
    model: PreTrainedModel, config: ModelConfig, results: Iterator[tuple[str, LayerResult]]
) -> Iterator[tuple[str, LayerResult]]:
    """Pass on the results of a sweep over a model of :func:`load`, of which one block at a time is held in memory.

    A block's weights are converted, or read, before the sweep comes to it, and dropped when all its results are taken.
    """
    for block, linears in zip(decoder_blocks(model)[1], linears_by_block(model), strict=True):
        block.to(getattr(torch, config.dtype))
        yield from itertools.islice(results, len(linears))
        block.to("meta")


def rows_of(calibration: Calibrate, prior: PriorConfig, seed: int) -> Tensor:
    """The calibration rows that statistics are taken from. int64 [R, S]"""
    packed = PackedRows(calibration.directory.path(), shuffle=seed)
    return torch.from_numpy(packed.take(0, min(prior.rows, len(packed))))


def spill_dir(prior: PriorConfig) -> Path | None:
    """Where hidden states go that are not to be held in memory."""
    return Path(tempfile.gettempdir()) if prior.spill else None


def device() -> str | None:
    """Where blocks are worked on."""
    return "cuda" if torch.cuda.is_available() else None  # one decoder block at a time


def sweep_operations(prior: PriorConfig, calibration: Calibrate, sizes: Sizes, solver_steps: float) -> float:
    """Floating-point operations of a sweep.

    Args:
        solver_steps: of a method that works on the matrices of inputs XᵀX, see :attr:`leap.layerwise.Method.steps`.
    """
    tokens = prior.rows * calibration.data.context_length
    operations = 4.0 * sizes.prunable * tokens  # each block once for its statistics and once for what the next one sees
    if solver_steps:
        operations += 2 * sizes.gram * tokens + 2 * sizes.solve * solver_steps
    return operations
