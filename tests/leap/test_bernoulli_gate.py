"""First logits of LEAP's gate."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from leap.gates import Draw, Gate, Matrix, PriorMask
from leap.settings import LearnSettings

OUT, IN = 60, 70


def prior(density: float = 0.3) -> tuple[Tensor, Tensor]:
    score = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1)).exp()
    return score >= score.flatten().kthvalue(round((1 - density) * score.numel()) + 1).values, score


def initial(keep: Tensor, score: Tensor, **changes) -> Tensor:
    return start(gate(**changes), keep, score, torch.Generator().manual_seed(9))


def gate(**changes) -> Gate:
    return LearnSettings.published().with_family(**changes).family.gate()


def matrix(number: int, like: Tensor) -> Matrix:
    return Matrix(number, "a", like.shape)


def start(gate: Gate, keep: Tensor, score: Tensor, generator: torch.Generator) -> Tensor:
    return gate.initial("a", [PriorMask(matrix(0, keep), keep, score)], generator)


def noise(std: float = 0.014) -> Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(9)) * std


def test_graded_by_sign_every_weight_starts_equally_far():
    keep, score = prior()
    logits = initial(keep, score)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits - noise(), torch.where(keep, 0.042, -0.042))


def test_the_gaussian_has_the_asked_spread():
    keep, score = prior()
    spread = initial(keep, score, init_std=0.2) - torch.where(keep, 0.6, -0.6)
    assert float(spread.std()) == pytest.approx(0.2, rel=0.05)
    assert torch.equal(initial(keep, score), initial(keep, score)), "the generator decides"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graded_by_rank_order_follows_the_score_and_the_mean_distance_stays(dtype):
    keep, score = prior()
    score = score.to(dtype)
    distance = (initial(keep, score, grading="rank") - noise()).double()
    assert torch.equal(distance > 0, keep)
    for part in (keep, ~keep):
        assert float(distance[part].abs().mean()) == pytest.approx(0.042, rel=1e-4)
        assert 0 < float(distance[part].abs().min()) < 1e-4
        assert float(distance[part].abs().max()) == pytest.approx(0.084, rel=1e-3)
        ordered = distance[part][score[part].float().argsort(stable=True)]
        steps = ordered.diff()
        if dtype == torch.float32:
            assert (steps > 0).all(), "logits rise with the score"
            torch.testing.assert_close(steps, steps.mean().expand_as(steps), rtol=0.02, atol=1e-8)
        else:  # among equal scores any order will do
            rising = score[part].float().sort().values.diff() > 0
            assert (steps[rising] > 0).float().mean() > 0.9
    assert float(distance[keep].max()) == float(distance.flatten()[score.float().argmax()])


@pytest.mark.parametrize("kept", [0, OUT * IN])
@pytest.mark.parametrize("grading", ["sign", "rank"])
def test_a_prior_that_keeps_all_or_nothing(kept, grading):
    score = prior()[1]
    keep = torch.full((OUT, IN), bool(kept))
    logits = initial(keep, score, grading=grading) - noise()
    assert float(logits.mean()) == pytest.approx(0.042 if kept else -0.042, rel=1e-4)


def test_scores_that_are_infinite_or_equal_rank_without_nan():
    keep, score = prior()
    score = torch.where(keep, torch.inf, 0.0)
    distance = initial(keep, score, grading="rank") - noise()
    assert torch.equal(distance > 0, keep)
    assert torch.isfinite(distance).all()


def test_mean_is_the_probability_of_an_open_gate():
    ours, logits = gate(), torch.tensor([-0.1, 0.0, 0.02])
    draw = Draw(scale=50.0, temperature=0.5, noise=True, seed=0, index=0)
    mean = ours.mean(torch.ones_like(logits), [logits], matrix(0, logits), draw)
    torch.testing.assert_close(mean, torch.sigmoid(50 * logits))
    # Measured: the share of samples with M > ½.
    many = logits.repeat_interleave(200_000)
    out = torch.empty_like(many)
    ours.apply(torch.ones_like(many), [many], matrix(0, many), draw, out)
    opened = (out > 0.5).float().view(3, -1).mean(1)
    torch.testing.assert_close(opened, torch.sigmoid(50 * logits), rtol=0, atol=0.005)


@pytest.mark.parametrize("noise", [True, False])
def test_the_offset_is_taken_from_bfloat16_logits_before_they_are_rounded(noise):
    ours, weight = gate(), torch.rand(OUT, IN, generator=torch.Generator().manual_seed(2))
    two = matrix(2, weight)
    logits = prior()[1].to(torch.bfloat16)
    draw = Draw(scale=3.0, temperature=0.5, noise=noise, seed=0, index=4, offset=1.001)
    apart = logits.float() - 1.001
    plain = replace(draw, offset=0.0)
    out, expected, stats_grad = torch.empty_like(weight), torch.empty_like(weight), torch.tensor([0.1, 0.2, 0.3])
    assert torch.equal(ours.apply(weight, [logits], two, draw, out), ours.apply(weight, [apart], two, plain, expected))
    assert torch.equal(out, expected)
    ones = torch.ones_like(logits)
    assert torch.equal(ours.mean(ones, [logits], two, draw), ours.mean(ones, [apart], two, plain))
    (grad,) = ours.backward(out.clone(), weight, [logits], stats_grad, two, draw)
    assert grad.dtype == torch.bfloat16
    assert torch.equal(grad, ours.backward(out, weight, [apart], stats_grad, two, plain)[0].bfloat16())


def test_the_default_number_type_changes_nothing():
    keep, score = prior()
    expected = initial(keep, score, grading="rank")
    torch.set_default_dtype(torch.bfloat16)
    try:
        logits = initial(keep, score, grading="rank")
    finally:
        torch.set_default_dtype(torch.float32)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_draws_other_gaussians_and_gives_the_same_ranks():
    keep, score = (torch.rand(4096, 14336, device="cuda") for _ in "ks")
    keep = keep > 0.5
    ours = gate(grading="rank", init_std=0.02)
    logits = start(ours, keep, score, torch.Generator("cuda").manual_seed(1))
    assert torch.equal(logits, start(ours, keep, score, torch.Generator("cuda").manual_seed(1)))
    distance = start(ours, keep[:64].cpu(), score[:64].cpu(), torch.Generator().manual_seed(1))
    again = start(ours, keep[:64], score[:64], torch.Generator().manual_seed(1))
    torch.testing.assert_close(again.cpu(), distance, rtol=1e-6, atol=1e-8)
    assert float(logits[keep].mean()) == pytest.approx(0.06, rel=1e-2)
    assert float(logits[~keep].mean()) == pytest.approx(-0.06, rel=1e-2)
