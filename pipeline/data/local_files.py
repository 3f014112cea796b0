"""A look into local text files without Ray, before a run: the same documents and tokens that calibration will find."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import islice

from transformers import PreTrainedTokenizerBase

from pipeline.config import CorpusConfig
from pipeline.data import corpora, documents
from pipeline.data.tokenise import encode
from pipeline.errors import UserError

#: Documents that are tokenised together.
BATCH = 64


@dataclass
class Count:
    """What calibration will take of a corpus."""

    documents: int = 0
    tokens: int = 0
    """Each document's with its end-of-text token."""
    hashes: set[str] = field(default_factory=set)
    """Of the documents."""


def check(file: str, field: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Look at the first records of a file, up to one that has a text. Whether there is any record.

    Raises:
        UserError: one cannot be used, or none has ``field``.
    """
    found = False
    for text in islice(documents.of_file(file, field, documents.render_with(tokenizer)), documents.HOPELESS + 1):
        found = True
        if text is not None:
            break
    return found


def count(
    files: list[str],
    corpus: CorpusConfig,
    tokenizer: PreTrainedTokenizerBase,
    wanted: int,
    excluded: Collection[str] = (),
) -> Count:
    """The documents of a corpus that it takes to fill rows, without those whose hashes are ``excluded``.

    Args:
        wanted: tokens in all rows together.

    Raises:
        UserError: a file or a record up to there cannot be used.
    """
    result = Count()
    waiting: list[tuple[str, str]] = []
    render = documents.render_with(tokenizer)

    def take() -> None:
        for tokens, (_, key) in zip(encode([text for text, _ in waiting], tokenizer, wanted), waiting, strict=True):
            if result.tokens < wanted:
                result.documents += 1
                result.tokens += len(tokens)
                result.hashes.add(key)
        waiting.clear()

    try:
        for file in files:
            for text in documents.of_file(file, corpus.text_field, render):
                if text is not None and corpora.in_share(text, corpus.share):
                    key = corpora.document_hash(text)
                    if key not in excluded:
                        waiting.append((text, key))
                if len(waiting) == BATCH:
                    take()
                    if result.tokens >= wanted:
                        return result
    except UserError:
        take()
        if result.tokens < wanted:  # else a run does not come to that record
            raise
    take()
    return result
