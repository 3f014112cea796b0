"""Masks of exactly the asked sparsity, and the same whoever holds the logits."""

from __future__ import annotations

import itertools
import math
import threading

import pytest
import torch
from torch import Tensor

from leap.gates import Matrix
from leap.harden import RankHardener, ranked

SHAPES = [(7, 11), (1, 5), (16, 9), (3, 3)]
SPARSITIES = [0.0, 0.01, 0.3, 0.5, 0.77, 0.999]


def logits(tied: bool = False, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator) for shape in SHAPES]
    return [t.round() for t in tensors] if tied else tensors


def masks(tensors: list[Tensor], sparsity: float, scope: str) -> list[Tensor]:
    hardener = ranked(lambda: tensors, sparsity, scope)
    return [mask(hardener, number, tensor) for number, tensor in enumerate(tensors)]


def mask(hardener: RankHardener, number: int, tensor: Tensor) -> Tensor:
    return hardener.mask(Matrix(number, str(number), tensor.shape), [tensor])


def units(keep: list[Tensor], scope: str) -> list[Tensor]:
    """The masks of each unit within which the sparsity is exact."""
    if scope == "global":
        return [torch.cat([m.flatten() for m in keep])]
    return [m.flatten() for m in keep] if scope == "layer" else [row for m in keep for row in m]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scope", ["global", "layer", "row"])
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_the_sparsity_is_exact_and_the_largest_stay(sparsity, scope, tied):
    tensors = logits(tied)
    keep = masks(tensors, sparsity, scope)
    assert [m.shape for m in keep] == [t.shape for t in tensors]
    assert all(m.dtype == torch.bool for m in keep)
    whole = keep if scope == "row" else units(keep, scope)
    assert [int((~m).sum()) for m in whole] == [round(sparsity * m.numel()) for m in whole]
    for unit, values in zip(units(keep, scope), units(tensors, scope), strict=True):
        pruned = int((~unit).sum())
        assert abs(pruned - sparsity * unit.numel()) < (1 if scope == "row" else 0.5 + 1e-9)
        if 0 < pruned < unit.numel():
            assert values[unit].min() >= values[~unit].max()
            tied_at_cut = values == values[~unit].max()
            kept_ties = unit[tied_at_cut]
            assert kept_ties.tolist() == sorted(kept_ties.tolist(), reverse=True), "of equal logits the first stay"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scope", ["global", "layer", "row"])
def test_masks_are_nested(scope, tied):
    tensors = logits(tied)
    for lower, higher in itertools.pairwise(SPARSITIES):
        for less, more in zip(masks(tensors, lower, scope), masks(tensors, higher, scope), strict=True):
            assert not (more & ~less).any()


@pytest.mark.parametrize("scope", ["global", "layer", "row"])
def test_all_logits_equal(scope):
    tensors = [torch.zeros(shape) for shape in SHAPES]
    for unit in units(masks(tensors, 0.4, scope), scope):
        kept = int(unit.sum())
        assert abs(kept - 0.6 * unit.numel()) < 1
        assert unit.tolist() == [True] * kept + [False] * (unit.numel() - kept)


def test_nothing_is_pruned_at_sparsity_zero():
    tensors = [torch.tensor([[-math.inf, 1.0], [0.0, -math.inf]])]
    for exact in (True, False):
        assert mask(ranked(lambda: tensors, 0.0, "global", exact=exact), 0, tensors[0]).all()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_shards_give_the_same_global_mask(world):
    tensors = logits()
    expected = masks(tensors, 0.6, "global")
    flat = [t.flatten() for t in tensors]
    barrier, counts, results = threading.Barrier(world, timeout=600), [torch.empty(0)] * world, [None] * world

    def worker(rank: int) -> None:
        def total(mine: Tensor) -> Tensor:
            counts[rank] = mine
            barrier.wait()
            result = sum(counts[1:], counts[0])
            barrier.wait()
            return result

        results[rank] = ranked(lambda: (t[rank::world] for t in flat), 0.6, "global", total, exact=False)

    threads = [threading.Thread(target=worker, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(r == results[0] for r in results)
    for number, (tensor, whole) in enumerate(zip(tensors, expected, strict=True)):
        assert torch.equal(mask(results[0], number, tensor), whole)


def test_without_tie_breaking_all_ties_go():
    tensors = [torch.tensor([[1.0, 2.0, 2.0, 2.0, 3.0]])]
    roughly = ranked(lambda: tensors, 0.4, "global", exact=False)
    assert mask(roughly, 0, tensors[0]).tolist() == [[False, False, False, False, True]]
    assert masks(tensors, 0.4, "global")[0].tolist() == [[False, True, True, False, True]]


@pytest.mark.parametrize("scope", ["global", "layer", "row"])
@pytest.mark.parametrize("sparsity", [-0.1, 1.0, math.nan])
def test_a_sparsity_out_of_range(sparsity, scope):
    with pytest.raises(ValueError, match="sparsity must lie in"):
        RankHardener(sparsity, scope)


@pytest.mark.parametrize("scope", ["global", "layer", "row"])
def test_nan_is_an_error(scope):
    with pytest.raises(ValueError, match="NaN"):
        masks([torch.tensor([[1.0, math.nan]])], 0.5, scope)


def test_parameters_may_be_passed_as_they_are():
    parameter = torch.nn.Parameter(logits()[0])
    for scope in ("global", "layer", "row"):
        assert not masks([parameter], 0.5, scope)[0].requires_grad
