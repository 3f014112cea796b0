"""Text → tokens → rows of fixed length in Parquet shards, with Ray Data."""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data

from pipeline import corpora, models
from pipeline.config import CorpusConfig, DataConfig, ModelConfig
from pipeline.errors import UserError
from pipeline.nano.corpus import bucket_of
from pipeline.redaction import redact
from pipeline.storage import StageDir

VERSION = 1
ROWS_PER_SHARD = 4096
_DOCUMENTS = "documents.json"
_COUNTS = ("documents", "records_without_text", "shared_documents_dropped", "tokens", "dropped_tail_tokens")
TEXTS = "texts.json"


@functools.lru_cache(maxsize=1)
def _tokenizer(model: ModelConfig) -> Any:
    return models.load_tokenizer(model)


def _pack(
    batch: Any,
    model: ModelConfig,
    length: int,
    share: tuple[int, int],
    excluded: Any,
    keep_texts: bool,
    field: str,
) -> dict[str, np.ndarray]:
    """One block of documents as rows of ``length`` tokens, each document followed by the end-of-text token.

    Returns one record: the rows as bytes (int32 [rows, length]), counts, its documents by hash (with their texts if
    ``keep_texts``), and what a user has to mend, which would come out of Ray Data as a traceback.
    """
    skip = ray.get(excluded)
    problem = ""
    if field not in batch:
        problem = f"text_field: no field {field}; the records have {', '.join(sorted(batch))}"
    texts, hashes, dropped, without = [], [], 0, 0
    for value in batch.get(field, []):
        try:
            text = corpora.text_of(value)
        except TypeError as error:
            problem = f"text_field: a record's {field} {error}"
            break
        if text is None:
            without += 1
            continue
        if not _in_share(text, share):
            continue
        key = corpora.document_hash(text)
        if key in skip:
            dropped += 1
            continue
        texts.append(text)
        hashes.append(key)
    tokenizer = _tokenizer(model)
    end = [tokenizer.eos_token_id]
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    stream = np.array([token for ids in encoded for token in [*ids, *end]], dtype=np.int32)
    used = len(stream) // length * length
    return {
        "rows": np.array([stream[:used].tobytes()], dtype=object),
        "documents": np.array([len(texts)]),
        "records_without_text": np.array([without]),
        "shared_documents_dropped": np.array([dropped]),
        "tokens": np.array([len(stream)]),
        "dropped_tail_tokens": np.array([len(stream) - used]),
        "documents_json": np.array(
            [json.dumps(dict(zip(hashes, texts if keep_texts else hashes, strict=True)))], dtype=object
        ),
        "problem": np.array([problem], dtype=object),
    }


def _in_share(text: str, share: tuple[int, int]) -> bool:
    """Whether a document's hash lies in the percent range ``share``."""
    return share == (0, 100) or share[0] <= bucket_of(text) < share[1]


def run(
    stage: StageDir,
    corpus: CorpusConfig,
    data: DataConfig,
    model: ModelConfig,
    apart_from: list[StageDir],
    keep_texts: bool,
) -> dict[str, Any]:
    """Fill ``stage`` with rows of a corpus; documents of the corpora ``apart_from`` are left out.

    Args:
        keep_texts: keep the documents beside the rows, for building a cloze task.

    Raises:
        UserError: the corpus has fewer tokens than asked for.
    """
    excluded = {key for other in apart_from for key in json.loads((other.path() / _DOCUMENTS).read_text())}
    wanted = -(-corpus.tokens // data.context_length)
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    with stage.work() as (directory, facts):
        began = time.time()
        documents = corpora.read(corpus, data.shards, model.trust_remote_code)
        pack = functools.partial(
            _pack,
            model=model,
            length=data.context_length,
            share=corpus.share,
            excluded=ray.put(excluded),
            keep_texts=keep_texts,
            field=corpora.column(corpus),
        )
        packed = documents.map_batches(pack, batch_size=None, concurrency=data.tokenizer_workers)
        counts = dict.fromkeys(_COUNTS, 0)
        texts: dict[str, str] = {}
        writer = ShardWriter(directory, data.context_length)
        for record in _records(packed):
            if record["problem"]:
                raise UserError(record["problem"])
            rows = np.frombuffer(record["rows"], dtype=np.int32).reshape(-1, data.context_length)
            for name in counts:
                counts[name] += int(record[name])
            texts |= json.loads(record["documents_json"])
            writer.add(rows[: wanted - writer.rows])
            if writer.rows == wanted:
                break
        writer.close()
        if writer.rows < wanted:
            raise UserError(
                f"tokens: {corpora.describe(corpus)} has {writer.rows * data.context_length} tokens in whole rows of "
                f"{data.context_length} ({counts['documents']} documents), fewer than the {corpus.tokens} asked for"
            )
        (directory / _DOCUMENTS).write_text(json.dumps(list(texts)))
        if keep_texts:
            (directory / TEXTS).write_text(json.dumps(list(texts.values())))
        seconds = time.time() - began
        facts |= counts | {
            "rows": writer.rows,
            "tokens": writer.rows * data.context_length,
            "tokens_read": counts["tokens"],
            "tokens_per_second": round(counts["tokens"] / seconds, 1),
            "context_length": data.context_length,
            "tokenizer": tokenizer_hash(model),
            "source": redact(corpora.describe(corpus)),
        }
    return stage.manifest() or {}


def _records(packed: ray.data.Dataset) -> Iterator[dict[str, Any]]:
    """The rows of a data set; a file that cannot be read is the user's to mend.

    Raises:
        UserError: it is not the text that its name says.
    """
    try:
        yield from packed.iter_rows()
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, (OSError, ValueError)):  # bytes that are no UTF-8, records that are none
            reason = " ".join(str(error.cause).split())[:300]
            raise UserError(f"source: cannot be read: {reason}") from error
        raise


class ShardWriter:
    """Parquet files of at most ROWS_PER_SHARD rows with consecutive row ids."""

    def __init__(self, directory: Path, length: int) -> None:
        self._directory, self.rows = directory, 0
        self._schema = pa.schema([("row_id", pa.int64()), ("tokens", pa.list_(pa.int32(), length))])
        self._file: pq.ParquetWriter | None = None

    def add(self, rows: np.ndarray) -> None:
        while len(rows):
            space = ROWS_PER_SHARD - self.rows % ROWS_PER_SHARD
            if space == ROWS_PER_SHARD:
                self.close()
                name = f"rows-{self.rows // ROWS_PER_SHARD:05d}.parquet"
                self._file = pq.ParquetWriter(self._directory / name, self._schema)
            part, rows = rows[:space], rows[space:]
            ids = np.arange(self.rows, self.rows + len(part))
            tokens = pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1)), part.shape[1])
            assert self._file is not None
            self._file.write_table(pa.table([pa.array(ids), tokens], schema=self._schema), row_group_size=256)
            self.rows += len(part)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def tokenizer_hash(model: ModelConfig) -> str:
    """Hash of the tokenizer's vocabulary and rules."""
    return hashlib.sha256(_tokenizer(model).backend_tokenizer.to_str().encode()).hexdigest()[:16]
