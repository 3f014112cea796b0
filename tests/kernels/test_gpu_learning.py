"""The kernels of learning on a GPU, at the shapes of real models, against float64 or the PyTorch reference.

Memory that a kernel has to write holds NaN, or the largest integers, beforehand.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from leap_kernels.adam8bit import NO_MOMENTS, AdamStep, adam8bit, adam8bit_reference
from leap_kernels.add_stochastic import add_stochastic, add_stochastic_reference
from leap_kernels.mask_ops import mask_backward, mask_forward, random_words
from leap_kernels.mask_reference import MaskScalars, mask_backward_reference, mask_forward_reference
from leap_kernels.output_losses import output_losses, output_losses_backward
from leap_kernels.radix_counts import BUCKETS, RadixCounts, count_high, count_low
from torch import Tensor

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

LARGEST = 14336 * 4096  # weights in the largest matrix of an 8B model
BETAS = (0.9, 0.95)


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """torch.empty gives NaN or the largest integers."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)
    torch.cuda.empty_cache()


def normal(*shape: int, dtype: torch.dtype = torch.float32, size: float = 1.0) -> Tensor:
    return (torch.randn(shape, device="cuda") * size).to(dtype)


@pytest.mark.parametrize("offset", [0, 3, (1 << 40) + 2])
def test_words_are_those_of_the_cpu(offset: int) -> None:
    from triton_words import words_by_triton

    for seed in (5, (1 << 40) + 1, (1 << 64) - 1):
        stream = {"seed": seed, "layer": (1 << 31) | 7, "step": 1, "offset": offset}
        assert torch.equal(words_by_triton(100_001, "cuda", **stream).cpu(), random_words(100_001, **stream))


@pytest.mark.parametrize("count", [LARGEST, 1_000_003])
@pytest.mark.parametrize(
    ("logits_dtype", "grad_dtype"),
    [(torch.float32, torch.float32), (torch.float32, torch.float16), (torch.bfloat16, torch.bfloat16)],
)
def test_adam_is_the_references(count: int, logits_dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    logits, moments = normal(count, dtype=logits_dtype), torch.full([count], NO_MOMENTS, dtype=torch.int16).cuda()
    sizes = 10 ** (-6 * torch.rand(count, device="cuda"))
    shifts: list[float | Tensor] = [0.0, 0.25, torch.tensor(-0.5, dtype=torch.float64, device="cuda")]
    for step, shift in enumerate(shifts):
        grad = (normal(count) * sizes).to(grad_dtype)
        s = AdamStep(0.01, BETAS, (1 << 63) + 5, (1 << 31) | 7, step, 13, shift)
        expected, expected_moments = logits.clone(), moments.clone()
        adam8bit_reference(expected, grad, expected_moments, s)
        adam8bit(logits, grad, moments, s)
        # A value within rounding of a threshold may go to the other side: to a neighbour on its grid.
        assert (moments != expected_moments).float().mean() < 5e-4
        spacing = 1e-6 if logits_dtype == torch.float32 else 2**-7
        torch.testing.assert_close(logits.float(), expected.float(), rtol=spacing, atol=2e-7)
        if logits_dtype == torch.bfloat16:
            assert (logits != expected).float().mean() < 5e-4


def test_adam_in_slices_is_adam_on_the_whole() -> None:
    whole, grad = normal(100_000), normal(100_000)
    moments = torch.full([100_000], NO_MOMENTS, dtype=torch.int16, device="cuda")
    ends = [0, 33_333, 33_334, 100_000]
    parts = [(whole[a:b].clone(), grad[a:b], moments[a:b].clone(), a) for a, b in pairwise(ends)]
    adam8bit(whole, grad, moments, AdamStep(0.01, BETAS, 3, 2, 0, 6))
    for logits, g, state, start in parts:
        adam8bit(logits, g, state, AdamStep(0.01, BETAS, 3, 2, 0, 6 + start))
    assert torch.equal(whole, torch.cat([part[0] for part in parts]))
    assert torch.equal(moments, torch.cat([part[2] for part in parts]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stochastic_sums_are_the_references_bit_for_bit(dtype: torch.dtype) -> None:
    total, term = normal(LARGEST, dtype=torch.bfloat16), normal(LARGEST, dtype=dtype, size=0.1)
    expected, stream = total.clone(), {"seed": (1 << 63) + 5, "layer": 1 << 30, "step": 1, "offset": 5}
    add_stochastic_reference(expected, term, **stream)
    add_stochastic(total, term, **stream)
    assert torch.equal(total, expected)
    part = slice(7_000_001, 7_050_000)
    of_cpu = normal(50_000, dtype=torch.bfloat16)
    again = of_cpu.cpu()
    add_stochastic(of_cpu, term[:50_000], **stream)
    add_stochastic(again, term[:50_000].cpu(), **stream)
    assert torch.equal(of_cpu.cpu(), again)
    assert total[part].isfinite().all()


def losses_in_float64(student: Tensor, targets: Tensor, teacher: Tensor | None) -> tuple[Tensor, Tensor]:
    """Losses [T, 2], and the gradient of 0.3 and 0.7 of their sums, of few rows."""
    leaf = student.double().requires_grad_()
    of_target = F.cross_entropy(leaf, targets, reduction="none", ignore_index=-100)
    divergence = torch.zeros_like(of_target)
    if teacher is not None:
        log_p, log_q = F.log_softmax(leaf, -1), F.log_softmax(teacher.double(), -1)
        divergence = F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)
    (grad,) = torch.autograd.grad(0.3 * of_target.sum() + 0.7 * divergence.sum(), leaf)
    return torch.stack([of_target, divergence], 1).detach(), grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "vocabulary"), [(2048, 128_256), (17_000, 128_256), (512, 262_144), (513, 50_257), (4096, 49_152), (3, 7)]
)
@pytest.mark.parametrize("with_teacher", [True, False])
def test_losses_are_those_of_float64(dtype: torch.dtype, rows: int, vocabulary: int, with_teacher: bool) -> None:
    if rows * vocabulary > 1 << 31 and dtype != torch.bfloat16:
        pytest.skip("more than 2**31 logits in one number type only")
    if rows * vocabulary * dtype.itemsize * 4 > torch.cuda.mem_get_info()[0]:
        pytest.skip("too little memory")
    student = torch.randn(rows, vocabulary, device="cuda", dtype=dtype).mul_(4)
    teacher = torch.randn(rows, vocabulary, device="cuda", dtype=dtype).mul_(4) if with_teacher else None
    targets = torch.randint(vocabulary, (rows,), device="cuda")
    targets[rows // 2 - 1] = -100
    losses, log_sums = output_losses(student, targets, teacher)
    factors = torch.tensor(0.3, device="cuda"), torch.tensor(0.7 * with_teacher, device="cuda")
    grad = output_losses_backward(student, targets, teacher, log_sums, *factors)
    spacing = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    for part in (slice(0, 16), slice(rows // 2 - 8, rows // 2 + 8), slice(max(0, rows - 16), rows)):
        of_part = None if teacher is None else teacher[part]
        expected, expected_grad = losses_in_float64(student[part], targets[part], of_part)
        torch.testing.assert_close(losses[part], expected, rtol=2e-6, atol=2e-5)
        torch.testing.assert_close(grad[part].double(), expected_grad, rtol=spacing, atol=2e-6)
    assert losses.isfinite().all()


def test_targets_beyond_the_vocabulary_and_nan_show_in_the_losses() -> None:
    student, teacher = normal(6, 5000, size=300.0), normal(6, 5000, size=300.0)
    student[:, 100] = teacher[:, 100] = -torch.inf
    student[1, 4999], student[2, 7] = torch.nan, torch.nan
    losses, _ = output_losses(student, torch.tensor([3, 5, -100, 5000, -1, 1], device="cuda"), teacher)
    assert losses.isnan().tolist() == [[False] * 2, [True] * 2, [True] * 2, [True, False], [False] * 2, [False] * 2]
    assert losses.isinf().any().logical_not()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_counts_are_those_of_the_cpu(dtype: torch.dtype) -> None:
    values = torch.cat([normal(LARGEST + 5, size=0.05), torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38]).cuda()])
    values = values.to(dtype)
    on_cpu = values.cpu()
    high = count_high(values)
    assert torch.equal(high, count_high(on_cpu))
    upper = int(high.argmax())
    assert torch.equal(count_low(values, upper), count_low(on_cpu, upper))
    values[12345] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        count_high(values)


@pytest.mark.parametrize("count", [LARGEST, 1_000_003])
def test_equal_values_are_counted_in_one_place(count: int) -> None:
    zeros = torch.zeros(count, device="cuda")
    for counts in (count_high(zeros), count_low(zeros, BUCKETS // 2)):
        assert int(counts.sum()) == count
    assert int(count_high(zeros)[BUCKETS // 2]) == int(count_low(zeros, BUCKETS // 2)[0]) == count


def test_counts_outlive_the_emptying_of_their_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leap_kernels.radix_counts_triton._MOST", 1 << 16)
    tensors = [normal(50_000), normal(200_000), normal(3)]
    counts = RadixCounts()
    for tensor in tensors:
        counts.add(tensor)
    expected = count_high(torch.cat(tensors).cpu())
    assert torch.equal(counts.total(), expected)
    assert torch.equal(counts.total(), expected)


def test_many_tensors_are_counted_without_waiting() -> None:
    tensors = [normal(100_000) for _ in range(3)]
    counts = RadixCounts()
    counts.add(tensors[0])  # compiled now
    torch.cuda.set_sync_debug_mode("error")
    try:
        counts.add(tensors[1])
        counts.add(tensors[2])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(counts.total(), count_high(torch.cat(tensors).cpu()))


@pytest.mark.parametrize(
    ("weight_dtype", "logits_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
    ],
)
@pytest.mark.parametrize(("count", "offset", "noise"), [(LARGEST, 0, True), (1_000_003, 5, True), (4096, 0, False)])
def test_masks_are_those_of_float64(
    weight_dtype: torch.dtype, logits_dtype: torch.dtype, count: int, offset: int, noise: bool
) -> None:
    weight, grad = normal(count, dtype=weight_dtype), normal(count, dtype=weight_dtype)
    logits = normal(count, dtype=logits_dtype, size=0.05)
    stats_grad = torch.tensor([0.3, -0.2, 0.7], dtype=torch.float64, device="cuda")
    draw = {"scale": 60.0, "temperature": 0.7, "seed": (1 << 63) + 5, "layer": 7, "step": 1, "noise": noise}
    masked, stats = mask_forward(weight, logits, offset=offset, **draw)
    grad_logits = mask_backward(grad, weight, logits, stats_grad, offset=offset, **draw)
    assert masked.isfinite().all()
    assert grad_logits.isfinite().all()
    # The reference walks over small chunks, which takes its time: sums on one million elements, the rest on both ends.
    if count <= 1_000_003:
        out = torch.empty(count, dtype=torch.float64, device="cuda")
        wide = MaskScalars(**draw, offset=offset)
        expected = mask_forward_reference(weight.double(), logits.double(), out, wide, compute_dtype=torch.float64)
        torch.testing.assert_close(stats, expected, rtol=2e-6, atol=1e-5)
    rtol = {torch.float32: 2e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}
    for part in (slice(0, 50_000), slice(max(0, count - 50_000), count)):
        ends = [t[part].double() for t in (grad, weight, logits)]
        masked64, grad64 = torch.empty(2, ends[0].numel(), dtype=torch.float64, device="cuda")
        scalars = MaskScalars(**draw, offset=offset + part.start)
        mask_forward_reference(*ends[1:], masked64, scalars, compute_dtype=torch.float64)
        mask_backward_reference(*ends, stats_grad, grad64, scalars, compute_dtype=torch.float64)
        torch.testing.assert_close(masked[part].double(), masked64, rtol=rtol[weight_dtype], atol=1e-6)
        torch.testing.assert_close(grad_logits[part].double(), grad64, rtol=rtol[logits_dtype], atol=2e-4)


def test_every_configuration_gives_the_masks_of_the_default() -> None:
    from leap_kernels.mask_forward_triton import candidates, default_config, mask_forward_triton

    weight, logits = normal(1_000_003, dtype=torch.bfloat16), normal(1_000_003, size=0.05)
    scalars = MaskScalars(scale=60, temperature=0.7, seed=5, layer=7, step=1, noise=True, offset=2)
    expected = torch.empty_like(weight)
    expected_stats = mask_forward_triton(weight, logits, expected, scalars)
    for config in (*candidates(), default_config(1 << 30)):
        masked = torch.full_like(weight, torch.nan)
        stats = mask_forward_triton(weight, logits, masked, scalars, config)
        assert torch.equal(masked, expected)
        torch.testing.assert_close(stats, expected_stats, rtol=2e-6, atol=1e-5)


def test_later_launches_take_the_numbers_they_are_given() -> None:
    """The compiled code of the first call is started with other numbers, tensors and places than Triton saw."""
    weight, grad = normal(4096, dtype=torch.bfloat16), normal(4096, dtype=torch.bfloat16)
    logits = normal(4096, size=0.05)
    places = torch.randn(7, dtype=torch.float64, device="cuda")
    draws = [
        {"scale": 60.0, "temperature": 0.7, "seed": 1, "layer": 1, "step": 1, "offset": 0},
        {"scale": 20, "temperature": 1, "seed": (1 << 64) - 1, "layer": (1 << 32) - 1, "step": (1 << 32) - 1,
         "offset": (1 << 40) + 4},
        {"scale": 1.5, "temperature": 0.1, "seed": 0, "layer": 0, "step": 0, "offset": 16},
    ]  # fmt: skip
    for number, draw in enumerate(draws):
        stats_grad = places[number : number + 3]  # lies anywhere
        masked, stats = mask_forward(weight, logits, noise=True, **draw)
        grad_logits = mask_backward(grad, weight, logits, stats_grad, noise=True, **draw)
        masked64, grad64 = torch.empty(2, 4096, dtype=torch.float64, device="cuda")
        scalars, wide = MaskScalars(noise=True, **draw), torch.float64
        of64 = mask_forward_reference(weight.double(), logits.double(), masked64, scalars, compute_dtype=wide)
        ends = grad.double(), weight.double(), logits.double()
        mask_backward_reference(*ends, stats_grad, grad64, scalars, compute_dtype=wide)
        torch.testing.assert_close(masked.double(), masked64, rtol=2**-8, atol=1e-6)
        torch.testing.assert_close(stats, of64, rtol=2e-6, atol=1e-5)
        torch.testing.assert_close(grad_logits.double(), grad64, rtol=2e-5, atol=2e-4)
        moved, moments = normal(4096), torch.full([4096], NO_MOMENTS, dtype=torch.int16, device="cuda")
        expected, expected_moments = moved.clone(), moments.clone()
        of_stream = draw["seed"], draw["layer"], number, draw["offset"]
        s = AdamStep(0.1 / (number + 1), BETAS, *of_stream, places[number])
        adam8bit(moved, grad.float(), moments, s)
        adam8bit_reference(expected, grad.float(), expected_moments, s)
        assert (moments != expected_moments).float().mean() < 2e-3
        torch.testing.assert_close(moved, expected, rtol=1e-6, atol=2e-7)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_kernels_run_on_the_device_of_their_tensors() -> None:
    with torch.cuda.device(0):
        logits, grad = normal(5000).to("cuda:1"), normal(5000).to("cuda:1")
        moments = torch.full([5000], NO_MOMENTS, dtype=torch.int16, device="cuda:1")
        expected, expected_moments = logits.cpu(), moments.cpu()
        s = AdamStep(0.01, BETAS, 3, 2, 0)
        adam8bit(logits, grad, moments, s)
        adam8bit(expected, grad.cpu(), expected_moments, s)
        torch.testing.assert_close(logits.cpu(), expected, rtol=1e-6, atol=1e-7)
        assert torch.equal(count_high(logits), count_high(logits.cpu()))
