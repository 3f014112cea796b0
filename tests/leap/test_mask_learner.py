"""The objective against formulas written out here, the density controller, and the split over workers."""

from __future__ import annotations

import math
import threading
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from leap_kernels import logistic_noise
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from leap.engine import LocalEngine
from leap.gates import PriorMask
from leap.harden import RankHardener, ranked
from leap.learner import MaskLearner, NonFiniteLossError
from leap.masked_linear import install_masks, logit_tensors
from leap.settings import DensityControl, LearnSettings
from leap.surgery import NotRunError

ROWS = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(3))
SETTINGS = LearnSettings.published(steps=20, batch_rows=4, microbatch_rows=1, learning_rate=0.02, seed=17)
LAGRANGIAN = DensityControl(kind="lagrangian", weight=30.0, relaxation=0.2)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 13), nn.Linear(13, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Toy(nn.Module):
    """Predicts the next token from the last alone. ids [R, S] → logits [R, S, 11]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.reentrant: bool | None = None

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            if self.reentrant is None:
                x = block(x)
            else:
                x = checkpoint(block, x.requires_grad_(), use_reentrant=self.reentrant)
        return self.head(x)


def make(settings: LearnSettings = SETTINGS, density: float = 0.4, hidden_forward=None, reduce=None, world=1):
    """(learner, masked toy model, its logits); ``reduce`` stands for the sum over ``world`` processes."""
    model = Toy()
    gate = settings.family.gate()
    state, layers = install_masks(model, gate)
    for number, layer in enumerate(layers.values()):
        generator = torch.Generator().manual_seed(number)
        keep = torch.rand(layer.weight.shape, generator=generator) < density
        priors = [PriorMask(layer.matrix, keep, keep.float())]
        layer.provide([nn.Parameter(gate.initial(layer.matrix.name, priors, generator))])
    engine = LocalEngine(model, state, layers, model_hidden_forward=hidden_forward)
    engine.world, engine.reduce = world, reduce or engine.reduce
    learner = MaskLearner(engine, settings, [density])
    return learner, model, list(logit_tensors(layers).values())


def by_formula(settings: LearnSettings, multiplier: float, step: int, microbatch: int, density: float = 0.4):
    """(total, gradients, parts) in float64, from method.md, section 1, and the head of leap/learner.py."""
    _, masked, _ = make(settings, density)
    model = Toy().double()
    progress = step / (settings.steps - 1)
    kappa, tau = 25 + progress * 325, 4 + progress * (0.05 - 4)
    sampled = expected = norm = dense_norm = torch.zeros((), dtype=torch.float64)
    numel, leaves, weights = 0, [], {}
    for number, name in enumerate(("blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down")):
        weight = model.get_submodule(name).weight.detach()
        logits = masked.get_submodule(name).logits_0.detach().double().requires_grad_()
        leaves.append(logits)
        g = logistic_noise(
            weight.numel(), seed=17, layer=number, step=step * 4 + microbatch, dtype=torch.float64
        ).view_as(weight)
        mask = torch.sigmoid((kappa * logits + (g if settings.family.noise else 0)) / tau)
        weights[f"{name}.weight"] = mask * weight
        sampled, expected = sampled + mask.sum(), expected + torch.sigmoid(kappa * logits).sum()
        norm, dense_norm = norm + (mask * weight).norm(), dense_norm + weight.norm()
        numel += weight.numel()
    rows = ROWS[microbatch : microbatch + 1]
    out, teacher = torch.func.functional_call(model, weights, (rows,)), model(rows).detach()
    parts = {
        "lm_loss": F.cross_entropy(out[:, :-1].flatten(0, 1), rows[:, 1:].flatten()),
        "density": sampled / numel,
        # A gate without noise is no sample: it is its own expectation.
        "expected_density": (expected if settings.family.noise else sampled) / numel,
        "norm": norm / dense_norm,
        "divergence": (teacher.softmax(-1) * (teacher.log_softmax(-1) - out.log_softmax(-1))).sum(-1).mean(),
    }
    gap = parts["density" if settings.density.of == "sampled" else "expected_density"] - density
    if settings.density.kind == "penalty":
        control = settings.density.weight * abs(gap)
    else:
        control = multiplier * gap + settings.density.weight / 2 * gap**2
    d = settings.distillation
    total = (1 - d) * parts["lm_loss"] + d * parts["divergence"] + control
    total = total - settings.weight_reward * (1 - step / settings.steps) * parts["norm"]
    return (
        total.detach(),
        torch.autograd.grad(total, leaves),
        {name: float(part.detach()) for name, part in parts.items()},
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"family": replace(SETTINGS.family, noise=False)},
        {"distillation": 0.3},
        {"distillation": 1.0, "weight_reward": 0.0},
        {"density": DensityControl(of="expected")},
        {"density": LAGRANGIAN},
        {"density": replace(LAGRANGIAN, of="expected"), "distillation": 0.5},
    ],
    ids=lambda changes: "-".join(changes) or "default",
)
def test_the_loss_and_its_gradient_are_those_of_the_formula(changes):
    settings = replace(SETTINGS, **changes)
    for step, microbatch in ((0, 0), (7, 3)):
        learner, _, logits = make(settings)
        learner.multipliers = [1.7]
        total = learner.loss(ROWS[microbatch : microbatch + 1], step, microbatch)
        grads = torch.autograd.grad(total, logits)
        expected, expected_grads, parts = by_formula(settings, 1.7, step, microbatch)
        torch.testing.assert_close(total.detach().double(), expected, rtol=1e-5, atol=1e-6)
        for ours, theirs in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-5 * float(theirs.abs().max()))
        metrics = learner.finish_step(step)
        assert ("divergence" in metrics) == (settings.distillation > 0)
        for name in metrics.keys() & parts.keys():
            assert metrics[name] == pytest.approx(parts[name], rel=1e-5), name
        assert metrics["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_the_teacher_is_the_dense_model():
    learner, model, _ = make(replace(SETTINGS, distillation=0.5))
    seen = []

    def forward(rows: Tensor) -> Tensor:
        out = model(rows)
        seen.append((learner.engine.state.mode, torch.is_grad_enabled(), out.detach()))
        return out

    learner.engine.forward = forward
    learner.loss(ROWS, 0, 0).backward()
    (mode, with_grad, teacher), (mode_2, with_grad_2, _) = seen
    assert (mode, with_grad, mode_2, with_grad_2) == ("dense", False, "sampled", True)
    assert torch.equal(teacher, Toy()(ROWS))


def test_metrics_are_means_over_the_microbatches():
    learner, _, _ = make()
    values = [learner.loss(ROWS[i : i + 1], 2, i).item() for i in range(4)]
    metrics = learner.finish_step(2)
    assert metrics["loss"] == pytest.approx(sum(values) / 4)
    assert metrics["temperature"] == pytest.approx(4 - 3.95 * 2 / 19)
    assert metrics["scale"] == pytest.approx(25 + 325 * 2 / 19)
    learner.loss(ROWS[:1], 3, 0)
    assert learner.finish_step(3)["loss"] == pytest.approx(learner.loss(ROWS[:1], 3, 0).item()), "starts afresh"


def test_every_microbatch_of_the_run_draws_its_own_noise():
    learner, _, _ = make()
    draws = {learner.draw(step, microbatch).index for step in range(20) for microbatch in range(4)}
    assert draws == set(range(80))


def test_activation_checkpointing_changes_nothing():
    results = []
    for reentrant in (None, False):
        learner, model, logits = make(replace(SETTINGS, distillation=0.5))
        model.reentrant = reentrant
        loss = learner.loss(ROWS, 1, 2)
        loss.backward()
        results.append((loss.detach(), *(p.grad for p in logits)))
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


def test_reentrant_checkpointing_which_loses_gradients_is_refused():
    learner, model, _ = make()
    model.reentrant = True
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        learner.loss(ROWS, 0, 0)


@pytest.mark.parametrize("times", [0, 2])
def test_a_layer_that_does_not_run_once_is_refused(times):
    learner, model, _ = make()
    block = model.blocks[1]
    block.forward = lambda x: x if times == 0 else Block.forward(block, Block.forward(block, x))
    with pytest.raises(NotRunError, match=f"4 layers are masked, but {2 + 2 * times} ran"):
        learner.loss(ROWS, 0, 0)
    assert not learner.engine.state.collecting


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_an_error(value):
    learner, _, _ = make()
    learner.engine.forward = lambda rows, model=learner.engine.forward: model(rows) * value
    learner.loss(ROWS, 4, 0)
    with pytest.raises(NonFiniteLossError, match="step 4"):
        learner.finish_step(4)


def test_so_is_that_of_another_worker():
    learner, _, _ = make(reduce=lambda values: values * math.nan)
    learner.loss(ROWS, 0, 0)
    with pytest.raises(NonFiniteLossError):
        learner.finish_step(0)


@pytest.mark.parametrize("density", [0.2, 0.8])
def test_the_multiplier_moves_with_the_gap(density):
    learner, _, _ = make(replace(SETTINGS, density=LAGRANGIAN), density=0.4)
    learner.densities = (density,)
    learner.multipliers = [0.5]
    learner.loss(ROWS, 0, 0)
    metrics = learner.finish_step(0)
    gap = metrics["density"] - density
    assert (gap > 0) == (density == 0.2)
    # λ += c·gap / (relaxation·steps): too dense, and density gets more expensive.
    assert metrics["multiplier"] == learner.multipliers[0] == pytest.approx(0.5 + 30 * gap / (0.2 * 20))
    assert "multiplier" not in _first_metrics(SETTINGS)


@pytest.mark.parametrize("distillation", [0.0, 0.5])
def test_hidden_states_are_those_of_the_dense_model_relative_to_their_variance(distillation):
    settings = replace(SETTINGS, hidden_distillation=0.7, distillation=distillation)
    seen = []

    def hidden_forward(rows: Tensor) -> tuple[Tensor, list[Tensor]]:
        x, states = model.embed(rows), []
        for block in model.blocks:
            x = block(x)
            states.append(x)
        seen.append((learner.engine.state.mode, states))
        return model.head(x), states

    learner, model, logits = make(settings, hidden_forward=hidden_forward)
    loss = learner.loss(ROWS, 3, 0)
    (teacher_mode, teacher), (student_mode, student) = seen
    assert (teacher_mode, student_mode) == ("dense", "sampled")
    assert not any(state.requires_grad for state in teacher)
    distances = [
        (ours.double() - theirs.double()).square().sum() / (theirs.double() - theirs.double().mean()).square().sum()
        for ours, theirs in zip(student, teacher, strict=True)
    ]
    plain, _, plain_logits = make(replace(settings, hidden_distillation=0.0))
    without = plain.loss(ROWS, 3, 0)
    distance = torch.stack(distances).mean()
    torch.testing.assert_close(loss.double() - without.double(), 0.7 * distance, rtol=1e-4, atol=1e-5)
    assert learner.finish_step(3)["hidden_divergence"] == pytest.approx(distance.item(), rel=1e-4)
    extra = torch.autograd.grad(0.7 * distance, logits, retain_graph=True)
    grads = torch.autograd.grad(loss, logits)
    for ours, of_plain, more in zip(grads, torch.autograd.grad(without, plain_logits), extra, strict=True):
        torch.testing.assert_close(ours, of_plain + more, rtol=1e-3, atol=1e-5 * float(ours.abs().max()))


def _first_metrics(settings: LearnSettings) -> dict[str, float]:
    learner, _, _ = make(settings)
    learner.loss(ROWS, 0, 0)
    return learner.finish_step(0)


class Workers:
    """Threads that stand for processes: a sum over all of them, as an all-reduce gives it."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._barrier, self._parts = threading.Barrier(world, timeout=600), [torch.empty(0)] * world

    def total(self, rank: int, values: Tensor) -> Tensor:
        self._parts[rank] = values.clone()
        self._barrier.wait()
        result = sum(self._parts[1:], self._parts[0])
        self._barrier.wait()
        return result

    def train(self, rank: int, made: tuple, steps: int, results: list) -> None:
        learner, _, logits = made
        settings = learner.settings
        optimiser = torch.optim.AdamW(logits, lr=settings.learning_rate, betas=settings.betas, weight_decay=0.0)
        share = settings.microbatches // self.world
        history = []
        for step in range(steps):
            optimiser.zero_grad()
            for microbatch in range(rank * share, (rank + 1) * share):
                first = microbatch * settings.microbatch_rows
                loss = learner.loss(ROWS[first : first + settings.microbatch_rows], step, microbatch)
                (loss / share).backward()
            history.append(learner.finish_step(step))
            for parameter in logits:
                parameter.grad = self.total(rank, parameter.grad) / self.world
            optimiser.step()
        results[rank] = history, [p.detach() for p in logits]

    def run(self, settings: LearnSettings, steps: int) -> list:
        results: list = [None] * self.world
        made = [
            make(settings, reduce=lambda values, rank=rank: self.total(rank, values), world=self.world)
            for rank in range(self.world)
        ]
        threads = [
            threading.Thread(target=self.train, args=(rank, made[rank], steps, results)) for rank in range(self.world)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


def test_the_trajectory_does_not_depend_on_the_number_of_workers():
    settings = replace(SETTINGS, density=LAGRANGIAN, distillation=0.5)
    ((alone, alone_logits),) = Workers(1).run(settings, steps=8)
    (first, first_logits), (second, second_logits) = Workers(2).run(settings, steps=8)
    assert first == second, "all workers see the same metrics and multiplier"
    for one, two in zip(first_logits, second_logits, strict=True):
        assert torch.equal(one, two)
    for one, two in zip(alone, first, strict=True):
        assert one == pytest.approx(two, rel=1e-4)
    for one, two in zip(alone_logits, first_logits, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


def test_without_noise_neither_does_it_depend_on_the_size_of_a_microbatch():
    settings = replace(SETTINGS, density=LAGRANGIAN).with_family(noise=False)
    ((singles, one),) = Workers(1).run(settings, steps=8)
    ((pairs, two),) = Workers(1).run(replace(settings, microbatch_rows=2), steps=8)
    for a, b in zip(singles, pairs, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_losses_with_the_sampled_the_mean_and_the_hard_mask():
    learner, model, logits = make(reduce=lambda values: values * 2)
    hardener = RankHardener(0.5, "layer")
    batches = [ROWS[:2], ROWS[2:]]
    losses = learner.mask_losses(batches, 5, hardener)
    assert list(losses) == ["sampled", "mean", "hard"]
    draw, masks = learner.draw(5, 0), {}
    for number, (name, p) in enumerate(zip(("0.up", "0.down", "1.up", "1.down"), logits, strict=True)):
        g = logistic_noise(p.numel(), seed=17, layer=number, step=draw.index).view_as(p)
        masks[name] = {
            "sampled": torch.sigmoid((draw.scale * p + g) / draw.temperature),
            "mean": torch.sigmoid(draw.scale * p),
            "hard": hardener.mask(learner.engine.state.layout.matrices[number], [p]).float(),
        }
    for mode, loss in losses.items():
        dense = Toy()
        with torch.no_grad():
            for name, of_layer in masks.items():
                dense.get_submodule(f"blocks.{name}").weight.mul_(of_layer[mode])
            values = [F.cross_entropy(dense(b)[:, :-1].flatten(0, 1), b[:, 1:].flatten()) for b in batches]
        assert loss == pytest.approx(2 * float(sum(values)) / 2, rel=1e-5), mode
    assert not learner.engine.state.stats
    assert all(p.grad is None for p in model.parameters())


DENSITIES = (0.6, 0.4, 0.2)


def make_nested(settings: LearnSettings):
    """(learner for DENSITIES, its logits, an entry for each pass over them)."""
    learner, _, logits = make(settings)
    learner.densities, learner.multipliers = DENSITIES, [0.3, -0.2, 1.1]
    passes = []

    def local_logits() -> list[tuple[str, Tensor]]:
        passes.append(None)
        return list(zip(learner.engine.state.layout.shapes, logits, strict=True))

    learner.engine.local_logits = local_logits
    return learner, logits, passes


def _cut(logits: list[Tensor], density: float) -> float:
    values = torch.cat([p.detach().flatten() for p in logits]).sort().values
    return float(values[round((1 - density) * len(values)) - 1])


def test_of_several_densities_every_so_many_steps_train_each_once():
    learner, _, _ = make_nested(SETTINGS)
    order = [learner.target(step) for step in range(60)]
    assert all(set(order[first : first + 3]) == {0, 1, 2} for first in range(0, 60, 3))
    assert len({tuple(order[first : first + 3]) for first in range(0, 60, 3)}) > 3, "in an order drawn anew"
    assert order == [make_nested(SETTINGS)[0].target(step) for step in range(60)]


@pytest.mark.parametrize("noise", [True, False])
def test_a_nested_step_is_the_step_of_its_density_on_logits_above_the_cut(noise):
    settings = replace(SETTINGS, density=LAGRANGIAN, distillation=0.5).with_family(noise=noise)
    for step in range(3):
        learner, logits, passes = make_nested(settings)
        target = learner.target(step)
        loss = learner.loss(ROWS[:1], step, 0)
        looked = len(passes)
        learner.loss(ROWS[:1], step, 1)
        assert len(passes) == looked > 0, "the cut is looked for once a step"
        grads = torch.autograd.grad(loss, logits)

        alone, _, shifted = make(settings, density=DENSITIES[target])
        alone.multipliers = [learner.multipliers[target]]
        with torch.no_grad():
            for ours, theirs in zip(shifted, logits, strict=True):
                ours.copy_(theirs - _cut(logits, DENSITIES[target]))
        expected = alone.loss(ROWS[:1], step, 0)
        assert torch.equal(loss, expected)
        for ours, theirs in zip(grads, torch.autograd.grad(expected, shifted), strict=True):
            assert torch.equal(ours, theirs)

        before, gap = list(learner.multipliers), alone.finish_step(step)["density"] - DENSITIES[target]
        learner, _, _ = make_nested(settings)
        learner.loss(ROWS[:1], step, 0)
        metrics = learner.finish_step(step)
        assert metrics["target_density"] == DENSITIES[target]
        # Its share of the 20 steps.
        before[target] += 30 * gap / (0.2 * 20 / 3)
        assert learner.multipliers == pytest.approx(before)
        assert metrics["multiplier"] == learner.multipliers[target]


def test_the_masks_that_a_nested_run_is_watched_with_open_at_the_cut_of_their_hardener():
    learner, logits, _ = make_nested(SETTINGS.with_family(noise=False))
    hardener = learner.hardener(0.8)
    losses = learner.mask_losses([ROWS], 5, hardener)
    alone, _, shifted = make(SETTINGS.with_family(noise=False), density=0.2)
    with torch.no_grad():
        for ours, theirs in zip(shifted, logits, strict=True):
            ours.copy_(theirs - hardener.offset)
    expected = alone.mask_losses([ROWS], 5, ranked(lambda: shifted, 0.8, "global", exact=False))
    assert losses == pytest.approx(expected, rel=1e-6)
