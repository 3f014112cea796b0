"""Native code writes where it was told to, whatever number type new tensors have by default."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from leap_kernels.adam8bit import NO_MOMENTS, AdamStep, adam8bit
from leap_kernels.mask_ops import mask_backward, mask_forward, random_words
from leap_kernels.output_losses import output_losses, output_losses_backward
from leap_kernels.radix_counts import count_high, count_low
from torch import Tensor


@pytest.fixture(params=[torch.bfloat16, torch.float64])
def default(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    yield request.param
    torch.set_default_dtype(torch.float32)


def results() -> list[Tensor]:
    """Of every native op of learning, on the same float32 arguments each time."""
    generator = torch.Generator().manual_seed(0)
    a, b, c = torch.randn(3, 700, generator=generator, dtype=torch.float32).unbind()
    stats_grad = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    draw = {"scale": 3.0, "temperature": 0.5, "seed": 1, "layer": 2, "step": 3, "noise": True}
    masked, stats = mask_forward(a, b, **draw)
    grad = mask_backward(c, a, b, stats_grad, **draw)
    logits, moments = a.clone(), torch.full((700,), NO_MOMENTS, dtype=torch.int16)
    adam8bit(logits, b, moments, AdamStep(0.01, (0.9, 0.95), 1, 2, 3))
    student, teacher, targets = a.view(7, 100), b.view(7, 100), torch.arange(7)
    losses, log_sums = output_losses(student, targets, teacher)
    grad_student = output_losses_backward(student, targets, teacher, log_sums, 0.5, 0.5)
    high = count_high(a)
    words = random_words(700, seed=1, layer=2, step=3)
    return [
        *(masked, stats, grad, logits, moments, losses, log_sums, grad_student, words),
        *(high, count_low(a, int(high.argmax()))),
    ]


def test_of_new_tensors_changes_nothing(default: torch.dtype) -> None:
    expected = results()
    torch.set_default_dtype(default)
    for ours, theirs in zip(results(), expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
