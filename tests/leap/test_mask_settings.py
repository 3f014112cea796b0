"""Schedules, and what a wrong setting is answered with."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest

from leap.families import Leap
from leap.schedules import Schedule, warmup_then_cosine
from leap.settings import DensityControl, LearnSettings


@pytest.mark.parametrize(("start", "end"), [(4.0, 0.05), (25.0, 350.0), (3.0, 3.0), (1.0, 1e-30)])
@pytest.mark.parametrize("shape", ["linear", "exponential", "cosine"])
def test_schedules_meet_their_ends_and_stay_between(shape, start, end):
    schedule = Schedule(start=start, end=end, shape=shape)
    assert schedule.at(0) == start
    assert schedule.at(1) == end
    values = [schedule.at(i / 100) for i in range(101)]
    assert all(min(start, end) * (1 - 1e-12) <= v <= max(start, end) * (1 + 1e-12) for v in values)
    assert values == sorted(values, reverse=start > end) or start == end


def test_shapes_of_schedules():
    assert Schedule(start=4, end=2).at(0.25) == pytest.approx(3.5)
    assert Schedule(start=8, end=2, shape="exponential").at(0.5) == pytest.approx(4)
    assert Schedule(start=4, end=2, shape="cosine").at(0.25) == pytest.approx(4 - 2 * (1 - math.sqrt(0.5)) / 2)


def test_learning_rate():
    factors = [warmup_then_cosine(step, 25, 5) for step in range(25)]
    assert factors[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert factors[15] == pytest.approx(0.5)
    assert factors[5:] == sorted(factors[5:], reverse=True)
    assert 0 < factors[-1] < 0.01, "the last step still does something"
    assert warmup_then_cosine(24, 25, 5, floor=0.3) == pytest.approx(0.3 + 0.7 * factors[-1])
    assert warmup_then_cosine(0, 1, 0) == 1.0


def test_the_published_settings_are_those_of_the_paper():
    settings = LearnSettings.published()
    family = settings.family
    assert (settings.steps, settings.batch_rows, family.noise, settings.distillation) == (2000, 256, True, 0)
    assert (settings.prior, family.grading, settings.matrix_rate) == ("wanda", "sign", 0)
    assert (settings.prior_scope, settings.clip) == ("row", 1)
    assert (family.scale.start, family.scale.end) == (25, 350)
    assert (family.temperature.start, family.temperature.end) == (4, 0.05)
    assert (settings.density.kind, settings.density.weight, settings.weight_reward) == ("penalty", 7, 10)
    assert (settings.learning_rate, settings.betas, family.init_std, family.strength) == (1e-3, (0.9, 0.95), 0.014, 3)
    assert LearnSettings.published(batch_rows=12, microbatch_rows=3).microbatches == 4
    assert LearnSettings.published().with_family(noise=False).family == replace(family, noise=False)


def test_the_published_settings_owe_nothing_to_the_defaults():
    """Whoever changes a default does not change what was published: all that the paper fixes differs or is pinned."""
    defaults, published = LearnSettings(), LearnSettings.published()
    same = {f.name for f in fields(LearnSettings) if getattr(defaults, f.name) == getattr(published, f.name)}
    assert same == {
        "microbatch_rows",
        "prior_scope",
        "weights",
        "optimiser",
        "warmup_steps",
        "final_rate",
        "betas",
        "hidden_distillation",
        "seed",
    }
    same = {f.name for f in fields(Leap) if getattr(defaults.family, f.name) == getattr(published.family, f.name)}
    assert same == {"kind", "pattern", "scope"}


@pytest.mark.parametrize(
    ("rows", "weights", "steps", "rate"),
    [(64, 1_000_000, 100, 0.1), (64, 10_000, 100, 0.1), (4000, 106_000_000, 500, 0.01), (10**6, 8 * 10**9, 1000, 0.01)],
)
def test_steps_follow_from_rows_and_their_size_from_the_model(rows, weights, steps, rate):
    settings = LearnSettings.for_rows(rows, weights)
    assert (settings.steps, settings.learning_rate) == (steps, pytest.approx(rate))
    assert settings == replace(
        LearnSettings(), steps=steps, learning_rate=settings.learning_rate, matrix_rate=settings.matrix_rate
    )
    assert 0.05 <= settings.matrix_rate <= 0.1


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Schedule(start=0, end=1), "start and end must be positive and finite, not 0 and 1"),
        (lambda: Schedule(start=1, end=math.nan), "start and end must be positive"),
        (lambda: Schedule(start=1, end=2, shape="steps"), "shape must be one of linear, exponential, cosine, not 'st"),
        (lambda: DensityControl(weight=-1), "weight must be finite and not negative, not -1"),
        (lambda: DensityControl(weight=math.nan), "weight must be finite"),
        (lambda: DensityControl(relaxation=0), "relaxation must be positive and finite, not 0"),
        (lambda: DensityControl(kind="pid"), "kind must be one of penalty, lagrangian, not 'pid'"),
        (lambda: DensityControl(of="hard"), "of must be one of sampled, expected, not 'hard'"),
        (lambda: LearnSettings(steps=0), "steps must be at least 1, not 0"),
        (lambda: LearnSettings(microbatch_rows=0), "microbatch_rows must be at least 1"),
        (lambda: LearnSettings(batch_rows=5, microbatch_rows=2), "batch_rows 5 is not a multiple of microbatch_rows 2"),
        (lambda: LearnSettings(steps=1 << 31, batch_rows=4), "exceed the noise's 2\\*\\*32 draws"),
        (lambda: LearnSettings(prior="wandda"), "prior must be one of magnitude, .*, optima, not 'wandda'"),
        (lambda: Leap(grading="linear"), "grading must be one of sign, rank, not 'linear'"),
        (lambda: Leap(scope="column"), "scope must be one of global, layer, row, not 'column'"),
        (lambda: Leap(strength=-1), "strength must be finite and not negative, not -1"),
        (lambda: LearnSettings(weight_reward=math.inf), "weight_reward must be finite and not negative"),
        (lambda: LearnSettings(warmup_steps=-1), "warmup_steps must be finite and not negative"),
        (lambda: LearnSettings(matrix_rate=-0.1), "matrix_rate must be finite and not negative, not -0.1"),
        (lambda: Leap(init_std=0), "init_std must be positive and finite, not 0"),
        (lambda: LearnSettings(learning_rate=math.nan), "learning_rate must be positive and finite, not nan"),
        (lambda: LearnSettings(distillation=1.5), r"distillation must lie in \[0, 1\], not 1.5"),
        (lambda: LearnSettings(final_rate=-0.1), r"final_rate must lie in \[0, 1\], not -0.1"),
        (lambda: LearnSettings(betas=(0.9, 1.0)), r"betas must lie in \[0, 1\), not \(0.9, 1.0\)"),
        (lambda: LearnSettings(seed=-1), r"seed must lie in \[0, 2\*\*64\), not -1"),
    ],
)
def test_a_wrong_value_is_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_ends_of_the_ranges_are_allowed():
    Leap(strength=0)
    LearnSettings(distillation=1, final_rate=1, weight_reward=0, warmup_steps=0)
    LearnSettings(optimiser="adam", betas=(0, 0))
    LearnSettings(steps=1 << 24, batch_rows=256, seed=2**64 - 1)
    DensityControl(weight=0)
