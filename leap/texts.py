"""Rows of tokens from whatever a user has: strings, a data set, token ids."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor

#: A text, or several; token ids, row by row or document by document; or a ``datasets.Dataset`` of either.
Text: TypeAlias = Tensor | np.ndarray | str | Iterable[Any]
_BATCH = 64
"""Documents that are tokenised at a time."""


def token_rows(text: Text, tokenizer: Any, length: int, tokens: int, field: str = "text") -> Tensor:
    """Rows of token ids [R, S] without padding, of as much of ``text`` as holds ``tokens``.

    Rows that are given as rows (a matrix, or lists of one length) stay as they are. Documents follow one another in
    their order, the tokenizer's end of text after each, and are cut every ``length`` tokens; what is left over at the
    end is dropped. A text that fills not even one row becomes one short row, with a warning.

    Args:
        text: see :data:`Text`. Of a data set the column ``input_ids``, or else ``field``, is read.
        tokenizer: needed where the text is no token ids.
        length: S.

    Raises:
        ValueError: there is no text in it, or it is of another kind.
    """
    if isinstance(text, Tensor | np.ndarray):
        return _checked(torch.as_tensor(text))
    documents = iter(_documents(text, field))
    first = next(documents, None)
    if first is None:
        raise ValueError("there is no text to learn from")
    documents = itertools.chain([first], documents)
    if isinstance(first, str):
        if tokenizer is None:
            raise ValueError("the text is strings: give the model's tokenizer (tokenizer=…)")
        return _packed(_tokenised(documents, tokenizer), tokenizer, length, tokens)
    rows = list(itertools.islice(documents, max(1, -(-tokens // max(1, len(first))))))
    if len({len(row) for row in rows}) == 1:
        return _checked(torch.tensor(np.array(rows)))
    return _packed(cast("Iterator[Sequence[int]]", itertools.chain(rows, documents)), tokenizer, length, tokens)


def _documents(text: Any, field: str) -> Iterator[str | Sequence[int]]:
    """Texts or token ids of the documents."""
    if isinstance(text, str):
        if _names_a_file(text):
            raise ValueError(f"{text} is the name of a file: give what it holds (pathlib.Path({text!r}).read_text())")
        text = [text]
    if isinstance(text, Mapping):
        raise ValueError(f"the text is a dictionary: choose one of {', '.join(map(str, text))}")
    for document in text:
        if isinstance(document, Mapping):
            if "input_ids" not in document and field not in document:
                raise ValueError(f"the data set has no column {field}, it has {', '.join(document)}; give text_field=…")
            document = document.get("input_ids", document.get(field))
        if isinstance(document, Tensor | np.ndarray):
            document = document.tolist()
        if not isinstance(document, str) and not _is_ids(document):
            raise ValueError(f"a text is a string or token ids, not {type(document).__name__}")
        if document:
            yield document


def _names_a_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # too long for a name, or with a NUL
        return False


def _is_ids(document: Any) -> bool:
    return isinstance(document, Sequence) and all(isinstance(token, int) for token in document[:1])


def _tokenised(documents: Iterable[Any], tokenizer: Any) -> Iterator[Sequence[int]]:
    documents = iter(documents)
    while batch := list(itertools.islice(documents, _BATCH)):
        yield from tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]


def _packed(documents: Iterable[Sequence[int]], tokenizer: Any, length: int, tokens: int) -> Tensor:
    end = getattr(tokenizer, "eos_token_id", None)
    ids: list[int] = []
    for document in documents:
        ids += document
        if end is not None:
            ids.append(end)
        if len(ids) >= tokens:
            break
    if len(ids) < 2:
        raise ValueError("there is no text to learn from")
    if len(ids) < length:
        warnings.warn(f"the text has {len(ids)} tokens, less than a row of {length}: it is one short row", stacklevel=4)
        length = len(ids)
    count = min(len(ids), max(tokens, length)) // length
    return torch.tensor(ids[: count * length]).view(count, length)


def _checked(rows: Tensor) -> Tensor:
    if rows.ndim != 2 or rows.shape[0] < 1 or rows.shape[1] < 2 or rows.is_floating_point():
        raise ValueError(f"rows must be token ids [R, S] with S >= 2, not {rows.dtype} {list(rows.shape)}")
    return rows
