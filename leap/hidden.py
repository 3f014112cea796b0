"""Distillation on the hidden states between decoder blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def with_hidden_states(model: Any, rows: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Logits [R, S, V] of a Hugging Face causal LM, and its hidden states [R, S, H] after each decoder block.

    The last hidden states are those that the model itself returns last. Most families apply the final norm to them.
    """
    output = model(input_ids=rows, use_cache=False, output_hidden_states=True)
    return output.logits, output.hidden_states[1:]


def hidden_divergence(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean over the blocks of ‖student − teacher‖² / ‖teacher − its mean‖², fp32, with a gradient for ``student``.

    Hidden states grow from block to block. Dividing by the teacher's variance gives every block the same weight.
    """
    parts = [
        F.mse_loss(ours.float(), theirs.float()) / theirs.float().var(correction=0)
        for ours, theirs in zip(student, teacher, strict=True)
    ]
    return torch.stack([part.to(parts[-1].device) for part in parts]).mean()
