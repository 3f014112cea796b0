"""From a ``CorpusConfig`` to documents in a Ray data set, in the same order on any cluster."""

from __future__ import annotations

import functools
import glob
import hashlib
import os
import platform
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray.data
from ray.data import Dataset

from pipeline.config import CorpusConfig
from pipeline.config.paths import expand_variables
from pipeline.data import content, documents, hub
from pipeline.data.documents import Render, kind
from pipeline.errors import UserError
from pipeline.nano import corpus as embedded

_READABLE = (".txt", ".jsonl", ".json", ".parquet", ".txt.gz", ".jsonl.gz", ".json.gz")
#: What is handed on at once.
BLOCK_RECORDS, BLOCK_CHARACTERS = 256, 2**20


def expand(config: CorpusConfig) -> list[str] | None:
    """The files or URIs of a corpus in a fixed order; none for the embedded text or a hub data set.

    Raises:
        UserError: a file does not exist, or its type is not readable.
    """
    sources = _sources(config)
    if sources == ["embedded"] or sources[0].startswith("hub:"):
        return None
    found = {source: _files(source) for source in sources}
    files = [file for some in found.values() for file in some]
    missing = next((source for source, some in found.items() if not some), None)
    if missing is not None:
        # Some of several files is not what a table should be made from, fallback or not.
        unset = " (the variable is not set)" if "$" in expand_variables(missing) else ""
        raise UserError(f"source: no file matches {missing}{unset}; give existing files, embedded or hub:NAME")
    for file in files:
        if os.path.isdir(file):
            raise UserError(f"source: {file} is a folder; give its files, such as {file}/*.jsonl")
        if not file.endswith(_READABLE):
            raise UserError(f"source: cannot read {file}; known types: {', '.join(_READABLE)}")
    kinds = {kind(file) for file in files}
    if len(kinds) > 1:
        raise UserError(f"source: files of one type, please, not {', '.join(sorted(kinds))} together")
    return files


def is_absent(config: CorpusConfig) -> bool:
    """Whether a corpus is to be read from files and none of them exists."""
    sources = _sources(config)
    return sources != ["embedded"] and not sources[0].startswith("hub:") and not any(map(_files, sources))


def _files(source: str) -> list[str]:
    """The files that a path, a pattern or a URI stands for."""
    path = expand_variables(source)
    if "://" in path:
        return [path]
    path = os.path.expanduser(path)
    # What exists is no pattern, whatever brackets are in its name.
    found = [path] if os.path.exists(path) else sorted(glob.glob(_pattern(path)))
    return [str(Path(file).resolve()) for file in found]


def _pattern(path: str) -> str:
    """A pattern in whose folders that exist no character stands for others."""
    folder, name = os.path.split(path)
    if not folder or folder == path:
        return path
    return os.path.join(glob.escape(folder) if os.path.isdir(folder) else _pattern(folder), name)


def _sources(config: CorpusConfig) -> list[str]:
    return [config.source] if isinstance(config.source, str) else list(config.source)


def describe(config: CorpusConfig) -> str:
    """The source in a few words, for tables."""
    files = expand(config)
    if files:
        return ", ".join(Path(f).name for f in files)
    return config.source if isinstance(config.source, str) and config.source.startswith("hub:") else "embedded"


def content_key(config: CorpusConfig) -> list[Any]:
    """What tells a corpus's content from any other: hashes of its files, a commit, versions of what is read."""
    files = expand(config)
    if files is not None:
        return content.of_places(files)
    source = describe(config)
    if source == "embedded":
        return [source, platform.python_version(), *map(version, embedded.RUNTIME_PACKAGES)]
    return [source, _commit(source)]


def _commit(source: str) -> str:
    name = source.removeprefix("hub:")
    if not hub.is_name(name):
        raise UserError(f"source: {source}: no data set can have the name {name!r}; give hub:DATASET")
    return hub.commit("dataset", name, None)


def read(config: CorpusConfig, shards: int, trust_remote_code: bool, render: Render) -> Dataset:
    """Documents of a corpus in the order of its files and records.

    Of each record there is its ``text``, or none, and a ``problem`` that the user has to mend, in most cases "". Where
    there is one, what follows from the same file is not read.

    Args:
        shards: pieces that are read in parallel, where the source can be split; nothing else depends on it.
        render: makes a text of a conversation.

    Raises:
        UserError: files are missing or of an unknown type.
    """
    files = expand(config)
    if files is None and describe(config) == "embedded":
        return _read_embedded(config.share, shards)
    if files is None:
        return _read_hub(config, trust_remote_code, render)
    read = functools.partial(_file_blocks, field=config.text_field, render=render)
    data = ray.data.from_items([{"item": file} for file in files], override_num_blocks=min(shards, len(files)))
    # Half a CPU: tasks that ask for something else are kept apart, so that one file's documents are tokenised by all.
    return data.map_batches(read, batch_size=1, num_cpus=0.5, concurrency=shards)


def _file_blocks(batch: Any, field: str, render: Render) -> Iterator[pa.Table]:
    for file in batch["item"]:
        yield from _blocks(documents.of_file(str(file), field, render))


def _blocks(texts: Iterator[str | None]) -> Iterator[pa.Table]:
    """The texts in pieces; what is wrong with one comes last, as Ray Data would make a traceback of it."""
    waiting: list[str | None] = []
    size, problem = 0, ""
    try:
        for text in texts:
            waiting.append(text)
            size += len(text or "")
            if size >= BLOCK_CHARACTERS or len(waiting) >= BLOCK_RECORDS:
                yield _table(waiting)
                waiting, size = [], 0
    except UserError as error:
        problem = str(error)
    if waiting:
        yield _table(waiting)
    if problem:
        yield _table([None], problem)


def _table(texts: list[str | None], problem: str = "") -> pa.Table:
    return pa.table({"text": pa.array(texts, pa.large_string()), "problem": [problem] * len(texts)})


def _docstrings(row: dict[str, Any]) -> list[dict[str, str]]:
    return [{"text": text} for text in embedded.file_documents(Path(row["item"]))]


def _read_embedded(share: tuple[int, int], shards: int) -> Dataset:
    chosen = [text for text in _embedded_documents() if in_share(text, share)]
    return ray.data.from_items([{"text": text, "problem": ""} for text in chosen], override_num_blocks=shards)


@functools.lru_cache(maxsize=1)
def _embedded_documents() -> list[str]:
    """All embedded documents once each, in a fixed order; parsed in parallel, once per process."""
    files = [str(f) for f in embedded.source_files()]
    parsed = ray.data.from_items(files, override_num_blocks=16).flat_map(_docstrings)
    unique: dict[str, str] = {}
    for text in [*embedded.topics(), *(row["text"] for row in parsed.iter_rows())]:
        unique.setdefault(document_hash(text), text)  # inherited docstrings stand in many files
    # Neighbours in a file are about the same thing; sorted by hash, the subjects spread evenly over the rows.
    return [text for _, text in sorted(unique.items())]


def _read_hub(config: CorpusConfig, trust_remote_code: bool, render: Render) -> Dataset:
    from datasets import load_dataset

    assert isinstance(config.source, str)
    name = config.source.removeprefix("hub:")
    try:
        stream = load_dataset(
            name,
            config.subset,
            split=config.split,
            revision=_commit(config.source),
            streaming=True,
            trust_remote_code=trust_remote_code or None,
        )
    except Exception as error:  # the hub client raises a dozen kinds
        raise UserError(f"source: cannot read hub:{name}: {' '.join(str(error).split())[:300]}") from error
    # Read in one task, whatever the cluster: of a data set on the hub, Ray's own reader takes other files, of no fixed
    # revision. The limit of one also keeps this task apart from those that follow it.
    read = functools.partial(_hub_blocks, stream=stream, name=config.source, field=config.text_field, render=render)
    return ray.data.from_items([{"item": name}], override_num_blocks=1).map_batches(read, concurrency=1)


def _hub_blocks(_: Any, stream: Any, name: str, field: str, render: Render) -> Iterator[pa.Table]:
    records = ((f"record {number}", record) for number, record in enumerate(stream, 1))
    return _blocks(documents.of_records(records, name, field, render))


def shortage(corpus: CorpusConfig, documents: int, tokens: int, length: int, least: int) -> str | None:
    """What a user has to be told where a corpus fills fewer rows than requested; none where it fills all.

    Args:
        documents, tokens: what it has, those aside that are not in its share or in other corpora.
        length: of a row, in tokens.

    Raises:
        UserError: it fills fewer rows than ``least``.
    """
    rows = tokens // length
    if rows >= -(-corpus.tokens // length):
        return None
    share = "" if corpus.share == (0, 100) else f" in its share {list(corpus.share)}"
    has = f"tokens: {describe(corpus)[:200]} has {tokens} tokens in {documents} documents{share}"
    if rows < least:
        raise UserError(f"{has}; {least} rows of {length} tokens are needed at least, and it fills {rows}")
    return f"{has}, fewer than the {corpus.tokens} requested; its {rows} rows of {length} are all there is to use"


def in_share(text: str, share: tuple[int, int]) -> bool:
    """Whether a document's hash lies in the percent range ``share``."""
    return share == (0, 100) or share[0] <= embedded.bucket_of(text) < share[1]


def document_hash(text: str) -> str:
    """Hash of a document's words: equal for texts that differ in white space only."""
    return hashlib.sha256("".join(text.split()).encode()).hexdigest()[:16]
