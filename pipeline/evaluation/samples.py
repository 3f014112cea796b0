"""Short texts that a model generates, to look at beside another model's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from transformers import PreTrainedModel

from pipeline.artifacts.packed_rows import PackedRows


def beginnings(rows: PackedRows, end: int, count: int, length: int) -> list[list[int]]:
    """The first ``length`` tokens of ``count`` documents, evenly spread over ``rows``.

    A document begins after the token ``end``; shorter ones are passed over. Where a part of the rows holds no
    beginning that is long enough, its first tokens are taken.

    Raises:
        ValueError: a row is shorter than ``length``.
    """
    found = []
    for number in range(count):
        first, last = (at * len(rows) // count for at in (number, number + 1))
        if len(rows[first]) < length:
            raise ValueError(f"rows of {len(rows[first])} tokens hold no prompt of {length}")
        candidates = (text for row in range(first, last) for text in _beginnings(rows[row], end, length))
        found.append([int(token) for token in next(candidates, rows[first][:length])])
    return found


def _beginnings(row: np.ndarray, end: int, length: int) -> Iterator[np.ndarray]:
    for start in np.flatnonzero(row == end) + 1:
        text = row[start : start + length]
        if len(text) == length and end not in text:
            yield text


@torch.no_grad()
def continuations(
    model: PreTrainedModel, prompts: list[list[int]], new_tokens: int, temperature: float, end: int, seed: int
) -> list[list[int]]:
    """``new_tokens`` tokens after each of the prompts, which are of one length; fewer where a document ends.

    The draws are seeded: the same model gives the same texts, and two models that agree give texts that agree.
    """
    tokens = torch.tensor(prompts, device=model.device)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        texts = cast(Any, model).generate(  # transformers' types hide it
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=0.95,
            max_new_tokens=new_tokens,
            pad_token_id=end,
        )
    return [[int(token) for token in text] for text in texts[:, tokens.shape[1] :]]
