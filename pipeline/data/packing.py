"""From tokens of documents, in blocks of any size, to what stands in the rows: it depends on the documents alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

#: In place of the number of its tokens: what became of a record that gives none.
OTHER_SHARE, WITHOUT_TEXT, SHARED = 0, -1, -2


@dataclass
class Packer:
    """Takes records in their order until there are enough tokens, and counts what it took, to the record.

    Args:
        wanted: tokens in all rows together.
        write: takes tokens in their order. int32 [n]
    """

    wanted: int
    write: Callable[[np.ndarray], None]
    tokens: int = 0
    """Tokens of all documents taken; those of the last one may go beyond ``wanted``."""
    records: int = 0
    documents: int = 0
    records_without_text: int = 0
    shared_documents_dropped: int = 0
    leading: int = 0
    """Records without text before the first one with a text."""
    texts: dict[str, str] = field(default_factory=dict)
    """Different documents by hash, in their order."""
    _seen: bool = False

    @property
    def full(self) -> bool:
        return self.tokens >= self.wanted

    def add(self, lengths: np.ndarray, tokens: np.ndarray, hashes: Sequence[str], texts: Sequence[str]) -> None:
        """Take the next records, or as many as are wanted.

        Args:
            lengths: tokens of each record, or what became of it. int [records]
            tokens: of all documents, one after another. int32 [sum of the lengths that are positive]
            hashes, texts: of each document.
        """
        ends = np.cumsum(np.maximum(lengths, 0), dtype=np.int64)
        left = self.wanted - self.tokens
        lengths = lengths[: int(np.searchsorted(ends, left)) + 1]  # the record that reaches ``left`` is the last
        if not len(lengths):
            return
        if not self._seen:
            with_text = np.flatnonzero(lengths != WITHOUT_TEXT)
            self._seen = len(with_text) > 0
            self.leading += int(with_text[0]) if self._seen else len(lengths)
        documents = int((lengths > 0).sum())
        self.records += len(lengths)
        self.documents += documents
        self.records_without_text += int((lengths == WITHOUT_TEXT).sum())
        self.shared_documents_dropped += int((lengths == SHARED).sum())
        self.texts |= dict(zip(hashes[:documents], texts[:documents], strict=True))
        self.write(tokens[:left])
        self.tokens += int(ends[len(lengths) - 1])
