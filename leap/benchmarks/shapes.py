"""Random models with the shapes of known ones, made where they will run."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

Shape = Literal["llama-1b", "llama-8b", "smoke"]

#: meta-llama/Llama-3.2-1B and meta-llama/Llama-3.1-8B; the third for smoke runs.
SHAPES: dict[Shape, dict[str, Any]] = {
    "llama-1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "llama-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
    "smoke": {
        "vocab_size": 300,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "tie_word_embeddings": True,
    },
}


def random_model(
    shape: Shape, dtype: torch.dtype, device: torch.device | str, blocks: int | None = None
) -> PreTrainedModel:
    """A Llama of this shape with normal weights, in evaluation mode.

    Args:
        blocks: decoder blocks; the shape's own number without it.
    """
    config = LlamaConfig(**SHAPES[shape] | ({} if blocks is None else {"num_hidden_layers": blocks}))
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def random_rows(model: PreTrainedModel, tokens: int, length: int) -> Tensor:
    """Token ids [tokens / length, length] on the model's device, the same for the same arguments."""
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (max(1, tokens // length), length), generator=generator).to(model.device)
