"""The rows of the table from what was measured: differences, means over seeds, tasks above chance."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import stdev
from typing import Any, cast

import pytest

from pipeline.config.recipe import load
from pipeline.evaluation.perplexity import perplexity_of
from pipeline.evaluation.scores import Document, ZeroShot, zero_shot_of
from pipeline.execution.plan import make_plan
from pipeline.reporting.summary import is_learned
from pipeline.results.measurements import Measured
from pipeline.results.recording import variant_metrics
from pipeline.results.table import Finding, Table, make_table
from pipeline.stages.harden import Exported
from pipeline.stages.variant import Variant


def scored(scores: list[int]) -> ZeroShot:
    documents = [Document(task="t", doc=doc, scores={"acc": float(score)}) for doc, score in enumerate(scores)]
    return zero_shot_of("t", documents, truncated=0, chance=0.25)


def model(nll: list[float], easy: list[int], guessed: list[int]) -> Measured:
    return Measured({"text": perplexity_of(nll, tokens=30)}, {"easy": scored(easy), "guessed": scored(guessed)})


FOUND = {
    "dense": model([1.0, 1.2, 1.1], [1, 1, 1, 1, 1, 1, 1, 0], [1, 0, 0, 0, 1, 0, 0, 0]),
    "wanda@0.5": model([2.0, 2.1, 2.2], [1, 0, 1, 0, 1, 0, 1, 0], [0, 0, 0, 1, 1, 0, 0, 0]),
    "admm@0.5": model([2.2, 2.3, 2.0], [1, 1, 1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]),
    "leap.seed0@0.5": model([1.5, 1.6, 1.7], [1, 1, 1, 0, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0, 1, 0]),
    "leap.seed4@0.5": model([1.6, 1.6, 1.5], [1, 1, 1, 1, 1, 0, 0, 0], [0, 0, 1, 0, 0, 0, 1, 0]),
}


def variants(*overrides: str) -> list[Variant]:
    """Those of a recipe, by name and seed; nothing is run."""
    return make_plan(load("nano", ["sparsities=[0.5]", "prior.methods=[wanda, admm]", *overrides])).variants


def finding(variant: Variant, **facts: Any) -> Finding:
    """What a run would find; of a name that FOUND lacks, what it has of a learned one."""
    exported = Exported(Path("nowhere"), 0.5, False, {}) if variant.export else None
    measured = FOUND.get(variant.name, FOUND["leap.seed0@0.5"])
    return Finding(variant, measured, exported, seconds=10.0 + (variant.seed or 0), **facts)


def table(*overrides: str) -> Table:
    return make_table([finding(variant) for variant in variants(*overrides)], 0.5, "float32")


@pytest.fixture(scope="module")
def made() -> tuple[dict[str, dict[str, Any]], dict[str, float], list[str]]:
    found = table("learn.leap.seeds=[0, 4]")
    return {row.name: cast("dict[str, Any]", row.as_json()) for row in found.rows}, found.chance, found.clear


def test_variants_of_several_seeds_stand_behind_their_mean(made: Any) -> None:
    rows, _, _ = made
    assert list(rows) == ["dense", "wanda@0.5", "admm@0.5", "leap@0.5", "leap.seed0@0.5", "leap.seed4@0.5"]
    mean = rows["leap@0.5"]
    assert (mean["seeds"], mean["seconds"]) == ([0, 4], 12.0)
    assert [row.get("mean") for row in rows.values()] == [None] * 4 + ["leap@0.5"] * 2
    first, second = (rows[name]["perplexity"]["text"]["perplexity"] for name in ("leap.seed0@0.5", "leap.seed4@0.5"))
    assert mean["perplexity"]["text"]["perplexity"] == pytest.approx(math.sqrt(first * second))
    assert mean["spread"]["nll"]["text"] == pytest.approx(stdev([math.log(first), math.log(second)]))
    assert mean["tasks"]["easy"]["acc"] == pytest.approx(5 / 8)
    assert mean["spread"]["tasks"] == {"easy": 0.0, "guessed": 0.0}


def test_learned_variants_are_compared_with_the_best_layer_wise_one_and_with_admm(made: Any) -> None:
    rows, _, _ = made
    assert [row.get("rival") for row in rows.values()] == [None] * 3 + ["wanda@0.5"] * 3
    assert list(rows["leap@0.5"]["against"]) == ["wanda@0.5", "admm@0.5", "dense"]
    assert list(rows["admm@0.5"]["against"]) == ["dense"]
    assert "against" not in rows["dense"]


def test_differences_are_paired(made: Any) -> None:
    rows, _, _ = made
    against = rows["leap.seed0@0.5"]["against"]["wanda@0.5"]
    assert against["nll"]["text"]["difference"] == pytest.approx(-0.5)
    assert against["nll"]["text"]["stderr"] == pytest.approx(0, abs=1e-12)
    dense, base, variant = (math.exp(x) for x in (1.1, 2.1, 1.6))
    assert against["nll"]["text"]["gap_closed"] == pytest.approx((base - variant) / (base - dense))
    nats = [math.log(ppl) for ppl in (base, variant, dense)]
    assert against["nll"]["text"]["gap_closed_nats"] == pytest.approx((nats[0] - nats[1]) / (nats[0] - nats[2]))
    differences = [0, 1, 0, 0, 0, 1, -1, 0]
    assert against["tasks"]["easy"]["difference"] == pytest.approx(1 / 8)
    assert against["tasks"]["easy"]["stderr"] == pytest.approx(stdev(differences) / math.sqrt(8))
    errors = [against["tasks"][task]["stderr"] for task in ("easy", "guessed")]
    assert against["mean_accuracy"]["stderr"] == pytest.approx(math.hypot(*errors) / 2)
    assert "gap_closed" not in rows["leap@0.5"]["against"]["dense"]["nll"]["text"]


def test_tasks_count_as_above_chance_by_the_dense_model_alone(made: Any) -> None:
    rows, chance, clear = made
    assert chance == {"easy": 0.25, "guessed": 0.25}
    assert clear == ["easy"]
    for row in rows.values():
        assert row["mean_above_chance"]["acc"] == row["tasks"]["easy"]["acc"]
    against = rows["leap@0.5"]["against"]["admm@0.5"]
    assert against["mean_above_chance"] == against["tasks"]["easy"]


def test_the_tracker_gets_them(made: Any) -> None:
    rows, _, _ = made
    methods = {"dense": "dense", "wanda@0.5": "wanda", "admm@0.5": "admm"}
    row = next(row for row in table("learn.leap.seeds=[0, 4]").rows if row.name == "leap@0.5")
    metrics = variant_metrics(row, methods)
    against = rows["leap@0.5"]["against"]["wanda@0.5"]
    assert metrics["against.wanda.nll.text"] == against["nll"]["text"]["difference"]
    assert metrics["against.wanda.gap_closed.text"] == against["nll"]["text"]["gap_closed"]
    assert metrics["against.wanda.gap_closed_nats.text"] == against["nll"]["text"]["gap_closed_nats"]
    assert metrics["against.admm.acc.mean_stderr"] == rows["leap@0.5"]["against"]["admm@0.5"]["mean_accuracy"]["stderr"]
    assert metrics["seeds_stdev.nll.text"] == rows["leap@0.5"]["spread"]["nll"]["text"]
    assert metrics["acc.mean_above_chance"] == 5 / 8


def test_a_row_says_how_it_came_about_whatever_it_is_called() -> None:
    """Names that read like something else: an entry called admm-like."""
    rows = table("learn.admm-like={}", "learn.leap=null", "reconstruct=[admm-like]").rows
    assert [row.origin for row in rows] == ["dense", "layer-wise", "layer-wise", "learned", "fitted"]
    assert [row.rival for row in rows] == [None] * 3 + ["wanda@0.5"] * 2
    assert [is_learned(row.as_json()) for row in rows] == [False] * 3 + [True] * 2
    assert list(rows[3].against or ()) == ["wanda@0.5", "admm@0.5", "dense"]


def test_the_dense_row_gets_the_median_speed_and_the_models_own_dtype_counts() -> None:
    def speed(dense: float, sparse: float) -> Any:
        each = {"dense": {"tokens_per_second": dense}, "sparse": {"tokens_per_second": sparse}}
        return {"decode": {"bfloat16": {"dense": {}, "sparse": {}}, "float32": each}}

    several = variants("sparsities=[0.5, 0.6, 0.7]", "prior.methods=[wanda]", "learn.leap.seeds=[0, 4]")
    speeds = {"leap.seed0@0.5": speed(10, 15), "leap.seed0@0.6": speed(12, 18), "leap.seed0@0.7": speed(11, 20)}
    rows = make_table([finding(variant, speed=speeds.get(variant.name)) for variant in several], 1, "float32").rows
    by_name = {row.name: row.decode_tokens_per_second for row in rows}
    measured = {name: tokens for name, tokens in by_name.items() if tokens is not None}
    assert measured == {"dense": 11, "leap@0.5": 15, "leap@0.6": 18, "leap@0.7": 20}, "a mean stands for its seeds"
    assert table().rows[0].decode_tokens_per_second is None


def test_json_leaves_out_what_a_row_does_not_have(made: Any) -> None:
    rows, _, _ = made
    assert rows["dense"]["target_sparsity"] is None
    assert rows["wanda@0.5"]["rival"] is None
    assert not {"rival", "against", "seed", "seeds", "mean", "speed", "seconds"} - {"seconds"} & set(rows["dense"])
    assert rows["leap@0.5"]["block_sparsity"] == 0.25


def test_the_mean_over_seeds_has_the_origin_of_its_members(made: Any) -> None:
    rows, _, _ = made
    assert rows["leap@0.5"]["origin"] == "learned"
