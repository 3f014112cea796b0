"""Targets, exact counts and deterministic ties."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leap.layerwise import METHODS, Target, prune_count, select_mask
from leap.layerwise.selection import keep_largest, row_counts
from leap.scopes import layer_scope, scope_name

targets = st.one_of(
    st.builds(Target, st.floats(0, 0.999), st.sampled_from(["row", "layer"])),
    st.integers(1, 4).flatmap(lambda m: st.integers(1, m).map(lambda n: Target.n_m(n, m))),
)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"sparsity": 1.0}, "sparsity must be in"),
        ({"sparsity": -0.1}, "sparsity must be in"),
        ({"sparsity": float("nan")}, "sparsity must be in"),
        ({"sparsity": 0.5, "scope": "column"}, "row, layer"),
        ({"sparsity": 0.5, "pattern": (0, 4)}, "1 <= n <= m"),
        ({"sparsity": 0.5, "pattern": (5, 4)}, "1 <= n <= m"),
        ({"sparsity": 0.6, "pattern": (2, 4)}, "2:4 has sparsity 0.5"),
    ],
)
def test_a_bad_target_says_what_is_allowed(arguments, words):
    with pytest.raises(ValueError, match=words):
        Target(**arguments)


def test_an_n_m_target_implies_its_sparsity():
    assert Target.n_m(1, 4) == Target(0.75, pattern=(1, 4))
    assert Target(2 / 3, pattern=(1, 3)).pattern == (1, 3)


def test_columns_that_do_not_split_into_groups_are_refused():
    with pytest.raises(ValueError, match="6 columns do not split into groups of 4"):
        select_mask(torch.rand(2, 6), Target.n_m(2, 4))


@pytest.mark.parametrize(
    ("sparsity", "size", "count"), [(0.5, 5, 2), (0.5, 7, 4), (0.6, 10, 6), (0.7, 10, 7), (0, 9, 0)]
)
def test_prune_count_rounds_halves_to_even(sparsity, size, count):
    assert prune_count(sparsity, size) == count


@settings(deadline=None, max_examples=60)
@given(
    target=targets, rows=st.integers(1, 6), groups=st.integers(1, 6), levels=st.integers(1, 5), seed=st.integers(0, 99)
)
def test_masks_are_exact_and_keep_the_lowest_index_among_ties(target, rows, groups, levels, seed):
    columns = groups * (target.pattern[1] if target.pattern else 1)
    # Few distinct values, so that ties are the rule.
    score = torch.randint(levels, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()
    mask = select_mask(score, target)

    if target.pattern:
        slices, keep = (rows * groups, target.pattern[1]), target.pattern[0]
    elif target.scope == "row":
        slices, keep = (rows, columns), None
        assert int((~mask).sum()) == round(target.sparsity * rows * columns)
        assert int(mask.sum(1).max() - mask.sum(1).min()) <= 1
    else:
        slices, keep = (1, rows * columns), rows * columns - round(target.sparsity * rows * columns)
    for scores, kept in zip(score.reshape(slices).tolist(), mask.reshape(slices).tolist(), strict=True):
        best_first = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
        chosen = best_first[: sum(kept) if keep is None else keep]
        assert [i for i, k in enumerate(kept) if k] == sorted(chosen)


@settings(deadline=None, max_examples=200)
@given(sparsity=st.floats(0, 0.9999), rows=st.integers(1, 300), columns=st.integers(1, 5000))
def test_rows_lose_together_what_the_layer_should(sparsity, rows, columns):
    counts = row_counts(sparsity, rows, columns)
    assert len(counts) == rows
    assert sum(counts) == prune_count(sparsity, rows * columns)
    assert max(counts) - min(counts) <= 1
    assert min(counts) >= 0
    assert max(counts) <= columns
    # Spread evenly: no part of the rows is off by a weight or more from its share.
    for row, lost in enumerate(itertools.accumulate(counts), start=1):
        assert abs(lost - sparsity * row * columns) <= 0.5 + 1e-6


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 5), columns=st.integers(1, 7), seed=st.integers(0, 99))
def test_counts_per_slice_agree_with_one_count_for_all(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    score = torch.randint(3, (rows, columns), generator=generator).float()
    keep = torch.randint(columns + 1, (rows, 1), generator=generator)
    expected = torch.stack([keep_largest(score[i], int(keep[i])) for i in range(rows)])
    assert torch.equal(keep_largest(score, keep), expected)


def test_infinite_scores_have_an_order_and_nan_is_refused():
    score = torch.tensor([[float("inf"), float("-inf"), 0.0, float("inf")]])
    assert select_mask(score, Target(0.5)).tolist() == [[True, False, False, True]]
    with pytest.raises(ValueError, match="NaN"):
        select_mask(torch.tensor([[1.0, float("nan")]]), Target(0.5))


def test_every_method_has_the_scope_of_its_authors():
    assert {method for method in METHODS if layer_scope(method, "native") == "row"} == {"wanda", "optima"}
    assert [layer_scope("admm", scope) for scope in ("native", "row", "layer")] == ["layer", "row", "layer"]
    assert [layer_scope("wanda", scope) for scope in ("native", "row", "layer")] == ["row", "row", "layer"]
    assert [layer_scope("magnitude", scope) for scope in ("native", "row", "layer")] == ["layer"] * 3
    assert [scope_name("sparsegpt", scope) for scope in ("row", "layer")] == ["row", "block"]
    assert scope_name("thanos", "layer") == "layer"
