"""Runs the Triton kernels of the optimiser, the losses and the counts on CPU tensors, under TRITON_INTERPRET=1.

A script rather than a test because Triton reads the variable when it is imported; test_triton_interpreted.py starts it.
"""

import math
from unittest.mock import patch

import torch
import torch.nn.functional as F
from leap_kernels import radix_counts_triton
from leap_kernels.adam8bit import NO_MOMENTS, AdamStep, adam8bit, adam8bit_reference
from leap_kernels.adam8bit_triton import adam8bit_triton
from leap_kernels.add_stochastic import add_stochastic_reference
from leap_kernels.add_stochastic_triton import add_stochastic_triton
from leap_kernels.mask_ops import random_words
from leap_kernels.output_losses_triton import output_losses_backward_triton, output_losses_triton
from leap_kernels.radix_counts import BUCKETS, radix_counts_reference
from leap_kernels.radix_counts_triton import CopiedCounts
from leap_kernels.shared_step import shared_step_reference
from leap_kernels.shared_step_triton import shared_step_triton
from torch import Tensor
from triton_words import words_by_triton

BETAS = (0.9, 0.95)


def check_words(**stream: int) -> None:
    """The same bits as a CPU's."""
    assert torch.equal(words_by_triton(1000, "cpu", **stream), random_words(1000, **stream))


def check_shared_step() -> None:
    """Three steps on one number; the kernel's factors are float32."""
    moments, expected = torch.zeros(2, 2, dtype=torch.float64)
    for step, value in enumerate((3.0, -1e-4, 0.0)):
        total = torch.tensor(value, dtype=torch.float64)
        taken = shared_step_triton(total, moments, 0.05, BETAS, step)
        exact = shared_step_reference(total, expected, 0.05, BETAS, step)
        torch.testing.assert_close(taken, exact, rtol=1e-6, atol=0)
        torch.testing.assert_close(moments, expected, rtol=1e-6, atol=0)


def check_adam(count: int, offset: int, logits_dtype: torch.dtype, grad_dtype: torch.dtype, seed: int) -> None:
    """Three steps against the reference; what the native step shares with it, the kernel has to share, too."""
    generator = torch.Generator().manual_seed(count)
    first = torch.randn(count, generator=generator).to(logits_dtype)
    size = 10 ** (-6 * torch.rand(count, generator=generator))
    grads = [(size * torch.randn(count, generator=generator)).to(grad_dtype) for _ in range(3)]
    shifts: list[float | Tensor] = [0.0, 0.25, torch.tensor(-0.5, dtype=torch.float64)]
    logits, moments = first.clone(), torch.full((count,), NO_MOMENTS, dtype=torch.int16)
    for step, (grad, shift) in enumerate(zip(grads, shifts, strict=True)):
        s = AdamStep(0.01, BETAS, seed, (1 << 31) | 7, step, offset, shift)
        # Each step starts where the kernel left off, so that one step's neighbours do not add up.
        expected, expected_moments = logits.clone(), moments.clone()
        adam8bit_reference(expected, grad, expected_moments, s)
        adam8bit_triton(logits, grad, moments, s)
        # A value within rounding of a threshold may go to the other side: to a neighbour on its grid.
        assert (moments == expected_moments).float().mean() > 0.9985, (moments != expected_moments).sum()
        if logits_dtype == torch.bfloat16:
            assert (logits == expected).float().mean() > 0.9985, (logits != expected).sum()
        spacing = 1e-6 if logits_dtype == torch.float32 else 2**-7
        torch.testing.assert_close(logits.float(), expected.float(), rtol=spacing, atol=1e-7)


def check_adam_in_slices() -> None:
    """Slices that start anywhere get bit for bit what the whole does."""
    whole, grad = torch.randn(1500), torch.randn(1500)
    moments = torch.full((1500,), NO_MOMENTS, dtype=torch.int16)
    parts = [(whole[part].clone(), grad[part], moments[part].clone(), part.start)
             for part in (slice(0, 401), slice(401, 402), slice(402, 1500))]  # fmt: skip
    adam8bit_triton(whole, grad, moments, AdamStep(0.01, BETAS, 3, 2, 0, 6))
    for logits, g, state, start in parts:
        adam8bit_triton(logits, g, state, AdamStep(0.01, BETAS, 3, 2, 0, 6 + start))
    assert torch.equal(whole, torch.cat([part[0] for part in parts]))
    assert torch.equal(moments, torch.cat([part[2] for part in parts]))


def check_adam_at_the_edges() -> None:
    """The whole range of gradients, and every code of the state with the greatest and smallest multiples of m."""
    tiny_and_huge = torch.tensor([0.0, 1e-45, 1e-38, 1e-25, 2e-10, 1.0, 1e8, 1e18, 3e38]).repeat(2)
    tiny_and_huge[9:] *= -1
    codes = torch.arange(1024) * 64 + 32 - 32768
    moments = torch.cat([torch.full((18,), NO_MOMENTS), codes, codes[1:] + 31, codes[1:] - 31]).to(torch.int16)
    grad = torch.cat([tiny_and_huge, torch.zeros(len(moments) - 18)])
    results = []
    for function in (adam8bit_triton, adam8bit):
        logits, state = torch.zeros(len(moments)), moments.clone()
        function(logits, grad, state, AdamStep(0.5, BETAS, 1, 2, 0))
        assert torch.isfinite(logits).all()
        results.append((logits, state))
    assert (results[0][1] == results[1][1]).float().mean() > 0.9985
    torch.testing.assert_close(results[0][0], results[1][0], rtol=2e-6, atol=1e-7)


def check_sum(count: int, offset: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(count)
    total = torch.randn(count, generator=generator).bfloat16()
    term = (torch.randn(count, generator=generator) * 0.1).to(dtype)
    expected = total.clone()
    add_stochastic_reference(expected, term, seed=(1 << 63) + 5, layer=1 << 30, step=1, offset=offset)
    add_stochastic_triton(total, term, (1 << 63) + 5, 1 << 30, 1, offset)
    assert torch.equal(total, expected)


def check_losses(rows: int, vocabulary: int, dtype: torch.dtype, with_teacher: bool, size: float = 4.0) -> None:
    generator = torch.Generator().manual_seed(rows * vocabulary)
    student, teacher = ((torch.randn(rows, vocabulary, generator=generator) * size).to(dtype) for _ in "st")
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    targets[rows // 2] = -100
    leaf = student.double().requires_grad_()
    of_target = F.cross_entropy(leaf, targets, reduction="none", ignore_index=-100)
    log_p, log_q = F.log_softmax(leaf, -1), F.log_softmax(teacher.double(), -1)
    divergence = F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1) * with_teacher
    (expected,) = torch.autograd.grad(0.3 * of_target.sum() + 0.7 * divergence.sum(), leaf)
    given_teacher = teacher if with_teacher else None
    losses, log_sums = output_losses_triton(student, targets, given_teacher)
    torch.testing.assert_close(losses, torch.stack([of_target, divergence], 1).detach(), rtol=2e-6, atol=1e-5)
    factors = (torch.tensor(0.3), torch.tensor(0.7, dtype=torch.float64)) if with_teacher else (0.3, 0.0)
    grad = output_losses_backward_triton(student, targets, given_teacher, log_sums, *factors)
    # The interpreter truncates to bfloat16 where hardware rounds.
    spacing = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(grad.double(), expected, rtol=spacing, atol=2e-6)


def check_losses_at_the_edges() -> None:
    student, teacher = torch.randn(6, 5000) * 300, torch.randn(6, 5000) * 300
    student[:, 100] = teacher[:, 100] = -math.inf  # a token that neither model can produce
    student[:, 4100:] = teacher[:, 4100:] = -math.inf  # nor can they most of those in the last tile
    student[1, 4999], student[2, 7] = math.nan, math.nan
    targets = torch.tensor([3, 5, -100, 5000, -1, 1])
    losses, log_sums = output_losses_triton(student, targets, teacher)
    assert losses.isnan().tolist() == [[False] * 2, [True] * 2, [True] * 2, [True, False], [False] * 2, [False] * 2]
    assert losses[4, 0] == 0
    good = [0, 4, 5]
    q = F.log_softmax(teacher[good].double(), -1)
    terms = (q - F.log_softmax(student[good].double(), -1)).nan_to_num(0.0) * q.exp()
    torch.testing.assert_close(losses[good, 1], terms.sum(-1), rtol=2e-6, atol=1e-4)
    grad = output_losses_backward_triton(student, targets, teacher, log_sums, torch.tensor(1.0), torch.tensor(1.0))
    assert grad[good].isfinite().all()
    assert (grad[good, 100] == 0).all()


def check_counts(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    special = torch.tensor([0.0, -0.0, 1e-45, -1e-45, math.inf, -math.inf, 3.4e38, -3.4e38, 1.0, -1.0, math.nan])
    values = torch.cat([torch.randn(2000, generator=generator), special]).to(dtype)
    counts, expected = CopiedCounts(BUCKETS + 1, values.device), torch.zeros(BUCKETS + 1, dtype=torch.int64)
    for _ in range(2):  # counts add up
        counts.add(values, None)
        radix_counts_reference(values, None, expected)
    high = counts.total()
    assert torch.equal(high, expected)
    assert high[BUCKETS] == 2
    for upper in high[:BUCKETS].nonzero().flatten()[::40].tolist():
        counts, expected = CopiedCounts(BUCKETS + 1, values.device), torch.zeros(BUCKETS + 1, dtype=torch.int64)
        counts.add(values, upper)
        radix_counts_reference(values, upper, expected)
        assert torch.equal(counts.total(), expected)


def check_counts_beyond_a_counter() -> None:
    """Copies are emptied before one of them could overflow, within a tensor and between two; what was seen remains."""
    largest = []
    counts = CopiedCounts(BUCKETS + 1, torch.device("cpu"))
    empty = counts._empty

    def emptied() -> None:
        largest.append(int(counts._copies.sum()))
        empty()

    zeros = torch.zeros(700)
    with patch.object(radix_counts_triton, "_MOST", 1024), patch.object(counts, "_empty", emptied):
        for tensor in (zeros, zeros, torch.zeros(3000), torch.ones(5)):
            counts.add(tensor, None)
            assert counts._pending <= 1024
        assert counts.total()[BUCKETS // 2] == 4400
        counts.add(zeros, None)
        total = counts.total()
    assert total.sum() == 5105
    assert total[BUCKETS // 2] == 5100
    assert max(largest) <= 1024


check_shared_step()
check_words(seed=5, layer=7, step=1, offset=0)
check_words(seed=(1 << 64) - 1, layer=(1 << 32) - 1, step=(1 << 32) - 1, offset=(1 << 40) + 3)
check_adam(3000, 0, torch.float32, torch.float32, seed=1)
check_adam(2100, 1, torch.bfloat16, torch.bfloat16, seed=(1 << 63) + 12345)
check_adam(2100, (1 << 34) - 50, torch.float32, torch.float16, seed=1 << 40)
check_adam_in_slices()
check_adam_at_the_edges()
check_sum(2100, 3, torch.bfloat16)
check_sum(1025, (1 << 34) - 50, torch.float32)
for shape in ((1, 1), (3, 2), (2, 1023), (2, 4097), (2, 9001)):
    check_losses(*shape, torch.float32, with_teacher=True)
check_losses(2, 5000, torch.bfloat16, with_teacher=True)
check_losses(2, 5000, torch.bfloat16, with_teacher=False)
check_losses(3, 4100, torch.float16, with_teacher=True, size=20.0)
check_losses_at_the_edges()
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    check_counts(dtype)
check_counts_beyond_a_counter()
print("interpreted kernels agree")
