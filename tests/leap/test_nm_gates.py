"""MaskLLM's choices, LEAP's gates in groups and hard-concrete gates, from their formulas."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from leap_kernels.philox import gumbel_noise, logistic_noise
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import leap
from leap.families import HardConcrete, Leap, MaskFamily, MaskLLM, candidates, grouped, hard_concrete_gate
from leap.families.grouped import project
from leap.gates import Draw, Layout, Matrix, PriorMask
from leap.settings import LearnSettings

SHAPE = torch.Size([6, 16])
MATRIX = Matrix(3, "a", SHAPE)
#: Upstream gradients of the three sums.
STATS_GRAD = torch.tensor([0.7, -0.3, 1.1], dtype=torch.float64)
FAMILIES = [MaskLLM(), MaskLLM(pattern=(1, 4)), MaskLLM(pattern=(4, 8)), Leap(pattern=(2, 4)), Leap(pattern=(3, 8))]
NAMES = [f"{family.kind}-{family.scope_name}" for family in FAMILIES]
of_family = pytest.mark.parametrize("family", FAMILIES, ids=NAMES)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows at a time, so that what is worked on in parts is."""
    for module in (grouped, hard_concrete_gate):
        monkeypatch.setattr(module, "_CHUNK", 32)
    monkeypatch.setattr(candidates, "_CHUNK", 48)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def logits_of(family: MaskFamily, std: float = 1.0) -> Tensor:
    (shape,) = family.gate().logit_shapes(MATRIX).values()
    return randn(*shape, seed=1) * std


def by_formula(family: MaskFamily, p: Tensor, draw: Draw) -> Tensor:
    """The soft mask in float64, differentiable in ``p``."""
    place = {"seed": draw.seed, "layer": 3, "step": draw.index, "dtype": torch.float64}
    if isinstance(family, MaskLLM):
        g = gumbel_noise(p.numel(), **place).view(p.shape) if draw.noise else 0.0
        ways = candidates.candidates(*family.pattern).double()
        return (torch.softmax((draw.scale * p + g) / draw.temperature, -1) @ ways).view(SHAPE)
    g = logistic_noise(p.numel(), **place).view(p.shape) if draw.noise else 0.0
    z = (draw.scale * p + g) / draw.temperature
    if family.pattern is None:
        return (1.2 * torch.sigmoid(z) - 0.1).clamp(0, 1)
    keep, group = family.pattern
    return _projected(z.view(-1, group), keep).view(SHAPE)


def _projected(z: Tensor, keep: int) -> Tensor:
    """σ(z − c) that adds up to ``keep``: c by bisection, then one Newton step through which c has its gradient."""
    low, high = z.detach().min() - 60, z.detach().max() + 60
    low, high = low.expand(len(z), 1), high.expand(len(z), 1)
    for _ in range(200):
        c = (low + high) / 2
        surplus = torch.sigmoid(z.detach() - c).sum(1, keepdim=True) > keep
        low, high = torch.where(surplus, c, low), torch.where(surplus, high, c)
    mask = torch.sigmoid(z - c)
    slope = (mask * (1 - mask)).sum(1, keepdim=True).detach()
    return torch.sigmoid(z - c - (mask.sum(1, keepdim=True) - keep) / slope)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("noise", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [*FAMILIES, HardConcrete()], ids=[*NAMES, "hard-concrete"])
def test_forward_and_backward_are_those_of_the_formula(family: MaskFamily, dtype: torch.dtype, noise: bool) -> None:
    gate, weight, upstream = family.gate(), randn(*SHAPE), randn(*SHAPE, seed=2)
    draw = Draw(scale=1.7, temperature=0.6, noise=noise, seed=1 << 40, index=5)
    p = logits_of(family).to(dtype)
    wide = p.double().requires_grad_()
    mask = by_formula(family, wide, draw)
    opened = mask
    if family.pattern is None:
        opened = torch.sigmoid(1.7 * wide - 0.6 * math.log(0.1 / 1.1))
    sums = torch.stack([mask.sum(), (mask * weight.double()).square().sum(), opened.sum()])
    ((mask * weight * upstream).sum() + sums @ STATS_GRAD).backward()

    out = torch.empty(SHAPE)
    torch.testing.assert_close(gate.apply(weight, [p], MATRIX, draw, out), sums.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out, (mask * weight).detach().float(), rtol=1e-4, atol=1e-5)
    (grad,) = gate.backward(upstream.clone(), weight, [p], STATS_GRAD, MATRIX, draw)
    assert grad.dtype == dtype
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    assert wide.grad is not None
    largest = float(wide.grad.abs().max())
    torch.testing.assert_close(grad.double(), wide.grad, rtol=tolerance, atol=tolerance * largest)


@of_family
@pytest.mark.parametrize("temperature", [4.0, 0.3, 0.02, 1e-3])
def test_every_soft_mask_has_the_density_of_the_pattern(family: MaskFamily, temperature: float) -> None:
    draw = Draw(scale=1.0, temperature=temperature, noise=False, seed=0, index=0)
    keep, group = family.pattern
    out = torch.empty(SHAPE)
    family.gate().apply(torch.ones(SHAPE), [logits_of(family)], MATRIX, draw, out)
    torch.testing.assert_close(out.view(-1, group).sum(1), torch.full([SHAPE.numel() // group], float(keep)))
    assert family.fixed_density
    assert not family.shares_sparsity


@pytest.mark.parametrize("spread", [1e-6, 1.0, 30.0, 1e4])
@pytest.mark.parametrize(("keep", "group"), [(1, 2), (2, 4), (1, 8), (7, 8), (4, 16)])
def test_a_projection_adds_up_and_keeps_the_order(keep: int, group: int, spread: float) -> None:
    z = randn(500, group) * spread
    z[0], z[1, 1:] = 0.0, z[1, 0]
    mask = project(z, keep)
    torch.testing.assert_close(mask.sum(1), torch.full([500], float(keep)), rtol=1e-5, atol=1e-5)
    order = z.argsort(dim=1)
    assert (mask.gather(1, order).diff(dim=1) >= 0).all()


def test_the_ways_to_keep_two_of_four() -> None:
    ways = ["".join(str(int(bit)) for bit in way) for way in candidates.candidates(2, 4)]
    assert ways == ["1100", "1010", "1001", "0110", "0101", "0011"]
    assert candidates.candidates(4, 8).shape == (70, 8)
    assert len(candidates.candidates(4, 8).unique(dim=0)) == 70


def test_a_way_is_drawn_as_often_as_its_softmax_says() -> None:
    family = MaskLLM()
    matrix = Matrix(0, "a", torch.Size([20000, 4]))
    p = torch.tensor([0.5, -0.2, 0.1, 0.0, 0.9, -1.0]).expand(20000, 1, 6).contiguous()
    out = torch.empty(matrix.shape)
    draw = Draw(scale=2.0, temperature=1e-3, noise=True, seed=4, index=0)
    family.gate().apply(torch.ones(matrix.shape), [p], matrix, draw, out)
    expected = torch.softmax(2 * p[0, 0], -1) @ candidates.candidates(2, 4)
    torch.testing.assert_close(out.mean(0), expected, rtol=0, atol=0.015)
    mean = family.gate().mean(torch.ones(matrix.shape), [p], matrix, draw)
    torch.testing.assert_close(mean[0], expected)


def test_hard_concrete_gates_are_open_as_often_as_their_l0_says() -> None:
    matrix = Matrix(0, "a", torch.Size([3, 50000]))
    logits = torch.tensor([-2.0, 0.0, 1.5])[:, None].expand(matrix.shape).contiguous()
    out = torch.empty(matrix.shape)
    draw = Draw(scale=1.0, temperature=1 / 3, noise=True, seed=4, index=0)
    sums = HardConcrete().gate().apply(torch.ones(matrix.shape), [logits], matrix, draw, out)
    opened = torch.sigmoid(torch.tensor([-2.0, 0.0, 1.5]) - math.log(0.1 / 1.1) / 3)
    torch.testing.assert_close((out > 0).float().mean(1), opened, rtol=0, atol=0.01)
    assert float(sums[2]) == pytest.approx(float(opened.sum()) * 50000, rel=1e-5)
    assert (out == 1).any()


def prior_of(pattern: tuple[int, int]) -> PriorMask:
    score = randn(*SHAPE, seed=7)
    keep, group = pattern
    ranks = score.view(-1, group).argsort(dim=1, descending=True).argsort(dim=1)
    return PriorMask(MATRIX, (ranks < keep).view(SHAPE), score)


@of_family
def test_before_the_first_step_the_hard_mask_is_the_priors(family: MaskFamily) -> None:
    prior, strong = prior_of(family.pattern), replace(family, strength=12.0)
    gate = strong.gate()
    first = gate.initial("a", [prior], torch.Generator().manual_seed(0))
    hardener = gate.hardener(Layout.of(gate, [MATRIX]), lambda: [("a", first)], 1 - _density(family), _alone, True)
    if isinstance(family, Leap):  # graded by rank, the nearest to the threshold start within the noise
        first = replace(strong, grading="sign").gate().initial("a", [prior], torch.Generator().manual_seed(0))
    assert torch.equal(hardener.mask(MATRIX, [first]), prior.keep)


def test_as_published_most_groups_start_at_the_priors_way() -> None:
    """Three standard deviations of noise that each of six logits has: one group in eighteen starts elsewhere."""
    family, matrix = MaskLLM(), Matrix(0, "a", torch.Size([1000, 40]))
    keep = torch.tensor([True, False, False, True]).repeat(1000, 10)
    first = family.gate().initial("a", [PriorMask(matrix, keep, keep.float())], torch.Generator().manual_seed(0))
    ways = first.argmax(-1)
    assert float((ways == 2).float().mean()) == pytest.approx(0.945, abs=0.01)
    noise = torch.randn(first.shape, generator=torch.Generator().manual_seed(0)) * 0.01
    levels = (first - noise).mean((0, 1)) / noise.std()
    torch.testing.assert_close(levels, torch.tensor([0.0, 0.0, 3.0, -3.0, 0.0, 0.0]), rtol=0, atol=1e-4)


def _alone(values: Tensor) -> Tensor:
    return values


def _density(family: MaskFamily) -> float:
    keep, group = family.pattern
    return keep / group


@of_family
def test_hard_masks_are_legal_and_keep_the_largest(family: MaskFamily) -> None:
    gate, p = family.gate(), logits_of(family)
    layout = Layout.of(gate, [MATRIX])
    hardener = gate.hardener(layout, lambda: [("a", p)], 1 - _density(family), _alone, True)
    mask = hardener.mask(MATRIX, [p])
    assert mask.dtype == torch.bool
    keep, group = family.pattern
    assert (mask.view(-1, group).sum(1) == keep).all()
    cold = Draw(scale=1.0, temperature=1e-4, noise=False, seed=0, index=0)
    torch.testing.assert_close(gate.mean(torch.ones(SHAPE), [p], MATRIX, cold), mask.float(), rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match=f"pattern {keep}:{group} has sparsity"):
        gate.hardener(layout, lambda: [("a", p)], 0.6, _alone, True)
    with pytest.raises(ValueError, match="NaN"):
        hardener.mask(MATRIX, [p * math.nan])


@of_family
def test_a_group_of_weights_that_are_zero_has_no_gradient(family: MaskFamily) -> None:
    gate, weight, p = family.gate(), randn(*SHAPE), logits_of(family)
    weight[2, :8] = 0
    draw = Draw(scale=1.0, temperature=1.0, noise=True, seed=0, index=0)
    (grad,) = gate.backward(randn(*SHAPE), weight, [p], STATS_GRAD, MATRIX, draw)
    by_row = grad.view(SHAPE[0], SHAPE[1] // 8, -1)
    assert not by_row[2, 0].any()
    assert by_row[2, 1].any()


@of_family
def test_groups_that_do_not_divide_a_layer_are_refused_before_anything_starts(family: MaskFamily) -> None:
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=23, num_hidden_layers=1, num_attention_heads=1
    )
    model = LlamaForCausalLM(config).eval()
    settings = LearnSettings(family=family, steps=1)
    group = family.pattern[1]
    with pytest.raises(ValueError, match=f"mlp.down_proj: 23 columns do not split into groups of {group}"):
        leap.prune(model, torch.zeros(1, 4).long(), sparsity=1 - _density(family), settings=settings)


@pytest.mark.parametrize("family", [MaskLLM(), Leap(pattern=(2, 4)), HardConcrete()], ids=lambda family: family.kind)
def test_a_model_is_pruned_with_it(family: MaskFamily) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    rows = torch.randint(50, (4, 12), generator=torch.Generator().manual_seed(0))
    published = LearnSettings.published(family.kind)
    settings = replace(published, family=family, steps=3, batch_rows=2, microbatch_rows=1, learning_rate=0.05)
    result = leap.prune(model, rows, sparsity=0.5, settings=settings)
    zero, numel = leap.zeros(model)
    assert 2 * zero == numel
    if family.pattern:
        assert all((result.mask(name).view(-1, 4).sum(1) == 2).all() for name in result.layer_sparsity)
        assert all(step["density"] == pytest.approx(0.5) for step in result.history)
        assert "multiplier" not in result.history[-1]
    assert all(math.isfinite(step["loss"]) for step in result.history)
