"""The documents of text files, Parquet files and other records: one reader for the look before a run and for the run.

What a file holds is the user's: a record without a text is left out, and anything else that cannot be used ends in one
line that says where it stands.
"""

from __future__ import annotations

import codecs
import gzip
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from pipeline.errors import UserError

#: So many records without the field of the texts at the beginning of a file, and the rest is not read.
HOPELESS = 10_000
#: How files in other encodings begin. UTF-32 begins as UTF-16 does.
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

#: Gives the text of a conversation, a list of messages.
Render = Callable[[list[dict[str, Any]]], str]


def kind(file: str) -> str:
    """txt, jsonl or parquet."""
    ending = file.removesuffix(".gz").rsplit(".", 1)[-1]
    return "jsonl" if ending == "json" else ending  # both hold one record per line


def of_file(file: str, field: str, render: Render) -> Iterator[str | None]:
    """The text of each record of a local file or a URI, in order; None for a record without one.

    Args:
        field: of the records that holds the text; text files have none.
        render: makes a text of a conversation.

    Raises:
        UserError: the file is not what its name says, a record cannot be used, or none has ``field``.
    """
    name = Path(file).name
    if kind(file) == "txt":
        yield from _paragraphs(file, name)
    else:
        records = _rows(file, name, field) if kind(file) == "parquet" else _lines(file, name)
        yield from of_records(records, name, field, render)


def of_records(
    records: Iterable[tuple[str, Mapping[str, Any]]], name: str, field: str, render: Render
) -> Iterator[str | None]:
    """The text of each record, which comes with where it stands; see :func:`of_file`.

    Args:
        name: of what the records are in, for errors.
    """
    others: set[str] = set()
    has_field, number = False, 0
    for number, (where, record) in enumerate(records, 1):
        has_field = has_field or field in record
        if not has_field:
            others |= record.keys()
            if number == HOPELESS:
                break
        try:
            text = text_of(record.get(field), render)
        except ValueError as error:
            raise UserError(f"text_field: {where} of {name}: {field} {error}") from error
        yield text
    if number and not has_field:
        fields = ", ".join(sorted(others)) or "no field at all"
        raise UserError(f"text_field: no field {field}; the records of {name} have {fields[:300]}")


def text_of(value: Any, render: Render) -> str | None:
    """The text in a record's field; None where there is none: a null, an empty text, or halves of characters.

    Raises:
        ValueError: the field holds something else, or a conversation that ``render`` does not take.
    """
    if value is None or value != value or value in ("", []):  # NaN, which some write for nothing, differs from itself
        return None
    if isinstance(value, list) and all(isinstance(part, dict) and "role" in part for part in value):
        try:
            # In a table every message has all fields, those that it lacks with nothing in them.
            value = render([{name: part for name, part in each.items() if part is not None} for each in value])
        except Exception as error:  # of whatever kind a template raises
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"holds a conversation that the tokenizer makes no text of: {reason}") from error
    if not isinstance(value, str):
        kinds: dict[type[Any], str] = {list: "a list", dict: "a mapping", bytes: "bytes"}
        named = kinds.get(type(value), str(value)[:60])
        raise ValueError(f"holds {named}, not text")
    try:
        value.encode()
    except UnicodeEncodeError:  # one of the two that JSON writes some characters with
        return None
    return value or None


def render_with(tokenizer: PreTrainedTokenizerBase) -> Render:
    """Texts of conversations by the chat template of a tokenizer."""

    def render(messages: list[dict[str, Any]]) -> str:
        if tokenizer.chat_template is None:
            raise ValueError("it has no chat template")
        return str(tokenizer.apply_chat_template(messages, tokenize=False))

    return render


def _paragraphs(file: str, name: str) -> Iterator[str]:
    """What stands between blank lines."""
    waiting: list[str] = []
    for number, line in _text_lines(file, name):
        if "\0" in line:
            raise UserError(f"source: {name}: line {number} holds the character NUL, as no text does")
        if line.strip():
            waiting.append(line)
        elif waiting:
            yield "\n".join(waiting).strip()
            waiting = []
    if waiting:
        yield "\n".join(waiting).strip()


def _lines(file: str, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """One JSON record a line."""
    for number, line in _text_lines(file, name):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise UserError(f"source: {name}: line {number} is not a JSON record; each line has to be one")
        yield f"line {number}", record


def _text_lines(file: str, name: str) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file with their numbers, whatever system they were written on, without their ends."""
    number = 0
    try:
        with _open(file) as raw, gzip.open(raw) if file.endswith(".gz") else raw as octets:
            for line in octets:
                if number == 0:
                    if line.startswith(_UTF_16):
                        raise UserError(f"source: {name} is UTF-16; convert the file to UTF-8")
                    line = line.removeprefix(codecs.BOM_UTF8)
                # All of a file of old Macs is one line to Python.
                for part in line.removesuffix(b"\n").removesuffix(b"\r").split(b"\r"):
                    number += 1
                    try:
                        text = part.decode()
                    except UnicodeDecodeError:
                        raise UserError(f"source: {name}: line {number} is not UTF-8; convert the file to it") from None
                    yield number, text
    except UserError:
        raise
    except Exception as error:  # a .gz that is none or is cut off; stores have errors of their own
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"source: {name} cannot be read after line {number}: {reason}") from error


def _rows(file: str, name: str, field: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a Parquet file, with ``field`` alone or, where there is none, the names of all fields."""
    try:
        raw = _open(file)
        parquet = pq.ParquetFile(raw)
    except Exception as error:  # of pyarrow, or of a store
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"source: {name} is not a parquet file: {reason}") from error
    number = 0
    with raw, parquet:
        fields = parquet.schema_arrow.names
        if field not in fields:
            for number in range(parquet.metadata.num_rows):
                yield f"record {number + 1}", dict.fromkeys(fields)
            return
        try:
            for batch in parquet.iter_batches(columns=[field], batch_size=1024):
                for value in batch.column(batch.schema.get_field_index(field)):
                    number += 1
                    yield f"record {number}", {field: value.as_py()}
        except (pa.ArrowException, OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"source: {name} cannot be read after record {max(number - 1, 0)}: {reason}") from error


def _open(file: str) -> Any:
    return fsspec.open(file, "rb").open() if "://" in file else open(file, "rb")
