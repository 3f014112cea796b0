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


def test_text_files_split_at_blank_lines(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(sentences(i, 6) for i in range(40)))
    _, facts = _run(tmp_path, "txt", CorpusConfig(source=str(tmp_path / "*.txt"), tokens=512), tiny / "model")
    assert facts["documents"] > 5
    assert facts["source"] == "a.txt"
