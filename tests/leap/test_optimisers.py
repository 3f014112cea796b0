"""Optimisers of the logits: formulas in float64, rounding that keeps means, bytes, and slices that add up."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from leap_kernels.adam8bit import pack_moments, round_to_bf16, unpack_moments
from leap_kernels.mask_ops import random_words

from leap.optimisers import Updater
from leap.settings import LearnSettings

NAMES = ("adam", "adam8bit", "adam8bit-bf16")
BASE = LearnSettings.published(steps=100, clip=0.0)
UNIT = 0.1 / math.sqrt(0.05 * (1 - 0.81 / 0.95)) / 31


def words(count: int, step: int = 0) -> torch.Tensor:
    return random_words(count, seed=5, layer=1, step=step)


def updater(name: str, **options: Any) -> Updater:
    return Updater(replace(BASE, optimiser=name, seed=3, **options))


def run(name: str, grads: list[torch.Tensor], first: torch.Tensor, rate: float = 0.01, offset: int = 0):
    """(logits, state) after one step with each of ``grads``."""
    up = updater(name)
    logits = first.to(up.optimiser.dtype, copy=True)
    for step, grad in enumerate(grads):
        up.begin(step, rate, 0, 1)
        up.take(2, logits, grad.to(logits.dtype).clone(), offset)
    return logits, up.state(2, logits)


def adam64(grads: list[torch.Tensor], first: torch.Tensor, rate: float = 0.01) -> torch.Tensor:
    """Algorithm 1 of arXiv 1412.6980."""
    p = first.double().clone()
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t, grad in enumerate(grads, start=1):
        m, v = 0.9 * m + 0.1 * grad.double(), 0.95 * v + 0.05 * grad.double() ** 2
        p -= rate * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
    return p


def grads_of(count: int, steps: int, seed: int = 0) -> list[torch.Tensor]:
    """Gradients whose sizes spread over six orders of magnitude, as those of saturated gates do."""
    g = torch.Generator().manual_seed(seed)
    size = 10 ** (-6 * torch.rand(count, generator=g))
    return [size * (0.3 + torch.randn(count, generator=g)) for _ in range(steps)]


def test_adam_is_the_published_algorithm():
    grads, first = grads_of(500, 20), torch.randn(500)
    logits, _ = run("adam", grads, first)
    torch.testing.assert_close(logits.double(), adam64(grads, first), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES[1:])
def test_eight_bits_follow_adam_and_are_off_in_no_direction(name):
    count, steps, rate = 40_000, 40, 0.01
    grads, first = grads_of(count, steps), torch.zeros(count)
    error = (run(name, grads, first, rate)[0].double() - adam64(grads, first, rate)) / rate
    # In units of the rate: forty updates of at most about one each.
    assert float(error.std()) < 1.0
    assert abs(float(error.mean())) < 0.03
    assert float(adam64(grads, first, rate).div(rate).std()) > 3


def pack64(m: float, v: float, word: int) -> int:
    """The packed format, one element at a time."""
    grid = [0.0] + [2.0 ** (-68 + (c - 1) / 12) for c in range(1, 1024)]
    low = max(c for c, value in enumerate(grid) if value <= v)
    up = low < 1023 and (v - grid[low]) / (grid[low + 1] - grid[low]) > ((word & 255) + 0.5) / 256
    code = low + up
    multiple = 0
    if grid[code] > 0:
        exact = m / (math.sqrt(grid[code]) * UNIT) + ((word >> 8 & 255) + 0.5) / 256
        multiple = min(31, max(-31, math.floor(exact)))
    return code * 64 + multiple + 32 - 32768


def test_the_packed_format_is_that_of_the_formula():
    g = torch.Generator().manual_seed(1)
    v = torch.cat([10 ** (-23 + 28 * torch.rand(3000, generator=g)), torch.zeros(5), torch.full((5,), 1e9)])
    m = v.sqrt() * (torch.rand(len(v), generator=g) * 2.4 - 1.2)
    w = words(len(v))
    ours = pack_moments(m, v, UNIT, w)
    theirs = torch.tensor([pack64(float(a), float(b), int(c)) for a, b, c in zip(m, v, w, strict=True)])
    # fp32 logarithms put a value within rounding error of a grid point on its other side: the neighbour, equally near.
    assert (ours.int() == theirs).float().mean() > 0.999


@settings(max_examples=60, deadline=None)
@given(st.floats(-60, 15), st.floats(-1.1, 1.1))
def test_rounding_keeps_the_means(exponent, multiple):
    count = 4096
    v = torch.full((count,), 2.0**exponent)
    m = v.sqrt() * multiple
    m_back, v_back = unpack_moments(pack_moments(m, v, UNIT, words(count)), UNIT)
    assert float(v_back.max() / v_back.min()) < 2 ** (1.01 / 12), "one of two neighbours"
    assert float(v_back.mean() / v[0]) == pytest.approx(1, abs=5 * 0.06 / math.sqrt(count) + 1e-4)
    slack = 5 * 0.04 / math.sqrt(count) + 4e-4  # rounded by a byte, so in steps of 1/256
    assert float((m_back / v.sqrt()).mean()) == pytest.approx(multiple, abs=slack + 0.04 * 2**-8)
    x = torch.full((count,), multiple)
    rounded = round_to_bf16(x, words(count, 1)).float()
    assert len(rounded.unique()) <= 2
    assert float(rounded.mean()) == pytest.approx(multiple, abs=5 * 2**-8 / math.sqrt(count) * abs(multiple) + 1e-38)


@pytest.mark.parametrize("name", NAMES)
def test_it_descends(name):
    target = torch.randn(3000, generator=torch.Generator().manual_seed(4))
    up = updater(name)
    logits = torch.zeros(3000, dtype=up.optimiser.dtype)
    for step in range(100):
        up.begin(step, 0.1 * (1 - step / 100), 0, 1)
        up.take(0, logits, ((logits.float() - target) * 1e-4).to(logits.dtype))
    assert float((logits.float() - target).square().mean()) < 1e-3


def test_bf16_logits_do_not_stall_where_nearest_values_would():
    first = torch.full((2000,), 1.0)
    logits, _ = run("adam8bit-bf16", [torch.ones(2000)] * 30, first, rate=1e-4)
    assert float(logits.float().mean()) == pytest.approx(1 - 30e-4, abs=4e-4)
    assert torch.equal(first.bfloat16() - 1e-4, first.bfloat16()), "nearest values would not move"


@pytest.mark.parametrize(("name", "size"), [("adam", 12), ("adam8bit", 6), ("adam8bit-bf16", 4)])
def test_bytes_per_logit(name, size):
    logits, state = run(name, grads_of(1000, 1), torch.zeros(1000))
    assert sum(t.numel() * t.element_size() for t in (logits, *state.values())) == 1000 * size


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cut", [1, 333, 70_001])
def test_slices_add_up_to_the_whole_bit_for_bit(name, cut):
    count = 70_100
    grads, first = grads_of(count, 3), torch.randn(count, generator=torch.Generator().manual_seed(2))
    whole, whole_state = run(name, grads, first)
    parts = [run(name, [g[a:b] for g in grads], first[a:b], offset=a) for a, b in ((0, cut), (cut, count))]
    assert torch.equal(torch.cat([logits for logits, _ in parts]), whole)
    for key, value in whole_state.items():
        assert torch.equal(torch.cat([state[key] for _, state in parts]), value)


@pytest.mark.parametrize("name", NAMES)
def test_continued_from_its_state_it_is_bitwise_the_same(name):
    grads, first = grads_of(999, 6), torch.zeros(999)
    whole, _ = run(name, grads, first)
    half, state = run(name, grads[:3], first)
    resumed = updater(name)
    for key, value in resumed.state(2, half).items():
        value.copy_(state[key])
    for step, grad in enumerate(grads[3:], start=3):
        resumed.begin(step, 0.01, 0, 1)
        resumed.take(2, half, grad.to(half.dtype).clone())
    assert torch.equal(half, whole)


@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_add_up(name):
    grads = [torch.full((4000,), 1.0), *[torch.full((4000,), 2.0**-9)] * 64]
    up = updater(name)
    logits = torch.zeros(4000, dtype=up.optimiser.dtype)
    for number, grad in enumerate(grads):
        up.begin(0, 0.5, number, len(grads))
        up.take(0, logits, grad.to(logits.dtype).clone())
        assert bool(logits.any()) == (number == len(grads) - 1)
    single = updater("adam")
    single.begin(0, 0.5, 0, 1)
    expected = torch.zeros(4000)
    single.take(0, expected, torch.full((4000,), 1 + 2.0**-3))
    torch.testing.assert_close(logits.float(), expected, rtol=0.01, atol=0)
    second_moment = next(reversed(up.state(0, logits).values()))
    v = second_moment if name == "adam" else unpack_moments(second_moment, UNIT)[1]
    assert float(v.mean()) == pytest.approx(0.05 * 1.125**2, rel=0.01), "bf16 sums to nearest would stay at 1"


def test_betas_that_eight_bits_cannot_hold_are_refused():
    for betas in ((0.9, 0.999), (0.99, 0.95)):
        with pytest.raises(ValueError, match="adam8bit"):
            LearnSettings.published(optimiser="adam8bit", betas=betas)
        LearnSettings.published(optimiser="adam", betas=betas)


def shared64(sums: list[float], rate: float) -> float:
    """How far Adam (arXiv 1412.6980) goes with these gradients of one number, in all."""
    return float(adam64([torch.tensor([g]) for g in sums], torch.zeros(1), rate))


@pytest.mark.parametrize("name", NAMES)
def test_a_matrix_moves_by_adam_on_the_sum_of_its_gradient_besides(name):
    rate, count = 0.01, 5000
    grads, first = grads_of(count, 12), torch.randn(count)
    alone = updater(name)
    together = updater(name, learning_rate=rate, matrix_rate=0.05)
    ended = []
    for up in (alone, together):
        logits = first.to(up.optimiser.dtype, copy=True)
        for step, grad in enumerate(grads):
            up.begin(step, rate, 0, 1)
            up.take(2, logits, grad.to(logits.dtype))
        ended.append(logits.double())
    sums = [float(grad.to(alone.optimiser.dtype).float().sum()) for grad in grads]
    difference = ended[1] - ended[0]
    slack = 1e-6 if name != "adam8bit-bf16" else 2e-3  # bfloat16 rounds each logit at random
    assert float(difference.mean()) == pytest.approx(shared64(sums, 0.05), abs=slack)
    if name != "adam8bit-bf16":
        assert float(difference.std()) < 1e-6, "the same for every logit"


@pytest.mark.parametrize("scope", ["layer", "row"])
def test_where_the_scope_fixes_the_sparsity_of_a_matrix_it_does_not_move(scope):
    first, ended = torch.randn(500), []
    for options in ({}, {"matrix_rate": 0.05, "family": replace(BASE.family, scope=scope)}):
        up, logits = updater("adam8bit", **options), first.clone()
        up.begin(0, 0.01, 0, 1)
        up.take(0, logits, torch.ones(500))
        ended.append(logits)
    assert torch.equal(*ended)


def test_a_matrix_in_slices_moves_as_one():
    rate, count, cut = 0.01, 3000, 1234
    grads, first = grads_of(count, 5), torch.randn(count)
    whole = updater("adam8bit", learning_rate=rate, matrix_rate=0.1)
    expected = first.clone()
    parts = [first[:cut].clone(), first[cut:].clone()]
    for step, grad in enumerate(grads):
        whole.begin(step, rate, 0, 1)
        whole.take(0, expected, grad)
    # Each worker takes its slice, and hears from the others what theirs add up to.
    slices = [slice(None, cut), slice(cut, None)]
    for own, logits in zip(slices, parts, strict=True):
        sums = iter([float(grad.sum(dtype=torch.float32)) for grad in grads])
        worker = Updater(
            replace(BASE, optimiser="adam8bit", seed=3, learning_rate=rate, matrix_rate=0.1),
            lambda value, sums=sums: torch.full_like(value, next(sums)),
        )
        for step, grad in enumerate(grads):
            worker.begin(step, rate, 0, 1)
            worker.take(0, logits, grad[own], own.start or 0)
    assert torch.equal(torch.cat(parts), expected)


def clipped64(grads: dict[int, list[torch.Tensor]], clip: float) -> tuple[dict[int, list[torch.Tensor]], list[bool]]:
    """Gradients of each step by layer, all together at most ``clip`` long; and where they were longer."""
    scaled: dict[int, list[torch.Tensor]] = {layer: [] for layer in grads}
    longer = []
    for of_step in zip(*grads.values(), strict=True):
        length = math.sqrt(sum(float(g.double().square().sum()) for g in of_step))
        longer.append(length > clip)
        for layer, grad in zip(grads, of_step, strict=True):
            scaled[layer].append(grad.double() * min(1.0, clip / (length + 1e-6)))
    return scaled, longer


@pytest.mark.parametrize("name", ["adam", "adam8bit"])
@pytest.mark.parametrize("microbatches", [1, 3])
def test_the_gradient_of_all_layers_together_is_clipped(name, microbatches):
    counts, rate, steps = {0: 300, 1: 50, 5: 700}, 0.01, 8
    grads = {layer: grads_of(count, steps, seed=layer) for layer, count in counts.items()}
    for layer in grads:
        grads[layer][3] = grads[layer][3] * 100
    first = {layer: torch.randn(count) for layer, count in counts.items()}
    scaled, longer = clipped64(grads, 20.0)
    assert True in longer
    assert False in longer
    up, plain = updater(name, clip=20.0), updater(name)
    logits, expected = ({n: p.clone() for n, p in first.items()} for _ in range(2))
    for step in range(steps):
        for microbatch in range(microbatches):
            up.begin(step, rate, microbatch, microbatches)
            before = {layer: values.clone() for layer, values in logits.items()}
            for layer in counts:
                up.take(layer, logits[layer], grads[layer][step] / microbatches)
            assert all(torch.equal(before[n], logits[n]) for n in counts), "none moves before all have come"
            up.end()
        plain.begin(step, rate, 0, 1)
        for layer in counts:
            plain.take(layer, expected[layer], scaled[layer][step].float())
    for layer in counts:
        torch.testing.assert_close(logits[layer], expected[layer], rtol=1e-4, atol=2 * rate * UNIT)


def test_slices_on_several_workers_are_clipped_by_the_length_of_the_whole():
    cut, rate = 400, 0.01
    grads, first = [100 * g for g in grads_of(1000, 4)], torch.randn(1000)
    whole, expected = updater("adam", clip=1.0), first.clone()
    for step, grad in enumerate(grads):
        whole.begin(step, rate, 0, 1)
        whole.take(0, expected, grad.clone())
        whole.end()
    for own in (slice(None, cut), slice(cut, None)):
        squares = iter([grad.double().square().sum() for grad in grads])
        worker = Updater(replace(BASE, optimiser="adam", seed=3, clip=1.0), lambda _, s=squares: next(s))
        logits = first[own].clone()
        for step, grad in enumerate(grads):
            worker.begin(step, rate, 0, 1)
            worker.take(0, logits, grad[own].clone(), own.start or 0)
            worker.end()
        torch.testing.assert_close(logits, expected[own], rtol=1e-6, atol=1e-7)
