"""Text to packed rows with Ray Data: nothing lost, nothing shared, the same rows on any number of workers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import sentences

from pipeline.config import CorpusConfig, DataConfig, ModelConfig
from pipeline.errors import UserError
from pipeline.models import load_tokenizer
from pipeline.ray_cluster import start_ray, stop_ray
from pipeline.rows import PackedRows
from pipeline.stages import calibrate
from pipeline.storage import StageDir

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    start_ray()
    yield
    stop_ray()


def _run(
    directory: Path, item: str, corpus: CorpusConfig, model: Path, apart: list[StageDir] | None = None, **data: object
) -> tuple[StageDir, dict]:  # type: ignore[type-arg]
    stage = StageDir(str(directory), "calibrate", item, "0")
    settings = DataConfig(context_length=32, shards=3, **data)  # type: ignore[arg-type]
    return stage, calibrate.run(stage, corpus, settings, ModelConfig(source=str(model)), apart or [], True)


def test_rows_hold_the_documents_in_order_and_any_number_of_workers_gives_the_same(tiny: Path, tmp_path: Path) -> None:
    corpus = CorpusConfig(source=str(tiny / "text.jsonl"), tokens=8192)
    one, facts = _run(tmp_path, "one", corpus, tiny / "model", tokenizer_workers=1)
    two, _ = _run(tmp_path, "two", corpus, tiny / "model", tokenizer_workers=2)
    a, b = (PackedRows(stage.path()) for stage in (one, two))
    assert len(a) == 256 == facts["rows"]
    assert np.array_equal(a.take(0, 256), b.take(0, 256))
    tokenizer = load_tokenizer(ModelConfig(source=str(tiny / "model")))
    first = json.loads((tiny / "text.jsonl").open().readline())["text"]
    ids = [*tokenizer(first)["input_ids"], tokenizer.eos_token_id]
    assert a.take(0, 8).reshape(-1)[: len(ids)].tolist() == ids
    assert facts["tokens"] == 8192
    assert facts["dropped_tail_tokens"] < 3 * 32
    assert facts["tokens_per_second"] > 0


def test_a_shuffled_view_holds_the_same_rows(tiny: Path, tmp_path: Path) -> None:
    stage, _ = _run(tmp_path, "x", CorpusConfig(source=str(tiny / "text.jsonl"), tokens=4096), tiny / "model")
    plain, mixed = PackedRows(stage.path()), PackedRows(stage.path(), shuffle=3)
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
    texts = [set(json.loads((s.path() / calibrate.TEXTS).read_text())) for s in (evaluation, calibration)]
    assert not texts[0] & texts[1]
    assert facts["shared_documents_dropped"] > 0


def test_shares_split_one_source(tiny: Path, tmp_path: Path) -> None:
    source = str(tiny / "text.jsonl")
    low, _ = _run(tmp_path, "low", CorpusConfig(source=source, share=(0, 50), tokens=2048), tiny / "model")
    high, _ = _run(tmp_path, "high", CorpusConfig(source=source, share=(50, 100), tokens=2048), tiny / "model")
    texts = [set(json.loads((s.path() / calibrate.TEXTS).read_text())) for s in (low, high)]
    assert texts[0]
    assert texts[1]
    assert not texts[0] & texts[1]


def test_a_corpus_that_is_too_small_says_how_much_it_has(tiny: Path, tmp_path: Path) -> None:
    corpus = CorpusConfig(source=str(tiny / "text.jsonl"), tokens=10**7)
    with pytest.raises(UserError, match=r"text.jsonl has \d+ tokens .* fewer than the 10000000 asked for"):
        _run(tmp_path, "x", corpus, tiny / "model")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(UserError, match=r"empty.jsonl has 0 tokens"):
        _run(tmp_path, "y", CorpusConfig(source=str(empty), tokens=10), tiny / "model")
    assert StageDir(str(tmp_path), "calibrate", "x", "0").manifest() is None


def test_records_without_text_are_left_out_and_counted(tiny: Path, tmp_path: Path) -> None:
    lines = (tiny / "text.jsonl").read_text().splitlines()[:60]
    bad = ['{"text": null}', '{"title": "no body"}', '{"text": ""}']
    (tmp_path / "whole.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "gaps.jsonl").write_text("\n".join(lines[:20] + bad + lines[20:] + bad) + "\n")
    found = {
        name: _run(tmp_path, name, CorpusConfig(source=str(tmp_path / f"{name}.jsonl"), tokens=1024), tiny / "model")
        for name in ("whole", "gaps")
    }
    assert found["whole"][1]["records_without_text"] == 0
    assert 0 < found["gaps"][1]["records_without_text"] <= 6
    texts = {name: json.loads((stage.path() / calibrate.TEXTS).read_text()) for name, (stage, _) in found.items()}
    assert set(texts["gaps"]) <= set(lines_of(lines))


def lines_of(lines: list[str]) -> list[str]:
    return [json.loads(line)["text"] for line in lines]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"text": ["a", "b"]}'], r"text_field: a record's text holds a list, not text"),
        (['{"text": 5}'], r"text_field: a record's text holds 5, not text"),
        (['{"body": "a"}'], r"text_field: no field text; the records have body"),
        (['{"text": "caf\udce9"}'], r"source: cannot be read: .*utf-8"),
    ],
)
def test_what_a_user_has_to_mend_comes_out_of_ray_data_in_one_line(
    tiny: Path, tmp_path: Path, lines: list[str], message: str
) -> None:
    (tmp_path / "bad.jsonl").write_text("\n".join(lines) + "\n", errors="surrogateescape")
    with pytest.raises(UserError, match=message) as caught:
        _run(tmp_path, "bad", CorpusConfig(source=str(tmp_path / "bad.jsonl"), tokens=64), tiny / "model")
    assert "\n" not in str(caught.value)


def test_text_files_split_at_blank_lines(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(sentences(i, 6) for i in range(40)))
    _, facts = _run(tmp_path, "txt", CorpusConfig(source=str(tmp_path / "*.txt"), tokens=512), tiny / "model")
    assert facts["documents"] > 5
    assert facts["source"] == "a.txt"
