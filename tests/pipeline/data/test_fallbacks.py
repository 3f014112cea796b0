"""A text that is not there is never measured under its name."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import CorpusConfig, DataConfig, RunConfig, recipe
from pipeline.data import fallbacks
from pipeline.errors import UserError
from pipeline.execution.plan import make_plan
from pipeline.stages.calibrate import Calibrate
from pipeline.stages.evaluate import TextPerplexity

GONE = CorpusConfig(source="/no/such.jsonl", fallback="embedded", text_field="page", tokens=1000)


def config_of(**evaluation: CorpusConfig) -> RunConfig:
    return RunConfig(name="x", data=DataConfig(evaluation=evaluation))


def test_texts_that_do_not_exist_become_one_of_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LEAP_DATA", raising=False)
    asked = recipe.load("smollm2")
    assert list(asked.data.evaluation) == ["wikitext2", "c4"]
    config, notes = fallbacks.resolve(asked)
    assert list(config.data.evaluation) == ["embedded"]
    embedded = config.data.evaluation["embedded"]
    assert (embedded.source, embedded.text_field, embedded.tokens) == ("embedded", "text", 16384)
    assert embedded.share == (92, 100), "what nano was not trained on"
    assert [note.split(".source")[0] for note in notes] == [
        "data.calibration",
        "data.heldout",
        "data.evaluation.wikitext2",
        "data.evaluation.c4",
    ]
    assert fallbacks.resolve(config) == (config, [])


def test_the_plan_its_records_and_its_measurements_name_what_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LEAP_DATA", raising=False)
    changes = ["model.source=nano", "data.context_length=256", "evaluate.tasks=[]", "evaluate.documents_of={}"]
    plan = make_plan(recipe.load("smollm2", changes))
    assert [text.role for text in plan.of(Calibrate)] == ["embedded", "heldout", "calibration"]
    assert {cell.subject for cell in plan.of(TextPerplexity)} == {"embedded"}
    assert len(plan.notes) == 4
    assert list(plan.config.data.evaluation) == ["embedded"]
    assert {text.corpus.source for text in plan.of(Calibrate)} == {"embedded"}


def test_texts_that_exist_stay_and_keep_their_order(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\n')
    there = CorpusConfig(source=str(file), fallback="embedded")
    config, notes = fallbacks.resolve(config_of(first=GONE, second=there, third=GONE))
    assert list(config.data.evaluation) == ["embedded", "second"]
    assert config.data.evaluation["second"] == there
    assert len(notes) == 2
    assert fallbacks.resolve(config_of(second=there)) == (config_of(second=there), [])


def test_the_embedded_text_is_not_measured_twice() -> None:
    docs = CorpusConfig(share=(92, 100))
    config, notes = fallbacks.resolve(config_of(docs=docs, c4=GONE))
    assert config.data.evaluation == {"docs": docs}
    assert "docs, the embedded text" in notes[0]


def test_its_name_is_its_own(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    other = CorpusConfig(source=str(tmp_path / "a.txt"))
    with pytest.raises(UserError, match=r"data\.evaluation\.embedded: choose another name"):
        fallbacks.resolve(config_of(embedded=other, c4=GONE))


def test_a_source_without_a_fallback_is_left_to_the_checks() -> None:
    gone = GONE.model_copy(update={"fallback": None})
    assert fallbacks.resolve(config_of(c4=gone)) == (config_of(c4=gone), [])
