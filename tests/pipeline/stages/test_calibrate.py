"""Text to packed rows with Ray Data: nothing lost, nothing shared, the same rows on any number of workers."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import sentences

from pipeline.artifacts.packed_rows import PackedRows
from pipeline.artifacts.store import MANIFEST
from pipeline.config import CorpusConfig, DataConfig, ModelConfig
from pipeline.data import corpora, local_files
from pipeline.errors import UserError
from pipeline.execution.ray_cluster import start_ray, stop_ray
from pipeline.model.loading import load_tokenizer
from pipeline.stages import calibrate
from pipeline.stages.calibrate import Calibrate
from pipeline.stages.stage import PinnedModel

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    start_ray()
    yield
    stop_ray()


def _run(
    directory: Path,
    item: str,
    corpus: CorpusConfig,
    model: Path,
    apart: list[Calibrate] | None = None,
    shards: int = 3,
    tokenizer_workers: int | None = None,
    least: int = 1,
) -> tuple[Calibrate, dict]:  # type: ignore[type-arg]
    text = Calibrate(
        store=str(directory),
        role=item,
        section=f"data.{item}",
        corpus=corpus,
        content=None,
        data=DataConfig(context_length=32, shards=shards, tokenizer_workers=tokenizer_workers),
        model=PinnedModel(ModelConfig(source=str(model)), ""),
        apart=tuple(apart or ()),
        keep_texts=True,
        least=least,
    )
    text.run()
    return text, text.facts


def _files(stage: Calibrate) -> dict[str, bytes]:
    """What a stage wrote, but for its manifest, which has times."""
    return {f.name: f.read_bytes() for f in Path(stage.directory.path()).iterdir() if f.name != MANIFEST}


def _counts(facts: dict) -> dict:  # type: ignore[type-arg]
    return {name: value for name, value in facts.items() if isinstance(value, int) or name == "documents"}


@pytest.fixture(scope="module")
def documents(tiny: Path) -> list[str]:
    """Short and long documents: of a few tokens, of a row, of dozens of rows."""
    given = [json.loads(line)["text"] for line in (tiny / "text.jsonl").read_text().splitlines()]
    return [*given[:20], " ".join(given[20:60]), *(text[:20] for text in given[60:90]), *given[90:140]]


@pytest.fixture(scope="module")
def one(tiny: Path, documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Calibrate, dict]:  # type: ignore[type-arg]
    """The documents in one file, read in one piece."""
    directory = tmp_path_factory.mktemp("one")
    corpus = CorpusConfig(source=str(write_lines(directory / "all.jsonl", documents)), tokens=TOKENS)
    return _run(directory, "one", corpus, tiny / "model", shards=1, tokenizer_workers=1)


TOKENS = 4096


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_rows_hold_the_documents_in_order(tiny: Path, documents: list[str], one: Any) -> None:
    stage, facts = one
    rows = PackedRows(stage.directory.path())
    tokenizer = load_tokenizer(ModelConfig(source=str(tiny / "model")))
    encoded = tokenizer(documents)["input_ids"]
    stream = [token for ids in encoded for token in [*ids, tokenizer.eos_token_id]]
    assert len(rows) == TOKENS // 32 == facts["rows"]
    assert rows.take(0, len(rows)).reshape(-1).tolist() == stream[:TOKENS]
    ends = np.cumsum([len(ids) + 1 for ids in encoded])
    used = int(np.searchsorted(ends, TOKENS)) + 1
    assert used < len(documents)
    assert stage.texts() == list(dict.fromkeys(documents[:used]))
    assert facts["documents"] == used
    assert (facts["tokens"], facts["tokens_read"]) == (TOKENS, ends[used - 1])
    assert facts["dropped_tail_tokens"] == ends[used - 1] - TOKENS
    assert facts["tokens_per_second"] > 0


def test_a_corpus_in_any_pieces_gives_the_same_bytes(
    tiny: Path, tmp_path: Path, documents: list[str], one: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One file or many, blocks as many and as large as you like, and records that Ray Data hands on one by one."""
    whole = str(write_lines(tmp_path / "all.jsonl", documents))
    for number, first in enumerate(range(0, len(documents), 5)):
        write_lines(tmp_path / f"part-{number:02d}.jsonl", documents[first : first + 5])
    parts = str(tmp_path / "part-*.jsonl")
    (tmp_path / "all.txt").write_text("\n\n".join(documents))
    pq.write_table(pa.table({"text": documents}), tmp_path / "all.parquet", row_group_size=7)
    cases = [(whole, 3, 2), (whole, 7, None), (parts, 3, 2), (parts, 1, 1)]
    cases += [(str(tmp_path / "all.txt"), 7, 2), (str(tmp_path / "all.parquet"), 3, 2)]
    for number, (source, shards, workers) in enumerate(cases):
        monkeypatch.setattr(calibrate, "BLOCK_BYTES", (1 << 11) if number % 2 else calibrate.BLOCK_BYTES)
        corpus = CorpusConfig(source=source, tokens=TOKENS)
        stage, facts = _run(tmp_path, f"run{number}", corpus, tiny / "model", None, shards, workers)
        assert _files(stage) == _files(one[0]), (source, shards, workers)
        assert _counts(facts) == _counts(one[1])


def test_a_data_set_on_the_hub_gives_the_rows_of_a_file(
    tiny: Path, tmp_path: Path, documents: list[str], one: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = datasets.Dataset.from_dict({"id": list(range(len(documents))), "text": documents})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table.to_iterable_dataset())
    monkeypatch.setattr(corpora, "_commit", lambda _: "main")
    monkeypatch.setattr(calibrate, "BLOCK_BYTES", 1 << 11)
    stage, _ = _run(tmp_path, "hub", CorpusConfig(source="hub:a/b", tokens=TOKENS), tiny / "model", None, 5, 2)
    assert _files(stage) == _files(one[0])
    with pytest.raises(UserError, match="text_field: no field body; the records of hub:a/b have id, text"):
        _run(tmp_path, "field", CorpusConfig(source="hub:a/b", text_field="body", tokens=TOKENS), tiny / "model")


def test_a_shuffled_view_holds_the_same_rows(tiny: Path, tmp_path: Path) -> None:
    stage, _ = _run(tmp_path, "x", CorpusConfig(source=str(tiny / "text.jsonl"), tokens=4096), tiny / "model")
    plain, mixed = PackedRows(stage.directory.path()), PackedRows(stage.directory.path(), shuffle=3)
    assert not np.array_equal(plain.take(0, 128), mixed.take(0, 128))
    assert sorted(map(bytes, plain.take(0, 128))) == sorted(map(bytes, mixed.take(0, 128)))
    assert np.array_equal(mixed[5], mixed[5 + 128])


def test_corpora_share_no_document(tiny: Path, tmp_path: Path) -> None:
    copies = tmp_path / "copies.jsonl"
    lines = (tiny / "text.jsonl").read_text().splitlines()
    copies.write_text("\n".join([*lines[:30], *(json.dumps({"text": sentences(9000 + i, 12)}) for i in range(60))]))
    evaluation, _ = _run(tmp_path, "eval", CorpusConfig(source=str(tiny / "text.jsonl"), tokens=8192), tiny / "model")
    corpus = CorpusConfig(source=str(copies), tokens=1024)
    calibration, facts = _run(tmp_path, "cal", corpus, tiny / "model", [evaluation])
    texts = [set(s.texts()) for s in (evaluation, calibration)]
    assert not texts[0] & texts[1]
    assert facts["shared_documents_dropped"] > 0


def test_shares_split_one_source(tiny: Path, tmp_path: Path) -> None:
    source = str(tiny / "text.jsonl")
    low, _ = _run(tmp_path, "low", CorpusConfig(source=source, share=(0, 50), tokens=2048), tiny / "model")
    high, _ = _run(tmp_path, "high", CorpusConfig(source=source, share=(50, 100), tokens=2048), tiny / "model")
    texts = [set(s.texts()) for s in (low, high)]
    assert texts[0]
    assert texts[1]
    assert not texts[0] & texts[1]


def test_a_corpus_that_is_too_small_is_taken_whole_where_it_fills_a_batch(tiny: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(ModelConfig(source=str(tiny / "model")))
    corpus = CorpusConfig(source=str(tiny / "text.jsonl"), tokens=10**7)
    counted = local_files.count([corpus.source], corpus, tokenizer, 10**7)
    stage, facts = _run(tmp_path, "x", corpus, tiny / "model", least=counted.tokens // 32)
    assert (facts["documents"], facts["tokens_read"]) == (400, counted.tokens)
    assert facts["rows"] == len(stage.read()) == counted.tokens // 32
    assert facts["tokens"] == facts["rows"] * 32
    assert facts["dropped_tail_tokens"] == counted.tokens % 32
    with pytest.raises(UserError, match=rf"text.jsonl has {counted.tokens} tokens in 400 documents; \d+ rows of 32"):
        _run(tmp_path, "y", corpus, tiny / "model", least=counted.tokens // 32 + 1)
    assert not list(tmp_path.glob("calibrate/y-*/manifest.json"))
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(UserError, match=r"empty.jsonl has 0 tokens in 0 documents; 1 rows of 32 tokens are needed"):
        _run(tmp_path, "z", CorpusConfig(source=str(empty), tokens=10), tiny / "model")


def test_one_long_document_gives_no_more_than_is_taken_of_it(tiny: Path, tmp_path: Path) -> None:
    text = " ".join(sentences(seed, 12) for seed in range(400)) * 10
    file = write_lines(tmp_path / "long.jsonl", [text])
    corpus = CorpusConfig(source=str(file), tokens=4096)
    _, facts = _run(tmp_path, "long", corpus, tiny / "model")
    counted = local_files.count([str(file)], corpus, load_tokenizer(ModelConfig(source=str(tiny / "model"))), 4096)
    assert facts["documents"] == 1
    assert facts["tokens_read"] == counted.tokens < len(text) / 10


def test_conversations_are_packed_as_the_texts_of_the_template(tiny: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny / "model", model)
    (model / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}")
    texts = [sentences(seed, 12) for seed in range(60)]
    chats = [[{"role": "user", "content": text}, {"role": "assistant", "content": text[:9]}] for text in texts]
    rendered = [f"<user> {text}\n<assistant> {text[:9]}\n" for text in texts]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    write_lines(tmp_path / "texts.jsonl", rendered)
    cases = (("chats", "messages"), ("texts", "text"))
    made = [
        _run(tmp_path, n, CorpusConfig(source=str(tmp_path / f"{n}.jsonl"), text_field=f, tokens=2048), model)[0]
        for n, f in cases
    ]
    assert _files(made[0]) == _files(made[1])


def test_records_without_text_are_left_out_and_counted(tiny: Path, tmp_path: Path) -> None:
    lines = (tiny / "text.jsonl").read_text().splitlines()[:60]
    bad = ['{"text": null}', '{"title": "no body"}', '{"text": ""}']
    (tmp_path / "whole.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "gaps.jsonl").write_text("\n".join(lines[:2] + bad + lines[2:] + bad) + "\n")
    found = {
        name: _run(tmp_path, name, CorpusConfig(source=str(tmp_path / f"{name}.jsonl"), tokens=1024), tiny / "model")
        for name in ("whole", "gaps")
    }
    assert found["whole"][1]["records_without_text"] == 0
    assert found["gaps"][1]["records_without_text"] == 3  # those at the end come after the last row
    texts = {name: stage.texts() for name, (stage, _) in found.items()}
    assert texts["gaps"] == texts["whole"]
    assert np.array_equal(*(PackedRows(stage.directory.path()).take(0, 32) for stage, _ in found.values()))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"text": ["a", "b"]}'], r"text_field: line 61 of bad.jsonl: text holds a list, not text"),
        (['{"text": "caf\udce9"}'], r"source: bad.jsonl: line 61 is not UTF-8; convert the file to it"),
        (["cut o"], r"source: bad.jsonl: line 61 is not a JSON record; each line has to be one"),
    ],
)
def test_what_a_user_has_to_mend_comes_out_of_ray_data_in_one_line(
    tiny: Path, tmp_path: Path, lines: list[str], message: str
) -> None:
    """Where what stands before it fills the rows, it is not come to; as in the look before a run."""
    good = (tiny / "text.jsonl").read_text().splitlines()[:60]
    file = tmp_path / "bad.jsonl"
    file.write_text("\n".join([*good, *lines]) + "\n", errors="surrogateescape")
    tokenizer = load_tokenizer(ModelConfig(source=str(tiny / "model")))
    for tokens in (1024, 10**6):
        corpus = CorpusConfig(source=str(file), tokens=tokens)
        with contextlib.nullcontext() if tokens == 1024 else pytest.raises(UserError, match=f"^{message}$"):
            local_files.count([str(file)], corpus, tokenizer, tokens)
        with (
            contextlib.nullcontext()
            if tokens == 1024
            else pytest.raises(UserError, match=rf"^data\.bad{tokens}\.{message}$")
        ):
            _run(tmp_path, f"bad{tokens}", corpus, tiny / "model")


def test_a_file_without_the_field_beside_others_is_named(tiny: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [sentences(seed, 12) for seed in range(9)])
    (tmp_path / "b.jsonl").write_text('{"body": "a"}\n')
    with pytest.raises(UserError, match=r"^data\.x\.text_field: no field text; the records of b.jsonl have body$"):
        _run(tmp_path, "x", CorpusConfig(source=str(tmp_path / "*.jsonl"), tokens=10**6), tiny / "model")


def test_text_files_split_at_blank_lines(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(sentences(i, 6) for i in range(40)))
    _, facts = _run(tmp_path, "txt", CorpusConfig(source=str(tmp_path / "*.txt"), tokens=512), tiny / "model")
    assert facts["documents"] > 5
    assert facts["source"] == "a.txt"
