"""Perplexity of a causal language model on packed rows of tokens."""

from __future__ import annotations

import math
from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import nn

from pipeline.evaluation.statistics import mean_and_stderr


class Perplexity(TypedDict):
    """Result of :func:`perplexity`; nll is in nats per predicted token."""

    perplexity: float
    nll: float
    """Mean over all predicted tokens; ``perplexity`` is its exponential."""
    nll_stderr: float | None
    """Standard error of ``nll`` with rows as the independent samples; None for a single row."""
    tokens: int
    """Predicted tokens, R * (S - 1)."""
    nll_per_row: list[float]
    """Mean of each row, length R, in the order of ``rows``."""


@torch.no_grad()
def perplexity(model: nn.Module, rows: torch.Tensor, *, batch_rows: int) -> Perplexity:
    """Perplexity of ``model`` on ``rows``; the first token of each row is context only.

    The model is evaluated in eval mode, on the device it lies on, and left in the mode it was in.

    Args:
        model: called as ``model(input_ids=[B, S], use_cache=False)``; its output has ``.logits`` of shape [B, S, V].
        rows: token ids, int64 [R, S], on any device, without padding.
        batch_rows: rows per forward pass (B).

    Raises:
        ValueError: ``rows`` is not [R >= 1, S >= 2], or the model's nll is NaN or too large to have a perplexity.
    """
    if rows.ndim != 2 or rows.shape[0] < 1 or rows.shape[1] < 2:
        raise ValueError(f"rows must be [R >= 1, S >= 2], got {list(rows.shape)}")
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        nll_per_row: list[float] = []
        for batch in rows.split(batch_rows):
            inputs = batch.to(device)
            # The logits get no name here, so that they are freed before the next forward pass.
            nll_per_row += _row_nlls(model(input_ids=inputs, use_cache=False).logits, inputs)
    finally:
        model.train(was_training)
    for index, nll in enumerate(nll_per_row):
        if not math.isfinite(nll):
            raise ValueError(f"the nll of row {index} is {nll}: the model's logits are broken")
    return perplexity_of(nll_per_row, tokens=rows.shape[0] * (rows.shape[1] - 1))


def perplexity_of(nll_per_row: list[float], *, tokens: int) -> Perplexity:
    """The result from the mean nll of each row, all rows being equally long.

    Raises:
        ValueError: the mean is too large to have a perplexity.
    """
    nll, stderr = mean_and_stderr([nll_per_row])
    try:
        value = math.exp(nll)
    except OverflowError:
        raise ValueError(f"the mean nll is {nll:.0f} nats per token: the model's logits are broken") from None
    return Perplexity(perplexity=value, nll=nll, nll_stderr=stderr, tokens=tokens, nll_per_row=nll_per_row)


def _row_nlls(logits: torch.Tensor, rows: torch.Tensor) -> list[float]:
    """Mean nll of each row. logits: [B, S, V] in any dtype, rows: [B, S]."""
    # One row at a time, so that the float32 copy and its log-softmax are [S, V] and not [B, S, V].
    return [
        F.cross_entropy(row_logits[:-1].float(), row[1:], reduction="none").double().mean().item()
        for row_logits, row in zip(logits, rows, strict=True)
    ]
