"""From a ``CorpusConfig`` to documents in a Ray data set, in the same order on any cluster."""

from __future__ import annotations

import functools
import glob
import hashlib
import math
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
from pipeline.data import content, hub
from pipeline.errors import UserError
from pipeline.nano import corpus as embedded

_READABLE = (".txt", ".jsonl", ".json", ".parquet", ".jsonl.gz", ".txt.gz")


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
    found = [path] if os.path.exists(path) else sorted(glob.glob(path))
    return [str(Path(file).resolve()) for file in found]


def _sources(config: CorpusConfig) -> list[str]:
    return [config.source] if isinstance(config.source, str) else list(config.source)


def column(config: CorpusConfig) -> str:
    """The column that :func:`read` has a corpus's documents in."""
    files = expand(config)
    made_here = kind(files[0]) == "txt" if files else describe(config) == "embedded"
    return "text" if made_here else config.text_field


def kind(file: str) -> str:
    """txt, jsonl or parquet."""
    ending = file.removesuffix(".gz").rsplit(".", 1)[-1]
    return "jsonl" if ending == "json" else ending  # both hold one record per line


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


def read(config: CorpusConfig, shards: int, trust_remote_code: bool) -> Dataset:
    """Documents of a corpus in the order of its files and records, in the column :func:`column`.

    Args:
        shards: pieces that are read in parallel, where the source can be split; nothing else depends on it.

    Raises:
        UserError: files are missing or of an unknown type.
    """
    files = expand(config)
    if files is None and describe(config) == "embedded":
        return _read_embedded(config.share, shards)
    if files is None:
        return _read_hub(config, trust_remote_code)
    form = kind(files[0])
    if form == "parquet":
        data = ray.data.read_parquet(files, columns=[config.text_field], override_num_blocks=shards)
    elif form == "txt":
        data = ray.data.read_binary_files(files, override_num_blocks=len(files)).flat_map(_paragraphs)
        return data.repartition(shards)
    else:
        data = ray.data.read_json(files, override_num_blocks=shards, lines=True)
    return data


def text_of(value: Any) -> str | None:
    """The text in a record's field; None where there is none: a null, an absent field or an empty text.

    Raises:
        TypeError: the field holds something else.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):  # pandas has NaN for both
        return None
    if not isinstance(value, str):
        kind = {"ndarray": "a list", "list": "a list", "dict": "a mapping"}.get(type(value).__name__, str(value)[:60])
        raise TypeError(f"holds {kind}, not text")
    return value or None


def _paragraphs(row: dict[str, Any]) -> list[dict[str, str]]:
    """A text file's documents: what stands between blank lines."""
    return [{"text": text} for text in paragraphs(row["bytes"].decode("utf-8", errors="replace"))]


def paragraphs(text: str) -> list[str]:
    """What stands between blank lines."""
    return [part.strip() for part in text.replace("\r\n", "\n").split("\n\n") if part.strip()]


def _docstrings(row: dict[str, Any]) -> list[dict[str, str]]:
    return [{"text": text} for text in embedded.file_documents(Path(row["item"]))]


def _read_embedded(share: tuple[int, int], shards: int) -> Dataset:
    chosen = [{"text": t} for t in _embedded_documents() if share[0] <= embedded.bucket_of(t) < share[1]]
    return ray.data.from_items(chosen, override_num_blocks=shards)


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


def _read_hub(config: CorpusConfig, trust_remote_code: bool) -> Dataset:
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
    read = functools.partial(_hub_blocks, stream=stream, field=config.text_field)
    return ray.data.from_items([{"item": name}], override_num_blocks=1).map_batches(read, concurrency=1)


def _hub_blocks(_: Any, stream: Any, field: str) -> Iterator[pa.Table]:
    """The records of a stream: ``field`` alone, or empty columns that say what the fields are."""
    for batch in stream.iter(batch_size=256):
        count = len(next(iter(batch.values())))
        yield pa.table({field: batch[field]} if field in batch else {name: pa.nulls(count) for name in batch})


def document_hash(text: str) -> str:
    """Hash of a document's words: equal for texts that differ in white space only."""
    return hashlib.sha256("".join(text.split()).encode()).hexdigest()[:16]
