"""What holds for every layer-wise method: exact sparsity, order of quality, hard inputs, clear refusals."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leap.layerwise import METHODS, InputStatistics, Target
from leap.layerwise.linalg import damped_cholesky, inverse_factor

HALF = Target(0.5)
UPDATING = [name for name, method in METHODS.items() if method.changes_weights]
targets = st.one_of(
    st.builds(Target, st.floats(0, 0.95), st.sampled_from(["row", "layer"])),
    st.sampled_from([(1, 1), (1, 2), (2, 4), (3, 4), (1, 3)]).map(lambda nm: Target.n_m(*nm)),
)


def problem(
    seed: int, rows: int = 12, columns: int = 24, tokens: int = 96, rank: int | None = None
) -> tuple[torch.Tensor, InputStatistics]:
    """A random weight and the statistics of inputs that are correlated, as a language model's are."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(tokens, rank or columns, generator=generator)
    mix = torch.randn(rank or columns, columns, generator=generator)
    scale = torch.logspace(0, -1.5, rank or columns)
    stats = InputStatistics(columns, "gram")
    noise = 0.1 if rank is None else 0
    stats.update(factors * scale @ mix + noise * torch.randn(tokens, columns, generator=generator))
    return torch.randn(rows, columns, generator=generator), stats


def error(weight: torch.Tensor, pruned: torch.Tensor, gram: torch.Tensor) -> float:
    """‖X(Ŵ − W)ᵀ‖² / ‖XWᵀ‖²."""
    change = (pruned - weight).double()
    return (
        ((change @ gram.double()) * change).sum() / ((weight.double() @ gram.double()) * weight.double()).sum()
    ).item()


def exact(mask: torch.Tensor, target: Target) -> bool:
    rows = len(mask)
    if target.pattern:
        return bool((mask.view(rows, -1, target.pattern[1]).sum(-1) == target.pattern[0]).all())
    if target.scope == "row":
        counts = (~mask).sum(1)
        if int(counts.max() - counts.min()) > 1:
            return False
    return int((~mask).sum()) == round(target.sparsity * mask.numel())


@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None, max_examples=25)
@given(
    target=targets, rows=st.integers(1, 7), groups=st.integers(1, 7), block=st.integers(1, 30), seed=st.integers(0, 99)
)
def test_sparsity_is_exact_and_pruned_weights_are_zero(method, target, rows, groups, block, seed):
    columns = groups * (target.pattern[1] if target.pattern else 3)
    weight, stats = problem(seed, rows, columns)
    before = weight.clone()
    options = {"block_size": block} if method in ("sparsegpt", "thanos") else {}
    result = METHODS[method](weight, stats, target, **options)

    assert exact(result.mask, target)
    assert torch.equal(weight, before)
    assert result.score.dtype == torch.float32
    assert result.score.shape == result.mask.shape == result.weight.shape == weight.shape
    if METHODS[method].changes_weights:
        assert not result.weight[~result.mask].any()
        assert result.weight.isfinite().all()
    else:
        assert result.weight is weight


@pytest.mark.parametrize("target", [HALF, Target(0.6, "layer"), Target.n_m(2, 4)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_pruned_layer_keeps_its_mask(method, target):
    weight, stats = problem(0)
    first = METHODS[method](weight, stats, target)
    again = METHODS[method](first.weight * first.mask, stats, target)
    assert torch.equal(again.mask, first.mask)
    torch.testing.assert_close(again.weight, first.weight * first.mask, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("target", [HALF, Target(0.6, "layer"), Target.n_m(2, 4)], ids=str)
def test_updates_reduce_the_error_of_the_output_in_the_published_order(target):
    means = {}
    for method in METHODS:
        errors = []
        for seed in range(8):
            weight, stats = problem(seed, rows=16, columns=48, tokens=192)
            result = METHODS[method](weight, stats, target)
            errors.append(error(weight, result.weight * result.mask, stats.gram))
        means[method] = sum(errors) / len(errors)
    assert means["wanda"] <= means["magnitude"]
    assert means["sparsegpt"] <= means["wanda"]
    assert means["thanos"] <= means["wanda"]
    assert means["optima"] <= means["wanda"]
    assert means["admm"] <= means["sparsegpt"]
    assert means["alps"] <= means["sparsegpt"]


@pytest.mark.parametrize("method", METHODS)
def test_dead_columns_go_first_and_break_nothing(method):
    weight, _ = problem(0, columns=24)
    x = torch.randn(50, 24, generator=torch.Generator().manual_seed(1))
    dead = [3, 4, 17]
    x[:, dead] = 0
    stats = InputStatistics(24, "gram")
    stats.update(x)
    result = METHODS[method](weight, stats, Target(0.25))
    assert result.weight.isfinite().all()
    if METHODS[method].needs != "none":
        assert not result.mask[:, dead].any()
        assert not result.score[:, dead].any()


@pytest.mark.parametrize("method", UPDATING)
def test_dead_columns_that_are_kept_keep_their_weights(method):
    weight, _ = problem(0, columns=24)
    x = torch.randn(50, 24, generator=torch.Generator().manual_seed(1))
    x[:, :20] = 0
    stats = InputStatistics(24, "gram")
    stats.update(x)
    result = METHODS[method](weight, stats, HALF)
    kept = result.mask.clone()
    kept[:, 20:] = False
    assert kept.any()
    torch.testing.assert_close(result.weight[kept], weight[kept], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_inputs_that_are_all_zero_break_nothing(method):
    weight, _ = problem(0)
    stats = InputStatistics(24, "gram")
    stats.update(torch.zeros(5, 24))
    result = METHODS[method](weight, stats, HALF)
    assert exact(result.mask, HALF)
    assert result.weight.isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_fewer_tokens_than_columns_break_nothing(method):
    weight, stats = problem(0, columns=24, tokens=4)
    result = METHODS[method](weight, stats, HALF)
    assert exact(result.mask, HALF)
    assert result.weight.isfinite().all()
    assert result.weight.abs().max() < 20


@pytest.mark.parametrize("method", METHODS)
def test_bf16_weights_come_back_in_bf16(method):
    weight, stats = problem(0)
    result = METHODS[method](weight.bfloat16(), stats, HALF)
    in_fp32 = METHODS[method](weight.bfloat16().float(), stats, HALF)
    assert result.weight.dtype == torch.bfloat16
    assert torch.equal(result.mask, in_fp32.mask)
    assert torch.equal(result.weight, in_fp32.weight.bfloat16())


@pytest.mark.parametrize("method", ["sparsegpt", "thanos"])
def test_a_failed_cholesky_is_damped_and_tried_again(method, caplog):
    weight, stats = problem(0, rank=5)
    with caplog.at_level(logging.WARNING):
        result = METHODS[method](weight, stats, HALF, damping=0)
    assert "Cholesky of a 24×24 matrix failed at damping 0; trying 1e-06" in caplog.text
    assert result.weight.isfinite().all()


def test_damping_grows_ten_fold_and_ends_in_an_error(caplog):
    indefinite = torch.diag(torch.tensor([3.0, 1.0, -1.0]))
    damped, factor = damped_cholesky(indefinite, 0.2)
    torch.testing.assert_close(damped, indefinite + 2 * torch.eye(3))
    torch.testing.assert_close(factor @ factor.T, damped)
    assert caplog.text.count("failed at damping") == 1
    with pytest.raises(torch.linalg.LinAlgError, match="failed up to damping"):
        damped_cholesky(torch.full((2, 2), float("nan")), 0.1)


def test_a_batch_is_damped_together():
    batch = torch.stack([torch.eye(3), torch.diag(torch.tensor([3.0, 1.0, -1.0]))])
    damped, factor = damped_cholesky(batch, 0.2)
    torch.testing.assert_close(damped, batch + 2 * torch.eye(3))
    torch.testing.assert_close(factor @ factor.mT, damped)


def test_the_inverse_factor_serves_every_trailing_block():
    _, stats = problem(0)
    u = inverse_factor(stats.gram.double(), 0.0)
    assert torch.equal(u, u.triu())
    for start in (0, 5, 20):
        trailing = stats.gram.double()[start:, start:]
        torch.testing.assert_close(u[start:, start:].T @ u[start:, start:], torch.linalg.inv(trailing))


@pytest.mark.parametrize(
    ("method", "arguments", "words"),
    [
        ("wanda", {"stats": None}, "none were collected"),
        ("wanda", {"stats": InputStatistics(24)}, "none were collected"),
        ("admm", {"stats": problem(0, columns=20)[1]}, "20 inputs for a weight of 24 columns"),
        ("magnitude", {"target": Target.n_m(2, 5)}, "groups of 5"),
        ("admm", {"schedule": "linear"}, "constant, cubic"),
        ("admm", {"mask_iterations": 21}, "mask_iterations must be in"),
        ("sparsegpt", {"block_size": 0}, "block_size"),
        ("thanos", {"precision": "bfloat16"}, "float32, float64"),
        ("alps", {"iterations": 0}, "iterations"),
        ("optima", {"damp": 0.1}, "no option 'damp'"),
    ],
)
def test_mistakes_are_named(method, arguments, words):
    weight, stats = problem(0)
    with pytest.raises(ValueError, match=words):
        METHODS[method](weight, **{"stats": stats, "target": HALF, **arguments})


@pytest.mark.parametrize("method", UPDATING)
def test_norms_alone_do_not_serve_a_method_that_needs_more(method):
    stats = InputStatistics(24)
    stats.update(torch.ones(2, 24))
    with pytest.raises(ValueError, match="needs='gram'"):
        METHODS[method](problem(0)[0], stats, HALF)


def test_overflowed_inputs_are_refused():
    stats = InputStatistics(24)
    stats.update(torch.full((2, 24), 1e30))
    with pytest.raises(ValueError, match="overflowed"):
        METHODS["wanda"](problem(0)[0], stats, HALF)


def test_the_cubic_schedule_ends_at_the_target_and_is_another_method():
    weight, stats = problem(0)
    constant, cubic = (METHODS["admm"](weight, stats, Target(0.7), schedule=s) for s in ("constant", "cubic"))
    assert exact(cubic.mask, Target(0.7))
    assert not torch.equal(constant.mask, cubic.mask)
