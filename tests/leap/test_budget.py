"""Settings that follow from a budget."""

from __future__ import annotations

import warnings

import pytest
import torch

from leap.budget import Budget
from leap.settings import LearnSettings

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_without_one_the_steps_follow_from_the_rows() -> None:
    assert Budget().settings(4000, 512, 10**6, CPU) == LearnSettings.for_rows(4000, 10**6)
    assert Budget().tokens_to_read(512) == 8000 * 512


def test_steps_are_made_as_requested() -> None:
    settings = Budget(steps=40).settings(320, 512, 10**6, CPU)
    assert settings == LearnSettings.for_rows(320, 10**6).__class__(
        steps=40, learning_rate=settings.learning_rate, matrix_rate=settings.matrix_rate
    )
    assert Budget(steps=40).tokens_to_read(512) == 320 * 512


@pytest.mark.parametrize("length", [256, 512, 4096])
@pytest.mark.parametrize("tokens", [100_000, 3_000_000, 20_000_000, 2_000_000_000])
def test_tokens_are_spent_in_steps_of_a_sensible_size(tokens: int, length: int) -> None:
    settings = Budget(tokens=tokens).settings(10**7, length, 10**9, CPU)
    step = settings.batch_rows * length
    assert settings.steps * step == pytest.approx(tokens, rel=0.3 if tokens < 10**6 else 0.01)
    assert 8 * length <= step <= max(2**16, 8 * length)
    assert settings.steps <= 160 or step > 0.9 * 2**16
    assert Budget(tokens=tokens).tokens_to_read(length) == tokens


def test_a_gpu_gets_larger_passes_that_divide_a_step() -> None:
    settings = Budget(tokens=20_000_000).settings(10**6, 512, 10**9, GPU)
    assert settings.batch_rows % settings.microbatch_rows == 0
    assert 1 < settings.microbatch_rows <= 8
    assert Budget(steps=3).settings(24, 8192, 10**9, GPU).microbatch_rows == 1


def test_little_text_for_many_steps_is_said() -> None:
    with pytest.warns(UserWarning, match="they are gone over 80 times"):
        Budget(steps=100).settings(10, 512, 10**6, CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Budget(steps=100).settings(400, 512, 10**6, CPU)


@pytest.mark.parametrize(("given", "message"), [({"steps": 0}, "steps must"), ({"tokens": -1}, "tokens must")])
def test_a_budget_is_positive_and_one(given: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Budget(**given)
    with pytest.raises(ValueError, match="steps or tokens, not both"):
        Budget(steps=1, tokens=1)
