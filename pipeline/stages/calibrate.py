"""Text → tokens → rows of fixed length in Parquet shards, with Ray Data."""

from __future__ import annotations

import functools
import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data

from pipeline.artifacts.packed_rows import PackedRows
from pipeline.artifacts.store import fingerprint
from pipeline.config import CorpusConfig, DataConfig, ModelConfig
from pipeline.data import corpora
from pipeline.data.documents import HOPELESS, render_with
from pipeline.data.packing import OTHER_SHARE, SHARED, WITHOUT_TEXT, Packer
from pipeline.data.tokenise import encode
from pipeline.errors import DamagedError, UserError
from pipeline.formatting import count
from pipeline.model import loading
from pipeline.model.sizes import Sizes
from pipeline.stages.cost import Cost, Machine
from pipeline.stages.stage import PinnedModel, Place, Remarks, Stage
from pipeline.tracking.redaction import redact
from pipeline.tracking.tracker import Run

ROWS_PER_SHARD = 4096
ROWS_PER_GROUP = 256
#: What Ray Data hands on at once, in bytes. It bounds memory, and what is read beyond the last row.
BLOCK_BYTES = 8 * 2**20
_DOCUMENTS = "documents.json"
_TEXTS = "texts.json"

USES = {"calibration": "training", "heldout": "validation"}
"""What a text is for, in MLflow's words; all others are for evaluation."""


@functools.lru_cache(maxsize=1)
def _tokenizer(model: ModelConfig) -> Any:
    return loading.load_tokenizer(model)


def _render(messages: list[dict[str, Any]], model: ModelConfig) -> str:
    return render_with(_tokenizer(model))(messages)


def _tokenise(
    block: pa.Table, model: ModelConfig, share: tuple[int, int], excluded: Any, keep_texts: bool, most: int
) -> dict[str, np.ndarray]:
    """The tokens of one block of records, each document followed by the end-of-text token.

    Returns one record: what :meth:`Packer.add` takes (texts only if ``keep_texts``, hashes in their place), and what a
    user has to mend, which concerns the record after the last of ``lengths``.
    """
    skip = ray.get(excluded)
    problems = block.column("problem").to_pylist()
    problem = next(filter(None, problems), "")
    texts, hashes, lengths = [], [], []
    for text in block.column("text").to_pylist()[: problems.index(problem) if problem else None]:
        if text is None:
            lengths.append(WITHOUT_TEXT)
        elif not corpora.in_share(text, share):
            lengths.append(OTHER_SHARE)
        elif (key := corpora.document_hash(text)) in skip:
            lengths.append(SHARED)
        else:
            lengths.append(1)  # the end-of-text token, for now
            texts.append(text)
            hashes.append(key)
    tokens = encode(texts, _tokenizer(model), most)
    found = np.array(lengths, dtype=np.int64)
    found[found > 0] = [len(ids) for ids in tokens]
    stream = np.concatenate([np.empty(0, np.int32), *tokens])
    return {
        "lengths": np.array([found.tobytes()], dtype=object),
        "tokens": np.array([stream.tobytes()], dtype=object),
        "documents": np.array([json.dumps([hashes, texts if keep_texts else hashes])], dtype=object),
        "problem": np.array([problem], dtype=object),
    }


@dataclass(frozen=True, eq=False)
class Calibrate(Stage[PackedRows]):
    """The rows of one corpus."""

    KIND = PHASE = "calibrate"
    VERSION = 3
    PLACE = Place.DRIVER

    role: str
    """What the text is for: ``calibration``, ``heldout``, or the name of an evaluation text."""
    section: str
    """The corpus in the recipe, for messages."""
    corpus: CorpusConfig
    content: object
    """What tells the corpus from another one of the same name, see :func:`corpora.content_key`."""
    data: DataConfig
    model: PinnedModel
    apart: tuple[Calibrate, ...]
    """Corpora whose documents are left out."""
    keep_texts: bool
    """Keep the documents beside the rows, for building a cloze task."""
    least: int = 1
    """Rows that there have to be, where the corpus has fewer tokens than requested."""

    @property
    def item(self) -> str:
        return self.role

    @property
    def label(self) -> str:
        return f"{self.role}, {count(self.corpus.tokens)} tokens"

    def inputs(self) -> list[object]:
        return [self.model.identity, self._selection(), self.keep_texts]

    def _selection(self) -> list[object]:
        """What decides which documents there are and how they are packed."""
        # Keeping the texts for a cloze task changes the artifact, not what others have to stay apart from.
        apart = [fingerprint(other.model.identity, other._selection()) for other in self.apart]
        return [self.corpus, self.content, self.data.context_length, apart]

    def cost(self, sizes: Sizes, machine: Machine) -> Cost:  # noqa: ARG002 - of Stage
        return Cost(disk=4.0 * self.corpus.tokens)

    def run(self) -> None:
        """See :meth:`Stage.run`.

        Raises:
            UserError: a file is not what its name says, a record cannot be used, or there are too few rows.
        """
        try:
            _pack(self)
        except DamagedError:
            raise
        except UserError as error:
            raise UserError(f"{self.section}.{error}") from error

    def read(self) -> PackedRows:
        return PackedRows(self.directory.path())

    def remarks(self) -> Remarks:
        facts = self.facts
        without = facts["records_without_text"]
        warnings = [f"{self.section}: {without} records without text were left out"] if without else []
        if short := corpora.shortage(
            self.corpus, facts["documents"], facts["tokens_read"], facts["context_length"], least=0
        ):
            warnings.append(f"{self.section}.{short}")
        return Remarks(
            lines=(
                f"    {facts['source']}: {facts['documents']} documents, {facts['rows']} rows of "
                f"{facts['context_length']}, {facts['tokens_per_second']:.0f} tokens/s",
            ),
            warnings=warnings,
            metrics={f"tokens_per_second.{self.role}": facts["tokens_per_second"]},
        )

    def record(self, run: Run) -> None:
        facts = self.facts
        sizes = {key: facts.get(key) for key in ("documents", "tokens", "rows", "context_length", "tokenizer")}
        run.log_input(self.role, self.key, str(facts.get("source", "")), USES.get(self.role, "evaluation"), sizes)

    def texts(self) -> list[str]:
        """The documents, where they were kept."""
        texts: list[str] = json.loads((self.directory.path() / _TEXTS).read_text())
        return texts


def _pack(work: Calibrate) -> None:
    """Fill the directory with the rows; documents of other corpora are left out."""
    corpus, data, model = work.corpus, work.data, work.model.config
    excluded = {key for other in work.apart for key in json.loads((other.directory.path() / _DOCUMENTS).read_text())}
    wanted = -(-corpus.tokens // data.context_length)
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.target_max_block_size = BLOCK_BYTES
    context.enable_progress_bars = False
    with work.directory.work() as (directory, facts):
        began = time.time()
        render = functools.partial(_render, model=model)
        documents = corpora.read(corpus, data.shards, model.trust_remote_code, render)
        tokenise = functools.partial(
            _tokenise,
            model=model,
            share=corpus.share,
            excluded=ray.put(excluded),
            keep_texts=work.keep_texts,
            most=wanted * data.context_length,
        )
        tokenised = documents.map_batches(
            tokenise, batch_size=None, batch_format="pyarrow", concurrency=data.tokenizer_workers
        )
        writer = ShardWriter(directory, data.context_length)
        packer = Packer(wanted * data.context_length, writer.add)
        produced = 0
        for record in tokenised.iter_rows():
            tokens = np.frombuffer(record["tokens"], dtype=np.int32)
            produced += len(tokens)
            packer.add(np.frombuffer(record["lengths"], dtype=np.int64), tokens, *json.loads(record["documents"]))
            if packer.leading >= HOPELESS:
                raise UserError(f"text_field: the first {HOPELESS} records have no text in {corpus.text_field}")
            if packer.full:
                break
            if record["problem"]:
                raise UserError(record["problem"])
        writer.close()
        corpora.shortage(corpus, packer.documents, packer.tokens, data.context_length, work.least)
        (directory / _DOCUMENTS).write_text(json.dumps(list(packer.texts)))
        if work.keep_texts:
            (directory / _TEXTS).write_text(json.dumps(list(packer.texts.values())))
        seconds = time.time() - began
        facts |= {
            "documents": packer.documents,
            "records_without_text": packer.records_without_text,
            "shared_documents_dropped": packer.shared_documents_dropped,
            "dropped_tail_tokens": packer.tokens - writer.rows * data.context_length,
            "rows": writer.rows,
            "tokens": writer.rows * data.context_length,
            "tokens_read": packer.tokens,
            "tokens_per_second": round(produced / seconds, 1),
            "context_length": data.context_length,
            "tokenizer": tokenizer_hash(model),
            "source": redact(corpora.describe(corpus)),
        }


class ShardWriter:
    """Parquet files of at most ROWS_PER_SHARD rows with consecutive row ids.

    Rows are cut from the stream of all tokens; the files are the same in however many pieces it comes.
    """

    def __init__(self, directory: Path, length: int) -> None:
        self._directory, self._length, self.rows = directory, length, 0
        self._schema = pa.schema([("row_id", pa.int64()), ("tokens", pa.list_(pa.int32(), length))])
        self._file: pq.ParquetWriter | None = None
        self._waiting = np.empty(0, dtype=np.int32)

    def add(self, tokens: np.ndarray) -> None:
        """Write the next tokens, or keep them until there is a whole group of rows. Integers, of any shape."""
        stream = np.concatenate([self._waiting, tokens.reshape(-1)], dtype=np.int32)
        group = ROWS_PER_GROUP * self._length
        whole = len(stream) // group * group
        self._waiting = stream[whole:].copy()  # not a view, which would hold all of the stream
        for first in range(0, whole, group):
            self._write_group(stream[first : first + group])

    def _write_group(self, tokens: np.ndarray) -> None:
        if self.rows % ROWS_PER_SHARD == 0:
            self._end_file()
            name = f"rows-{self.rows // ROWS_PER_SHARD:05d}.parquet"
            self._file = pq.ParquetWriter(self._directory / name, self._schema)
        assert self._file is not None
        column = pa.FixedSizeListArray.from_arrays(pa.array(tokens), self._length)
        ids = pa.array(np.arange(self.rows, self.rows + len(column)))
        self._file.write_table(pa.table([ids, column], schema=self._schema))
        self.rows += len(column)

    def close(self) -> None:
        """Write the last rows. Tokens that fill no row are dropped."""
        whole = len(self._waiting) // self._length * self._length
        if whole:
            self._write_group(self._waiting[:whole])
        self._end_file()

    def _end_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def tokenizer_hash(model: ModelConfig) -> str:
    """Hash of the tokenizer's vocabulary and rules."""
    return hashlib.sha256(_tokenizer(model).backend_tokenizer.to_str().encode()).hexdigest()[:16]
