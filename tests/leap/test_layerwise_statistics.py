"""Running sums of a layer's inputs, alone and collected with hooks."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from leap.layerwise import InputStatistics, collect_statistics
from leap.layerwise import statistics as module


@pytest.mark.parametrize("needs", ["norm", "gram"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_over_batches_are_those_of_all_tokens(needs, dtype, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_TOKENS", 4)
    x = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0))
    stats = InputStatistics(6, needs, dtype)
    stats.update(x[:2])
    stats.update(x[2])
    exact = x.double().reshape(-1, 6)
    assert stats.tokens == 15
    assert stats.norm.dtype == dtype
    torch.testing.assert_close(stats.norm.double(), exact.norm(dim=0), rtol=1e-6, atol=0)
    if needs == "gram":
        torch.testing.assert_close(stats.gram.double(), exact.T @ exact, rtol=1e-5, atol=1e-5)


def test_bf16_inputs_are_summed_in_fp32():
    stats = InputStatistics(1)
    # In bf16 the sum would stop at 256.
    stats.update(torch.ones(1000, 1, dtype=torch.bfloat16))
    assert stats.norm.item() == pytest.approx(1000**0.5)


def test_norms_alone_hold_no_gram_matrix():
    with pytest.raises(ValueError, match="needs='gram'"):
        _ = InputStatistics(3).gram


def test_merging_adds_and_refuses_another_kind():
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    whole, left, right = (InputStatistics(3, "gram") for _ in range(3))
    whole.update(x)
    left.update(x[:5])
    right.update(x[5:])
    left.merge(right)
    assert left.tokens == 8
    torch.testing.assert_close(left.gram, whole.gram)
    with pytest.raises(ValueError, match="cannot add norm"):
        left.merge(InputStatistics(3))


def test_layers_that_get_one_tensor_share_its_product(monkeypatch):
    linears = {name: nn.Linear(4, 2) for name in "abc"}
    x, y = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    updates = []
    update = InputStatistics.update
    monkeypatch.setattr(InputStatistics, "update", lambda self, t: (updates.append(t), update(self, t)))
    with collect_statistics(linears, "gram") as statistics:
        for _ in range(2):
            linears["a"](x)
            linears["b"](x)
            linears["c"](y)
    linears["a"](x)  # after the context nothing counts
    assert len(updates) == 3 + 1  # y, x, y are new each time; x is still the last tensor when the second round starts
    torch.testing.assert_close(statistics["a"].gram, 2 * x.T @ x)
    torch.testing.assert_close(statistics["b"].gram, 2 * x.T @ x)
    torch.testing.assert_close(statistics["c"].gram, 2 * y.T @ y)
    assert statistics["a"].tokens == 10


def test_a_layer_that_never_ran_is_pruned_by_magnitude_and_says_so(caplog):
    linears = {"expert": nn.Linear(3, 2)}
    with caplog.at_level(logging.WARNING), collect_statistics(linears, "gram") as statistics:
        pass
    assert "expert never ran" in caplog.text
    assert torch.equal(statistics["expert"].gram, torch.eye(3))


def test_statistics_in_float64_do_not_lose_what_float32_rounds_away():
    linear = nn.Linear(4, 2)
    rows = 1 + 1e-6 * torch.randn(512, 4, generator=torch.Generator().manual_seed(0))
    with collect_statistics({"it": linear}, "gram", torch.float64) as statistics:
        for batch in rows.split(64):
            linear(batch)
    exact = rows.double().T @ rows.double()
    torch.testing.assert_close(statistics["it"].gram, exact, rtol=1e-14, atol=0)
    with collect_statistics({"it": linear}, "gram") as rounded:
        linear(rows)
    assert not torch.allclose(rounded["it"].gram.double(), exact, rtol=1e-14, atol=0)
