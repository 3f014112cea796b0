"""Held-out loss of a model on token rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel


@torch.no_grad()
def heldout_loss(model: PreTrainedModel, rows: Tensor, batch_rows: int = 16) -> float:
    """Mean cross-entropy in nats of the next token over rows [R, S], from float32 logits."""
    losses = []
    for batch in rows.split(batch_rows):
        batch = batch.to(model.device)
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        losses.append(F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none").double().cpu())
    return float(torch.cat(losses).mean())
