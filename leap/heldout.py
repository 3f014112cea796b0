"""Held-out loss of a model on token rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

_TOKENS = 4096
"""In a forward pass: their logits over a vocabulary of 128 thousand take 2 GB."""


@torch.no_grad()
def heldout_loss(model: PreTrainedModel, rows: Tensor) -> float:
    """Mean cross-entropy in nats of the next token over rows [R, S], from float32 logits."""
    was_training = model.training
    model.eval()
    losses = []
    try:
        for batch in rows.split(max(1, _TOKENS // rows.shape[1])):
            batch = batch.to(model.device)
            logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
            parts = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
            losses.append(parts.double().cpu())
    finally:
        model.train(was_training)
    return float(torch.cat(losses).mean())
