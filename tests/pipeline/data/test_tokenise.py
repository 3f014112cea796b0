"""Texts to tokens: in parts where a text is long, to the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import sentences

from pipeline.config import ModelConfig
from pipeline.data import tokenise
from pipeline.model.loading import load_tokenizer


class _Watched:
    """A tokenizer that notes how many characters it gets at once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self.eos_token_id = tokenizer, tokenizer.eos_token_id
        self.sizes: list[int] = []

    def __call__(self, texts: list[str] | str, **options: Any) -> Any:
        self.sizes.append(sum(map(len, texts)))
        return self._tokenizer(texts, **options)


@pytest.fixture
def tokenizer(tiny: Path) -> _Watched:
    return _Watched(load_tokenizer(ModelConfig(source=str(tiny / "model"))))


#: Short and long ones, one without a blank, one with several blanks where a part may end, and none.
TEXTS = [sentences(0, 1), sentences(1, 60), "x" * 500, sentences(2, 2), ("a  b\n   c " * 90).strip(), ""]


def test_texts_are_tokenised_in_parts_to_the_same_tokens(tokenizer: _Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = tokenise.encode(TEXTS, tokenizer, most=10**9)
    assert [len(ids) for ids in expected][-1] == 1  # the end-of-text token
    tokenizer.sizes.clear()
    monkeypatch.setattr(tokenise, "TOKENISED_TOGETHER", 600)
    monkeypatch.setattr(tokenise, "PART", 300)
    found = tokenise.encode(TEXTS, tokenizer, most=10**9)
    assert max(tokenizer.sizes) <= 600
    assert len(tokenizer.sizes) > 10
    assert all(ids.dtype == np.int32 for ids in found)
    assert all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True))
    assert tokenise.encode([], tokenizer, 1) == []


def test_no_more_of_a_long_text_is_tokenised_than_it_takes(
    tokenizer: _Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenise, "PART", 300)
    text = sentences(3, 2000)
    (found,) = tokenise.encode([text], tokenizer, most=50)
    assert 50 <= len(found) < 300
    assert sum(tokenizer.sizes) <= 600
    whole = tokenise.encode([text], tokenizer, most=10**9)[0]
    assert np.array_equal(found[:-1], whole[: len(found) - 1])
