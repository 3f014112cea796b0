"""Texts and tasks fetched from the hub: recipes and lm-eval read them, hashes hold, differences are named.

The hub is a stand-in that gives a few records of each data set in the fields that the real one has.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import ROOT

from pipeline.config import CorpusConfig, recipe
from pipeline.data import corpora, fetch, hub
from pipeline.evaluation.tasks import resolve_task

DATA = ROOT.parent / "shared" / "data"
CHOICES = {"text": ["red", "blue", "green", "grey"], "label": ["A", "B", "C", "D"]}


def _document(number: int) -> dict[str, Any]:
    word = "".join(chr(ord("a") + int(digit)) for digit in str(number))  # a document's split depends on its letters
    return {"title": f"Page-{number}", "text": f"Document {word} says: " + f"{word} " * 90, "url": "…"}


RECORDS: dict[str, list[dict[str, Any]]] = {
    "EleutherAI/wikitext_document_level": [{"page": f" = Page @-@ {n} = \n \n It is short ." * 9} for n in range(3)],
    "allenai/c4": [{"text": "stub"}, *({"text": _document(n)["text"]} for n in range(100, 140))],
    "wikimedia/wikipedia": [_document(n) for n in range(200)],
    "baber/piqa": [{"goal": f"Boil {n} eggs", "sol1": "water", "sol2": "ice", "label": n % 2} for n in range(5)],
    "allenai/ai2_arc": [{"question": f"Sky {n}?", "choices": CHOICES, "answerKey": "B"} for n in range(5)],
    "allenai/winogrande": [
        {"sentence": f"{n} beat _ .", "option1": "Ann", "option2": "Bob", "answer": "2"} for n in range(5)
    ],
    "allenai/openbookqa": [{"question_stem": f"Grass {n} is", "choices": CHOICES, "answerKey": "C"} for n in range(5)],
    "cais/mmlu": [
        {"question": f"Which {n}?", "subject": "x", "choices": CHOICES["text"], "answer": 1} for n in range(5)
    ],
}


@pytest.fixture(autouse=True)
def requests(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """The hub's stand-in; how often each repository was read."""
    count: Counter[str] = Counter()

    real = datasets.load_dataset

    def load_dataset(path: str, name: str | None = None, **options: Any) -> Any:
        if path == "json":  # lm-eval, on the files that were fetched
            return real(path, name, **options)
        assert options["revision"] == "a" * 40
        assert options["streaming"]
        count[path] += 1
        return datasets.Dataset.from_list(RECORDS[path]).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(hub, "answers", lambda: True)
    monkeypatch.setattr(hub, "commit", lambda *_: "a" * 40)
    monkeypatch.setattr(fetch, "MMLU", "mmlu/default/mmlu_a*y.yaml")  # two of the subjects
    monkeypatch.setattr(fetch, "CHARACTERS", dict.fromkeys(fetch.CHARACTERS, 2000))
    return count


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_recipes_find_their_texts_and_tasks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fetch.fetch(tmp_path)
    monkeypatch.setenv("LEAP_DATA", str(tmp_path))
    config = recipe.load("smollm2")
    texts: list[CorpusConfig] = [config.data.calibration, config.data.heldout, *config.data.evaluation.values()]
    for text in texts:
        for file in corpora.expand(text) or pytest.fail(f"{text.source} is not read from files"):
            assert all(line[text.text_field] for line in _lines(Path(file)))
    for name in config.evaluate.tasks:
        tasks = resolve_task(tmp_path / "eval" / "yaml" / name).load()
        assert [len(list(task.eval_docs)) for task in tasks.values()] == [5] * len(tasks)
        assert len(tasks) == (2 if name == "mmlu_local" else 1)


def test_held_out_texts_share_nothing_with_those_learned_from(tmp_path: Path) -> None:
    fetch.fetch(tmp_path)
    learned, held_out = (
        {line["text"] for line in _lines(tmp_path / "text" / f"wikipedia_{name}.jsonl")}
        for name in ("train", "heldout")
    )
    assert learned
    assert held_out
    assert not learned & held_out
    titles = {line["title"] for line in _lines(tmp_path / "text" / "wikipedia_train.jsonl")}
    assert not titles & {"Page-0", "Page-1", "Page-2"}  # WikiText-2 has these pages, as "Page @-@ 0"
    c4 = [line["text"] for line in _lines(tmp_path / "text" / "c4_train.jsonl")]
    assert "stub" not in c4
    assert 2000 <= sum(map(len, c4)) < 2000 + max(map(len, c4))


def test_a_second_call_fetches_what_is_missing_or_damaged_alone(tmp_path: Path, requests: Counter[str]) -> None:
    fetch.fetch(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.jsonl")}
    requests.clear()
    fetch.fetch(tmp_path)
    assert not requests
    (tmp_path / "eval" / "piqa" / "validation.jsonl").write_text("{}\n")
    (tmp_path / "text" / "c4_heldout.jsonl").unlink()
    fetch.fetch(tmp_path)
    assert requests == {"baber/piqa": 1, "allenai/c4": 1}
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.jsonl")} == before


def test_rows_that_differ_from_the_tables_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert fetch.fetch(tmp_path) == list(fetch.OF_THE_TABLES)
    goals = fetch.hash_of_rows(
        _lines(tmp_path / "eval" / "piqa" / "validation.jsonl"), ("goal", "sol1", "sol2", "label")
    )
    monkeypatch.setitem(fetch.OF_THE_TABLES, "piqa", goals)
    assert "piqa" not in fetch.fetch(tmp_path)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"the texts and tasks of the tables are not in {DATA}")
def test_the_tables_rows_are_recognised() -> None:
    rows = _lines(DATA / "text" / "wikitext2_test_pages.jsonl")
    assert fetch.hash_of_rows(rows, ("page",)) == fetch.OF_THE_TABLES["wikitext2"]
    for name, (_, fields) in fetch.TASKS.items():
        (file,) = (DATA / "eval" / name).glob("*.jsonl")
        assert fetch.hash_of_rows(_lines(file), fields) == fetch.OF_THE_TABLES[name]


def test_without_the_hub_it_ends_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hub, "answers", lambda: False)
    assert fetch.main([str(tmp_path / "new")]) == 2
    assert capsys.readouterr().err == (
        "error: the Hugging Face hub cannot be reached; check the network, or set HF_ENDPOINT to a mirror\n"
    )
    assert not (tmp_path / "new").exists()


def test_what_the_hub_does_not_give_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(RECORDS, "allenai/c4", [{"text": "stub"}])
    with pytest.raises(fetch.UserError, match="allenai/c4 en train on the hub gave no documents"):
        fetch.fetch(tmp_path)
