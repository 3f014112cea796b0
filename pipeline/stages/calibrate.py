"""Text → tokens → rows of fixed length in Parquet shards, with Ray Data."""

from __future__ import annotations

import functools
import hashlib
import json
import time
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
from pipeline.storage import StageDir

VERSION = 1
ROWS_PER_SHARD = 4096
_DOCUMENTS = "documents.json"
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
) -> dict[str, np.ndarray]:
    """One block of documents as rows of ``length`` tokens, each document followed by the end-of-text token.

    Returns one record: the rows as bytes (int32 [rows, length]), counts, and its documents by hash (with their texts if
    ``keep_texts``).
    """
    skip = ray.get(excluded)
    if "text" not in batch:
        raise UserError(f"text_field: no field text; the records have {', '.join(sorted(batch))}")
    texts, hashes, dropped = [], [], 0
    for text in batch["text"]:
        if not text or not _in_share(text, share):
            continue
        key = corpora.document_hash(text)
        if key in skip:
            dropped += 1
            continue
        texts.append(str(text))
        hashes.append(key)
    tokenizer = _tokenizer(model)
    end = [tokenizer.eos_token_id]
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    stream = np.array([token for ids in encoded for token in [*ids, *end]], dtype=np.int32)
    used = len(stream) // length * length
    return {
        "rows": np.array([stream[:used].tobytes()], dtype=object),
        "documents": np.array([len(texts)]),
        "shared_documents_dropped": np.array([dropped]),
        "tokens": np.array([len(stream)]),
        "dropped_tail_tokens": np.array([len(stream) - used]),
        "documents_json": np.array(
            [json.dumps(dict(zip(hashes, texts if keep_texts else hashes, strict=True)))], dtype=object
        ),
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
        )
        packed = documents.map_batches(pack, batch_size=None, concurrency=data.tokenizer_workers)
        counts = {"documents": 0, "shared_documents_dropped": 0, "tokens": 0, "dropped_tail_tokens": 0}
        texts: dict[str, str] = {}
        writer = ShardWriter(directory, data.context_length)
        for record in packed.iter_rows():
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
            "source": corpora.describe(corpus),
        }
    return stage.manifest() or {}


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
