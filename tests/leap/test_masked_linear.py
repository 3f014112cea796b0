"""One masked layer: gradients against float64 autograd of the formula, what is saved, and what each mode computes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from leap_kernels import logistic_noise
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from leap.gates import Draw, GateState, Layout, Matrix
from leap.harden import RankHardener
from leap.masked_linear import MaskedLinear, install_masks, masks_installed
from leap.settings import LearnSettings

GATE = LearnSettings.published().family.gate()
# Upstream gradients of the three sums, of the size they have in training and larger.
STATS_GRAD = torch.tensor([0.7, -0.3, 1.1], dtype=torch.float64)


def draw(noise: bool = True, index: int = 11) -> Draw:
    return Draw(scale=60.0, temperature=0.7, noise=noise, seed=0xDEAD_BEEF_0123, index=index)


def layer(out_features: int, in_features: int, bias: bool = True, noise: bool = True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(out_features * 1000 + in_features)
    linear = nn.Linear(in_features, out_features, bias=bias)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    matrix = Matrix(5, "five", linear.weight.shape)
    state = GateState(GATE, Layout.of(GATE, [matrix]), mode="sampled", draw=draw(noise), collecting=True)
    masked = MaskedLinear(linear.to(dtype).requires_grad_(False), matrix, state)
    masked.provide([nn.Parameter(torch.randn(out_features, in_features, generator=generator) * 0.03)])
    return masked, generator


def by_formula(masked: MaskedLinear, x: Tensor, upstream: Tensor, d: Draw) -> tuple[Tensor, ...]:
    """(y, sums, dL/dx, dL/dP) in float64, with L = Σ upstream·y + STATS_GRAD·sums."""
    x = x.detach().double().requires_grad_()
    logits = masked.logits_0.detach().double().requires_grad_()
    weight = masked.weight.detach().double()
    g: Tensor | float = 0.0
    if d.noise:
        g = logistic_noise(logits.numel(), seed=d.seed, layer=5, step=d.index, dtype=torch.float64).view(logits.shape)
    mask = torch.sigmoid((d.scale * logits + g) / d.temperature)
    y = x @ (mask * weight).t()
    if masked.bias is not None:
        y = y + masked.bias.detach().double()
    sums = torch.stack([mask.sum(), (mask * weight).square().sum(), torch.sigmoid(d.scale * logits).sum()])
    grads = torch.autograd.grad((y * upstream.double()).sum() + (sums * STATS_GRAD).sum(), (x, logits))
    return y.detach(), sums.detach(), *grads


def run(masked: MaskedLinear, x: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    """The same four from the layer."""
    x = x.detach().requires_grad_()
    y = masked(x)
    (sums,) = masked.state.stats
    masked.state.stats.clear()
    grads = torch.autograd.grad((y * upstream).sum() + (sums * STATS_GRAD).sum(), (x, masked.logits_0))
    return y.detach(), sums.detach(), *grads


@pytest.mark.parametrize("noise", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (33, 65), (64, 48)])
def test_gradients_are_those_of_the_formula(shape, bias, noise):
    masked, generator = layer(*shape, bias=bias, noise=noise)
    x = torch.randn(2, 3, shape[1], generator=generator)
    upstream = torch.randn(2, 3, shape[0], generator=generator)
    for ours, expected in zip(run(masked, x, upstream), by_formula(masked, x, upstream, draw(noise)), strict=True):
        scale = float(expected.abs().max())
        torch.testing.assert_close(ours.double(), expected, rtol=2e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("part", [0, 1, 2])
def test_each_sum_alone_has_its_gradient(part):
    masked, generator = layer(9, 14)
    masked(torch.randn(2, 14, generator=generator))
    masked.state.stats.pop()[part].backward()
    logits = masked.logits_0.detach().double().requires_grad_()
    g = logistic_noise(logits.numel(), seed=draw().seed, layer=5, step=11, dtype=torch.float64).view(logits.shape)
    mask = torch.sigmoid((60 * logits + g) / 0.7)
    sums = mask.sum(), (mask * masked.weight.double()).square().sum(), torch.sigmoid(60 * logits).sum()
    sums[part].backward()
    torch.testing.assert_close(masked.logits_0.grad.double(), logits.grad, rtol=1e-4, atol=1e-6)


def test_bfloat16_stays_within_its_rounding():
    masked, generator = layer(40, 56, dtype=torch.bfloat16)
    x = torch.randn(6, 56, generator=generator).bfloat16()
    upstream = torch.randn(6, 40, generator=generator).bfloat16()
    ours = run(masked, x, upstream)
    assert [t.dtype for t in ours] == [torch.bfloat16, torch.float64, torch.bfloat16, torch.float32]
    for got, expected in zip(ours, by_formula(masked, x, upstream, draw()), strict=True):
        # 2⁻⁸ per rounding, of M⊙W or its gradient and of the result, against the largest element.
        assert float((got.double() - expected).abs().max()) < 0.02 * float(expected.abs().max())


def test_no_gradient_for_an_input_that_wants_none():
    masked, generator = layer(6, 10)
    masked(torch.randn(3, 10, generator=generator)).sum().backward()
    assert masked.logits_0.grad is not None
    assert masked.weight.grad is None


def test_an_empty_batch_as_an_expert_may_get():
    masked, _ = layer(6, 10)
    x = torch.empty(0, 10, requires_grad=True)
    masked(x).sum().backward()
    assert x.grad.shape == (0, 10)
    assert not masked.logits_0.grad.any()


def test_only_the_input_and_the_parameters_are_saved_for_backward():
    masked, generator = layer(40, 24)
    x = torch.randn(5, 24, generator=generator, requires_grad=True)
    saved: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        masked(x)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in (x, masked.weight, masked.logits_0)}
    assert len(saved) == 3


@pytest.mark.parametrize("noise", [True, False])
def test_forward_and_backward_draw_the_same_mask(noise):
    masked, _ = layer(21, 21, bias=False, noise=noise)
    eye = torch.eye(21, requires_grad=True)
    y = masked(eye)  # (M⊙W)ᵀ, to the bit
    (grad,) = torch.autograd.grad(y, eye, torch.eye(21))  # M⊙W
    assert torch.equal(y.t(), grad)
    masked.state.draw = draw(noise, index=12)
    assert torch.equal(masked(eye), y) != noise


def test_the_draw_of_the_forward_pass_holds_in_backward():
    masked, generator = layer(8, 12)
    x, upstream = torch.randn(4, 12, generator=generator), torch.randn(4, 8, generator=generator)
    expected = run(masked, x, upstream)[3]
    y = masked(x)
    (sums,) = masked.state.stats
    masked.state.draw = draw(index=99)
    loss = (y * upstream).sum() + (sums * STATS_GRAD).sum()
    assert torch.equal(torch.autograd.grad(loss, masked.logits_0)[0], expected)


def test_checkpointing_gives_the_same_gradients_and_counts_each_layer_once():
    masked, generator = layer(12, 12)
    x = torch.randn(4, 12, generator=generator)
    results = []
    for recompute in (False, True):
        masked.state.collecting = True
        inputs = x.clone().requires_grad_()
        hidden = checkpoint(masked, inputs, use_reentrant=False) if recompute else masked(inputs)
        masked.state.collecting = False
        (sums,) = masked.state.stats
        loss = hidden.square().sum() + (sums * STATS_GRAD).sum()
        results.append((loss.detach(), *torch.autograd.grad(loss, (inputs, masked.logits_0))))
        assert len(masked.state.stats) == 1, "recomputing must not add to the sums"
        masked.state.stats.clear()
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


def test_second_derivatives_are_refused():
    masked, generator = layer(4, 4)
    x = torch.randn(2, 4, generator=generator, requires_grad=True)
    (grad,) = torch.autograd.grad(masked(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_modes():
    masked, generator = layer(6, 10)
    x = torch.randn(3, 10, generator=generator)
    state, weight, logits = masked.state, masked.weight, masked.logits_0.detach()

    state.mode = "dense"
    assert torch.equal(masked(x), F.linear(x, weight, masked.bias))
    state.mode = "mean"
    expected = F.linear(x, weight * torch.sigmoid(60 * logits), masked.bias)
    torch.testing.assert_close(masked(x), expected)
    state.draw = draw(noise=False)
    expected = F.linear(x, weight * torch.sigmoid(60 * logits / 0.7), masked.bias)
    torch.testing.assert_close(masked(x), expected)
    state.mode, state.harden = "hard", RankHardener(0.5, "row")
    keep = logits >= logits.sort(dim=1).values[:, 5:6]
    assert torch.equal(masked(x), F.linear(x, weight * keep, masked.bias))

    state.draw = state.harden = None
    for mode in ("sampled", "mean", "hard"):
        state.mode = mode
        with pytest.raises(RuntimeError, match="before a forward pass in the mode " + mode):
            masked(x)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2))
        self.head = nn.Linear(4, 3)


def test_installing_freezes_and_takes_over_the_parameters():
    model = Stack()
    before = dict(model.named_parameters())
    state, layers = install_masks(model.eval(), GATE)
    assert list(layers) == ["blocks.0.0", "blocks.1.0"]
    assert [m.matrix.number for m in layers.values()] == [0, 1]
    assert state.mode == "dense"
    assert [(m.name, m.shape) for m in state.layout.matrices] == [(name, (4, 4)) for name in layers]
    assert not any(m.training for m in layers.values())
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is p and not p.requires_grad for name, p in before.items())


@pytest.mark.parametrize("fails", [True, False])
def test_masks_leave_no_trace_after_their_context(fails):
    model = Stack()
    model.head.requires_grad_(False)
    linears, flags = list(model.modules()), [p.requires_grad for p in model.parameters()]
    try:
        with masks_installed(model, GATE) as (_, layers):
            assert model.blocks[0][0] is layers["blocks.0.0"]
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert list(model.modules()) == linears
    assert [p.requires_grad for p in model.parameters()] == flags
