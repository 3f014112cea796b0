"""A model small enough to train in a second and yet one that pruning hurts."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 32


def pattern_rows(count: int, seed: int, length: int = 32) -> Tensor:
    """Rows [count, length] in which token t + 1 is (table[token t] + token t − 1) mod V, from random first tokens."""
    table = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(5))
    tokens = [torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))]
    previous = torch.zeros(count, dtype=torch.int64)
    for _ in range(length - 1):
        tokens.append((table[tokens[-1]] + previous) % VOCABULARY)
        previous = tokens[-2]
    return torch.stack(tokens, dim=1)


@pytest.fixture(scope="session")
def trained_pattern_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(150):
        rows = pattern_rows(16, seed=step)
        optimiser.zero_grad()
        model(input_ids=rows, labels=rows).loss.backward()
        optimiser.step()
    return model.eval()


@pytest.fixture
def pattern_model(trained_pattern_model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A copy of the trained model that a test may prune."""
    return copy.deepcopy(trained_pattern_model)


@pytest.fixture(scope="session")
def rows() -> Tensor:
    """Calibration rows of the pattern, none of which the model was trained on. int64 [32, 32]"""
    return pattern_rows(32, seed=1000)


@pytest.fixture(scope="session")
def loss_on(rows: Tensor) -> Callable[[LlamaForCausalLM], float]:
    """Cross-entropy of a model on the calibration rows, in nats."""

    @torch.no_grad()
    def loss(model: LlamaForCausalLM) -> float:
        return float(model(input_ids=rows, labels=rows).loss)

    return loss
