import math
import statistics

import pytest

from pipeline.evaluation.paired import gap_closed, mean_difference, paired_accuracy, paired_nll
from pipeline.evaluation.perplexity import Perplexity, perplexity_of
from pipeline.evaluation.scores import Document, ZeroShot, zero_shot_of
from pipeline.evaluation.statistics import mean_and_stderr


def measured(scores: dict[tuple[str, int], float]) -> ZeroShot:
    documents = [Document(task=task, doc=doc, scores={"acc": score}) for (task, doc), score in scores.items()]
    return zero_shot_of("t", documents, truncated=0, chance=0.25)


def rows(*nlls: float, tokens: int = 30) -> Perplexity:
    return Perplexity(perplexity=1.0, nll=0.0, nll_stderr=None, tokens=tokens, nll_per_row=list(nlls))


def test_mean_and_stderr_of_one_stratum():
    mean, stderr = mean_and_stderr([[1.0, 2.0, 6.0]])
    assert mean == 3
    assert stderr == pytest.approx(math.sqrt((4 + 1 + 9) / 2 / 3))
    assert mean_and_stderr([[5.0]]) == (5.0, None)


def test_strata_of_unequal_size_and_mean():
    # Variances 0 and 2 around very different means: only the spread within the strata counts.
    mean, stderr = mean_and_stderr([[0.0, 0.0, 0.0], [10.0, 12.0]])
    assert mean == pytest.approx(22 / 5)
    assert stderr == pytest.approx(math.sqrt(2 * 2) / 5)


def test_a_stratum_of_one_value_makes_it_one_sample():
    assert mean_and_stderr([[0.0], [1.0, 0.0]]) == mean_and_stderr([[0.0, 1.0, 0.0]])


def test_paired_nll():
    result = paired_nll(rows(2.0, 3.0, 4.0), rows(2.5, 3.5, 5.0))
    assert result["difference"] == pytest.approx(2 / 3)
    assert result["stderr"] == pytest.approx(math.sqrt(((1 / 6) ** 2 * 2 + (1 / 3) ** 2) / 2 / 3))
    assert result["pairs"] == 3


@pytest.mark.parametrize("other", [rows(1.0, 2.0), rows(1.0, 2.0, 3.0, tokens=60)])
def test_other_rows_cannot_be_paired(other):
    with pytest.raises(ValueError, match="cannot pair 3 rows"):
        paired_nll(rows(1.0, 2.0, 3.0), other)


def test_paired_accuracy_matches_documents_in_any_order():
    base = measured({("a", 0): 1, ("a", 5): 0, ("b", 0): 1, ("b", 1): 1})
    variant = measured({("b", 1): 0, ("b", 0): 1, ("a", 5): 0, ("a", 0): 1})
    result = paired_accuracy(base, variant)
    assert result == {"difference": -0.25, "stderr": pytest.approx(math.sqrt(2 * 0.5) / 4), "pairs": 4}


def test_pairing_is_an_error_for_other_documents_or_a_metric_not_measured():
    base = measured({("a", 0): 1, ("a", 1): 0})
    with pytest.raises(ValueError, match="2 and 2 documents, 1 in common"):
        paired_accuracy(base, measured({("a", 0): 1, ("a", 2): 0}))
    with pytest.raises(ValueError, match="not measured by 'acc_norm', only by acc"):
        paired_accuracy(base, base, metric="acc_norm")


def test_the_share_of_a_gap_and_its_error():
    nll = {"dense": [1.0, 1.4, 0.9, 1.1], "base": [2.1, 2.2, 1.7, 2.0], "variant": [1.5, 1.9, 1.2, 1.6]}
    measured = {name: perplexity_of(rows, tokens=40) for name, rows in nll.items()}
    found = gap_closed(measured["dense"], measured["base"], measured["variant"])
    ppl = {name: math.exp(sum(values) / 4) for name, values in nll.items()}
    share = (ppl["base"] - ppl["variant"]) / (ppl["base"] - ppl["dense"])
    assert found["share"] == pytest.approx(share)

    def share_with(row, step):
        """The share when row ``row`` weighs more than the others by ``step``."""
        weights = [1.0] * 4
        weights[row] += step
        means = {
            n: math.exp(sum(w * x for w, x in zip(weights, v, strict=True)) / sum(weights)) for n, v in nll.items()
        }
        return (means["base"] - means["variant"]) / (means["base"] - means["dense"])

    # Infinitesimal jackknife: the derivative by a row's weight is a quarter of the row's deviation from the mean.
    slopes = [(share_with(row, 1e-5) - share_with(row, -1e-5)) / 2e-5 for row in range(4)]
    assert found["stderr"] == pytest.approx(math.sqrt(sum((4 * d) ** 2 for d in slopes) / 3 / 4), rel=1e-4)
    means = {name: sum(values) / 4 for name, values in nll.items()}
    share_nats = (means["base"] - means["variant"]) / (means["base"] - means["dense"])
    assert found["share_nats"] == pytest.approx(share_nats)
    moved = [
        (b * (1 - share_nats) - v + d * share_nats) / (means["base"] - means["dense"])
        for b, v, d in zip(nll["base"], nll["variant"], nll["dense"], strict=True)
    ]
    assert found["stderr_nats"] == pytest.approx(statistics.stdev(moved) / 2)
    # A variant as good as the dense model closes all of it, with certainty; one that is the base itself nothing.
    assert gap_closed(measured["dense"], measured["base"], measured["dense"]) == pytest.approx(
        {"share": 1, "stderr": 0, "share_nats": 1, "stderr_nats": 0}
    )
    assert gap_closed(measured["dense"], measured["base"], measured["base"]) == pytest.approx(
        {"share": 0, "stderr": 0, "share_nats": 0, "stderr_nats": 0}
    )
    assert gap_closed(measured["base"], measured["dense"], measured["variant"]) is None


def test_the_mean_of_differences_has_independent_errors():
    differences = [
        {"difference": 0.1, "stderr": 0.03, "pairs": 100},
        {"difference": -0.02, "stderr": 0.04, "pairs": 50},
    ]
    assert mean_difference(differences) == pytest.approx({"difference": 0.04, "stderr": 0.025, "pairs": 150})
    assert mean_difference([*differences, {"difference": 0.1, "stderr": None, "pairs": 1}])["stderr"] is None
