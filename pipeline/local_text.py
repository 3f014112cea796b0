"""A look into local text files without Ray, before a run: the same documents that calibration will find."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from pipeline import corpora
from pipeline.config import CorpusConfig
from pipeline.errors import UserError
from pipeline.nano.corpus import bucket_of

BATCH = 64


def check_field(file: str, field: str) -> None:
    """Check that the first record of a file has ``field``; text files have no fields.

    Raises:
        UserError: it has not, or the file cannot be read as what its name says.
    """
    form, name = corpora.kind(file), Path(file).name
    if form == "txt":
        return
    if form == "parquet":
        try:
            fields = list(pq.read_schema(file).names)
        except (OSError, ValueError) as error:
            raise UserError(f"source: {name} is not a parquet file: {' '.join(str(error).split())[:200]}") from error
    else:
        first = next(_records(file), None)
        if first is None:
            raise UserError(f"source: {name} is empty")
        fields = sorted(first)
    if field not in fields:
        raise UserError(f"text_field: no field {field}; the records of {name} have {', '.join(fields)}")


def count(files: list[str], corpus: CorpusConfig, tokenizer: PreTrainedTokenizerBase, enough: int) -> tuple[int, int]:
    """Documents and tokens of a corpus, each document with its end-of-text token; counting stops at ``enough``.

    What calibration packs is at most this: it also drops documents that other corpora hold, and tails of rows.
    """
    low, high = corpus.share
    documents = tokens = 0
    batch: list[str] = []

    def counted() -> int:
        return sum(len(ids) + 1 for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"])

    for text in _documents(files, corpus.text_field):
        if (low, high) == (0, 100) or low <= bucket_of(text) < high:
            batch.append(text)
            documents += 1
        if len(batch) == BATCH:
            tokens += counted()
            batch.clear()
            if tokens >= enough:
                return documents, tokens
    return documents, tokens + (counted() if batch else 0)


def _documents(files: list[str], field: str) -> Iterator[str]:
    for file in files:
        match corpora.kind(file):
            case "txt":
                with _open(file) as text:
                    yield from corpora.paragraphs(text.read())
            case "parquet":
                for column in pq.ParquetFile(file).iter_batches(columns=[field]):
                    yield from filter(None, column.column(0).to_pylist())
            case _:
                yield from filter(None, (record.get(field) for record in _records(file)))


def _records(file: str) -> Iterator[dict[str, Any]]:
    with _open(file) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if not isinstance(record, dict):
                raise UserError(f"source: {Path(file).name}: line {number} is not a JSON record")
            yield record


def _open(file: str) -> Any:
    opener = gzip.open if file.endswith(".gz") else open
    return opener(file, "rt", encoding="utf-8", errors="replace")
