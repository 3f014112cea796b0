"""A look into local text files without Ray, before a run: the same documents that calibration will find."""

from __future__ import annotations

import codecs
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from pipeline.config import CorpusConfig
from pipeline.data import corpora
from pipeline.errors import UserError
from pipeline.nano.corpus import bucket_of

BATCH = 64


def check_field(file: str, field: str) -> bool:
    """Check that the first record of a file has ``field``; text files have no fields. Whether there is any record.

    Raises:
        UserError: it has not, or the file cannot be read as what its name says.
    """
    form, name = corpora.kind(file), Path(file).name
    if form == "txt":
        return True
    if form == "parquet":
        try:
            fields = list(pq.read_schema(file).names)
        except (OSError, ValueError) as error:
            raise UserError(f"source: {name} is not a parquet file: {' '.join(str(error).split())[:200]}") from error
    else:
        _, first = next(_records(file), (0, None))
        if first is None:
            return False
        fields = sorted(first)
    if field not in fields:
        raise UserError(f"text_field: no field {field}; the records of {name} have {', '.join(fields)}")
    return True


def count(files: list[str], corpus: CorpusConfig, tokenizer: PreTrainedTokenizerBase, enough: int) -> tuple[int, int]:
    """Documents and tokens of a corpus, each document with its end-of-text token; counting stops at ``enough``.

    What calibration packs is at most this: it also drops documents that other corpora hold, and the last part of a row.
    """
    low, high = corpus.share
    documents = tokens = 0
    batch: list[str] = []

    def counted() -> int:
        return sum(len(ids) + 1 for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"])

    for text in filter(None, _documents(files, corpus.text_field)):
        if (low, high) == (0, 100) or low <= bucket_of(text) < high:
            batch.append(text)
            documents += 1
        if len(batch) == BATCH:
            tokens += counted()
            batch.clear()
            if tokens >= enough:
                return documents, tokens
    return documents, tokens + (counted() if batch else 0)


def _documents(files: list[str], field: str) -> Iterator[str | None]:
    for file in files:
        match corpora.kind(file):
            case "txt":
                with _open(file) as text:
                    yield from corpora.paragraphs(text.read().decode("utf-8", errors="replace"))
            case "parquet":
                for column in pq.ParquetFile(file).iter_batches(columns=[field]):
                    for value in column.column(0).to_pylist():
                        yield _text(value, f"a record of {Path(file).name}", field)
            case _:
                for number, record in _records(file):
                    yield _text(record.get(field), f"line {number} of {Path(file).name}", field)


def _text(value: Any, where: str, field: str) -> str | None:
    try:
        return corpora.text_of(value)
    except TypeError as error:
        raise UserError(f"text_field: {where}: {field} {error}") from None


def _records(file: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The records of a file, each with the number of its line."""
    name = Path(file).name
    number = 0
    try:
        with _open(file) as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line.decode("utf-8"))
                except UnicodeDecodeError:
                    raise UserError(f"source: {name}: line {number} is not UTF-8; convert the file to it") from None
                except ValueError:
                    if line.startswith(codecs.BOM_UTF8):
                        raise UserError(f"source: {name} begins with a byte order mark; save it without") from None
                    record = None
                if not isinstance(record, dict):
                    raise UserError(f"source: {name}: line {number} is not a JSON record")
                yield number, record
    except (OSError, EOFError) as error:  # a .gz that is none, or is cut off
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"source: {name} cannot be read after line {number}: {reason}") from error


def _open(file: str) -> Any:
    return gzip.open(file) if file.endswith(".gz") else open(file, "rb")
