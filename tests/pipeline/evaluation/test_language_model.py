"""Scoring the continuations of a context that runs once, against a forward pass for each."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from pipeline.evaluation.language_model import BoundedHFLM

SIZES = {"vocab_size": 61, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32}
GROUPED = {**SIZES, "hidden_size": 32, "intermediate_size": 40, "num_key_value_heads": 2}
FAMILIES = {
    "llama": LlamaConfig(**GROUPED),
    "gemma3": Gemma3TextConfig(
        **GROUPED, head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
    ),
    "opt": OPTConfig(**SIZES, hidden_size=32, ffn_dim=40, word_embed_proj_dim=32),
    "gpt_neox": GPTNeoXConfig(**SIZES, hidden_size=32, intermediate_size=40),
}


def naive(model: PreTrainedModel, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1]
    targets = torch.tensor(continuation)
    chosen = logits.log_softmax(-1)[range(len(targets)), targets].sum()
    return float(chosen), bool((logits.argmax(-1) == targets).all())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_each_continuation_gets_what_a_pass_of_its_own_gives(family: str, batch_size: int) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]).eval()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), eos_token="<eos>", pad_token="<eos>")
    scorer = BoundedHFLM(model, tokenizer, batch_size=batch_size, max_length=32)
    draw = torch.Generator().manual_seed(1)
    requests = []
    for context_length, lengths in ((9, (3, 1, 5)), (2, (4, 4)), (13, (1, 1)), (1, (2,))):
        context = torch.randint(3, 61, (context_length,), generator=draw).tolist()
        for number, length in enumerate(lengths):
            continuation = torch.randint(3, 61, (length,), generator=draw).tolist()
            requests.append(((f"{context_length}", f"{number}"), context, continuation))
    requests = requests[::2] + requests[1::2]  # those of a context need not stand together
    found = scorer._loglikelihood_tokens(requests)
    for (logprob, greedy), (_, context, continuation) in zip(found, requests, strict=True):
        expected = naive(model, context, continuation)
        assert logprob == pytest.approx(expected[0], abs=2e-5)
        assert greedy == expected[1]
    greedy = naive_greedy(model, requests[0][1])
    assert scorer._loglikelihood_tokens([(("", ""), requests[0][1], greedy)])[0][1]


def naive_greedy(model: PreTrainedModel, context: list[int]) -> list[int]:
    with torch.no_grad():
        first = int(model(input_ids=torch.tensor([context])).logits[0, -1].argmax())
        second = int(model(input_ids=torch.tensor([[*context, first]])).logits[0, -1].argmax())
    return [first, second]
