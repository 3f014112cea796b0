"""From texts to tokens, the same before a run and in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

#: Text of one call of the tokeniser, in characters. It needs about 130 bytes a token while it works.
TOKENISED_TOGETHER = 4 * 2**20
#: A longer text is tokenised in parts: tokenisers become slow over a text of many megabytes.
PART = 2**18


def encode(texts: list[str], tokenizer: Any, most: int) -> list[np.ndarray]:
    """The tokens of each text with the end-of-text token. int32 [tokens] each.

    Args:
        most: of a text longer than ``PART`` only so many tokens are looked for, and a few more may come.
    """
    found: list[np.ndarray] = []
    together: list[str] = []
    size = 0
    for number, text in enumerate(texts, 1):
        if len(text) <= PART:
            together.append(text)
            size += len(text)
        if together and (size >= TOKENISED_TOGETHER or number == len(texts) or len(text) > PART):
            encoded = tokenizer(together, add_special_tokens=False, verbose=False)["input_ids"]
            found += [np.array([*ids, tokenizer.eos_token_id], dtype=np.int32) for ids in encoded]
            together, size = [], 0
        if len(text) > PART:
            found.append(_encode_long(text, tokenizer, most))
    return found


def _encode_long(text: str, tokenizer: Any, most: int) -> np.ndarray:
    tokens: list[int] = []
    for part in _parts(text):
        tokens += tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
        if len(tokens) >= most:
            break
    return np.array([*tokens, tokenizer.eos_token_id], dtype=np.int32)


def _parts(text: str) -> Iterator[str]:
    """Pieces of a text of at most ``PART`` characters, cut before a blank, where tokenisers cut, too."""
    start = 0
    while len(text) - start > PART:
        cut = text.rfind(" ", start + 1, start + PART)
        end = cut if cut > 0 else start + PART
        yield text[start:end]
        start = end
    yield text[start:]
