"""What a search makes of its trials: records, the best, the front, importances, the winner's recipe, the verdict."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from searches import searched, trial

from pipeline.config import recipe
from pipeline.evaluation.statistics import mean_and_stderr
from pipeline.tuning import confirm, outcome, space, winner
from pipeline.tuning.charts import make_figures
from pipeline.tuning.confirm import Comparison
from pipeline.tuning.domains import Choice, Domain, Span
from pipeline.tuning.report import Summary, print_summary, render
from pipeline.tuning.search import Cost, Options, make_search
from pipeline.tuning.trial_records import Record, Records

DOMAINS: dict[str, Domain] = {"learning_rate": Span(0.001, 0.1, log=True), "family.noise": Choice((True, False))}


def test_records_outlive_the_process_and_a_repeated_report_counts_once(tmp_path: Path) -> None:
    records = Records(tmp_path / "trials.json")
    first = records.open(1, "a", {"noise": True})
    for step, loss in ((0, 4.0), (5, 3.0)):
        first.report(step, loss)
    first.status = "finished"
    second = records.open(2, "b", {"noise": False})
    second.report(0, 5.0)
    records.save()
    again = Records(tmp_path / "trials.json")
    assert list(again) == list(records)
    continued = again.open(2, "b", {"noise": False})
    for step, loss in ((0, 5.0), (5, 4.5)):
        continued.report(step, loss)
    assert (continued.number, continued.steps, continued.losses) == (2, [0, 5], [5.0, 4.5])
    assert continued.perplexity == pytest.approx(math.exp(4.5))
    # A trial that Tune does not remember was begun by another name: it starts over.
    assert again.open(2, "c", {"noise": True}).steps == []
    assert [(t.number, t.id) for t in again] == [(1, "a"), (2, "c")]


def test_the_best_trial_was_trained_to_its_end() -> None:
    stopped = trial(1, 0.5)
    stopped.status = "stopped"
    broken = trial(2, math.nan)
    assert [t.number for t in outcome.finished([stopped, broken, trial(3, 2.0), trial(4, 1.0)])] == [4, 3]


COSTS = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9)), min_size=1, max_size=12)


@given(COSTS, st.sampled_from(["tokens", "sparsity"]))
def test_the_front_is_what_no_other_trial_beats(costs: list[tuple[int, int]], against: Cost) -> None:
    trials = [trial(i, loss / 2, tokens=cost, sparsity=1 - cost / 10) for i, (loss, cost) in enumerate(costs)]
    best = outcome.front(trials, against)

    def beats(a: Record, b: Record) -> bool:
        pairs = ((a.loss, b.loss), (a.tokens, b.tokens))
        return all(x <= y for x, y in pairs) and any(x < y for x, y in pairs)  # type: ignore[operator]

    unbeaten = {(t.loss, t.tokens) for t in trials if not any(beats(other, t) for other in trials)}
    assert {(t.loss, t.tokens) for t in best} == unbeaten
    assert len(best) == len(unbeaten)


def test_importance_finds_the_field_that_decides() -> None:
    rates = [0.001 * 10 ** (2 * (i * 0.618 % 1)) for i in range(24)]
    trials = [
        trial(i, math.log(rate) ** 2, learning_rate=rate, **{"family.noise": i % 3 == 0})
        for i, rate in enumerate(rates)
    ]
    trials[3].steps, trials[3].losses = trials[3].steps[:2], trials[3].losses[:2]
    trials[3].status = "stopped"
    assert outcome.common_step(trials) == 3
    found = outcome.importance(trials, DOMAINS)
    assert next(iter(found)) == "learning_rate"
    assert found["learning_rate"] > 0.8
    assert sum(found.values()) == pytest.approx(1)
    assert outcome.importance(trials[:4], DOMAINS) == {}
    failed = Record(99, "t99", dict(trials[0].values), "failed")
    assert outcome.importance([*trials, failed], DOMAINS) == found


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["sparsities=[0.6]", "learn.leap.settings.steps=40", "data.heldout.tokens=4096"],
        ["evaluate.cloze=null", "learn.leap=null", "learn.mine.workers=2"],
        ["data.calibration={source: a.jsonl}"],
    ],
)
def test_a_winner_is_a_recipe_that_reads_back_as_what_was_searched(tmp_path: Path, overrides: list[str]) -> None:
    config = recipe.load("nano", overrides)
    (learn,) = config.learn
    values = {"family.temperature.end": 0.0123456789, "prior": "admm", "family.noise": True}
    winner.write(tmp_path / "winner.yaml", "nano", config, learn, values, "a test")
    read = recipe.load(str(tmp_path / "winner.yaml"))
    assert read.learn[learn] == space.place(config, learn, values)
    assert read.name == "nano-winner"
    left = {"name", "base", "why", "learn"}
    assert read.model_dump(exclude=left) == config.model_dump(exclude=left)
    text = yaml.safe_load((tmp_path / "winner.yaml").read_text())
    assert text["base"] == "nano"
    assert "model" not in text  # what is inherited is not repeated


def test_a_winner_of_what_inheritance_cannot_say_is_written_whole(tmp_path: Path) -> None:
    config = recipe.load("smollm2", ["evaluate.documents_of={}"])
    winner.write(tmp_path / "winner.yaml", "smollm2", config, "leap", {"family.noise": True}, "a test")
    read = recipe.load(str(tmp_path / "winner.yaml"))
    assert read.evaluate == config.evaluate
    assert read.learn["leap"].settings.family.noise


def test_the_gain_is_held_against_its_spread_over_seeds() -> None:
    sure = Comparison("published", "docs", {"winner": [2.0, 2.1, 2.2], "published": [2.51, 2.60, 2.69]})
    mean, error = mean_and_stderr([sure.gains])
    assert error is not None
    assert sure.gain == pytest.approx(mean)
    assert sure.spread == pytest.approx(4.303 * error, rel=1e-3)  # two degrees of freedom
    assert sure.larger
    assert "is larger than the spread over 3 seeds" in sure.sentence()
    luck = Comparison("recipe", "docs", {"winner": [2.0, 2.1, 2.2], "recipe": [2.5, 2.1, 2.3]})
    assert luck.gain > 0
    assert not luck.larger
    assert "is not larger than" in luck.sentence()


def test_a_seed_of_a_confirmation_changes_order_prior_start_and_noise() -> None:
    config = recipe.load("nano")
    contenders = {"winner": {"family.noise": True}, "published": {"family.noise": True, "learning_rate": 0.001}}
    made = confirm.confirm_config(config, "leap", 0.6, contenders, seed=2)
    assert made.seed == 2
    assert made.sparsities == [0.6]
    assert [entry.settings.seed for entry in made.learn.values()] == [2, 2]
    assert made.learn["published"].settings.learning_rate == 0.001
    assert made.learn["winner"].settings.learning_rate == config.learn["leap"].settings.learning_rate
    assert made.data == config.data
    assert (made.prior.methods, made.evaluate.tasks, made.evaluate.cloze) == ([], [], None)


@pytest.mark.parametrize("against", [None, "tokens"])
def test_the_page_shows_every_section_and_needs_no_network(against: Cost | None, tmp_path: Path) -> None:
    summary, figures = searched(against, tmp_path)
    assert set(figures) == {"best-so-far", "curves", "parallel", "importance"} | ({"front"} if against else set())
    page = render(summary, figures)
    assert page.count("<svg ") == len(figures)
    for title in ("What was found", "Which fields matter", "Trials", "Provenance"):
        assert f"<h2>{title}</h2>" in page
    assert "the loss is &lt;nan&gt; at step 3" in page
    assert "12 trials: 10 finished, 1 stopped early, 1 failed." in page
    assert not re.search(r'(src|href)="(https?:)?//', page)
    console = Console(width=200, record=True, file=io.StringIO())
    print_summary(summary, console)
    text = console.export_text()
    assert f"{summary.winners[0].loss:.4f}" in text
    assert "is larger than the spread over 3 seeds" in text


def test_a_search_without_a_finished_trial_says_so(tmp_path: Path) -> None:
    config = recipe.load("nano")
    found = space.load("noise", config, "leap")
    wanted = make_search(config, "leap", found, Options())
    failed = Record(1, "a", dict(found.published), "failed", error="no")
    summary = Summary(config, "leap", 0.6, found, wanted, [failed], {}, [], [])
    assert make_figures([failed], wanted.domains, {}, None) == {}
    assert "No trial finished." in render(summary, {})
