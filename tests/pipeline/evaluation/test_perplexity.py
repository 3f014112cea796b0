import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.evaluation.perplexity import perplexity


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config)


class Constant(nn.Module):
    """Logits that do not depend on the input. values: [V]."""

    def __init__(self, values: torch.Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values)

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache
        return SimpleNamespace(logits=self.values.expand(*input_ids.shape, -1))


def test_equals_a_token_by_token_computation_for_any_batch_size():
    model = tiny_llama().train()
    rows = torch.randint(50, (5, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model.eval()(rows).logits.double()
    model.train()
    expected = [
        -sum(torch.log_softmax(logits[r, t], -1)[rows[r, t + 1]].item() for t in range(11)) / 11 for r in range(5)
    ]
    mean = sum(expected) / 5
    stderr = math.sqrt(sum((x - mean) ** 2 for x in expected) / 4 / 5)
    for batch_rows in (1, 2, 5, 100):
        result = perplexity(model, rows, batch_rows=batch_rows)
        assert result["nll_per_row"] == pytest.approx(expected, rel=1e-6)
        assert result["nll"] == pytest.approx(mean, rel=1e-6)
        assert result["nll_stderr"] == pytest.approx(stderr, rel=1e-4)
        assert result["perplexity"] == pytest.approx(math.exp(mean), rel=1e-6)
        assert result["tokens"] == 5 * 11
    assert model.training


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary():
    rows = torch.randint(1000, (3, 64))
    result = perplexity(Constant(torch.zeros(1000)), rows, batch_rows=2)
    assert result["perplexity"] == pytest.approx(1000, rel=1e-6)
    assert result["nll_stderr"] == pytest.approx(0, abs=1e-6)


def test_one_row_has_no_standard_error():
    assert perplexity(Constant(torch.zeros(8)), torch.zeros(1, 4, dtype=torch.long), batch_rows=1)["nll_stderr"] is None


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (torch.tensor([math.nan, 0.0]), "the nll of row 0 is nan"),
        (torch.tensor([-math.inf, 0.0]), "the nll of row 0 is inf"),
        (torch.tensor([-2000.0, 0.0]), "the mean nll is 2000 nats"),
    ],
)
def test_broken_logits_are_an_error(logits, message):
    with pytest.raises(ValueError, match=message):
        perplexity(Constant(logits), torch.zeros(2, 4, dtype=torch.long), batch_rows=2)


@pytest.mark.parametrize("shape", [(0, 4), (4, 1), (4,)])
def test_rows_of_a_wrong_shape_are_an_error(shape):
    with pytest.raises(ValueError, match="rows must be"):
        perplexity(Constant(torch.zeros(8)), torch.zeros(shape, dtype=torch.long), batch_rows=1)
