"""What the recipes for short budgets promise: more steps never make the result worse (method.md, section 6)."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import leap
from leap.layerwise import Target, sweep
from pipeline.config import recipe
from pipeline.model import loading
from pipeline.nano import corpus

LENGTH = 128
#: Nats by which a longer run may end above a shorter one; the runs' own spread is about half of it.
MARGIN = 0.02


@pytest.fixture(scope="module")
def texts() -> dict[str, Tensor]:
    """Rows of 128 tokens of the splits that nano was not trained on."""
    tokenizer = loading.load_tokenizer(recipe.load("nano").model)
    rows = {}
    for split, count in (("calibration", 96), ("heldout", 48)):
        stream: list[int] = []
        for text in corpus.documents(split, packages=()):
            stream += [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            if len(stream) >= count * LENGTH:
                break
        rows[split] = torch.tensor(stream[: count * LENGTH]).view(count, LENGTH)
    return rows


@pytest.mark.long
@pytest.mark.parametrize("sparsity", [0.5, 0.6])
def test_more_steps_never_make_the_result_worse(texts: dict[str, Tensor], sparsity: float) -> None:
    config = recipe.load("nano")
    losses = []
    for steps in (12, 24, 48):
        settings = replace(config.learn["leap"].settings, steps=steps, batch_rows=8, microbatch_rows=8)
        model = loading.load_model(config.model)
        leap.prune(model, texts["calibration"], sparsity=sparsity, settings=settings, prior_rows=32)
        with torch.no_grad():
            losses.append(float(model(input_ids=texts["heldout"], labels=texts["heldout"]).loss))
    assert all(longer <= shorter + MARGIN for shorter, longer in itertools.pairwise(losses)), losses
    assert losses[-1] < losses[0] - MARGIN, losses


@pytest.mark.long
def test_without_settings_the_mask_beats_the_best_layer_wise_method(texts: dict[str, Tensor]) -> None:
    config = recipe.load("nano").model
    losses = {}
    for name in ("default", "admm"):
        model = loading.load_model(config)
        if name == "admm":
            for _ in sweep(model, texts["calibration"], "admm", Target(0.5)):
                pass
        else:
            leap.prune(model, texts["calibration"], sparsity=0.5)
        with torch.no_grad():
            losses[name] = float(model(input_ids=texts["heldout"], labels=texts["heldout"]).loss)
    assert losses["default"] < losses["admm"] - MARGIN, losses
