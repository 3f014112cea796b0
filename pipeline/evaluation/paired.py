"""Differences between two variants measured on the same rows or documents.

Two variants fail on mostly the same documents, so the standard error of their difference is far smaller than the two
separate standard errors suggest.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, TypedDict

from pipeline.evaluation.perplexity import Perplexity
from pipeline.evaluation.statistics import mean_and_stderr

if TYPE_CHECKING:
    from pipeline.evaluation.zero_shot import ZeroShot  # imports lm-eval, which takes seconds


class PairedDifference(TypedDict):
    """``variant`` minus ``base``."""

    difference: float
    stderr: float | None
    """None for a single pair."""
    pairs: int


def paired_nll(base: Perplexity, variant: Perplexity) -> PairedDifference:
    """Difference in mean nll (nats per token; its exponential is the ratio of the perplexities) over the same rows.

    Raises:
        ValueError: the two were measured on different numbers of rows or tokens.
    """
    rows, other = len(base["nll_per_row"]), len(variant["nll_per_row"])
    if rows != other or base["tokens"] != variant["tokens"]:
        raise ValueError(
            f"cannot pair {rows} rows ({base['tokens']} tokens) with {other} rows ({variant['tokens']} tokens)"
        )
    differences = [b - a for a, b in zip(base["nll_per_row"], variant["nll_per_row"], strict=True)]
    mean, stderr = mean_and_stderr([differences])
    return PairedDifference(difference=mean, stderr=stderr, pairs=rows)


def paired_accuracy(base: ZeroShot, variant: ZeroShot, *, metric: str = "acc") -> PairedDifference:
    """Difference in ``metric`` over the same documents of the same task; in a group each subtask is one stratum.

    Raises:
        ValueError: the two results hold different documents, or were not measured with ``metric``.
    """
    for result in (base, variant):
        if metric not in result["metrics"]:
            raise ValueError(f"{result['task']} was not measured by {metric!r}, only by {', '.join(result['metrics'])}")
    before, after = (
        {(d["task"], d["doc"]): d["scores"][metric] for d in result["per_document"]} for result in (base, variant)
    )
    if before.keys() != after.keys():
        raise ValueError(
            f"cannot pair {base['task']} with {variant['task']}: {len(before)} and {len(after)} documents, "
            f"{len(before.keys() & after.keys())} in common"
        )
    strata: defaultdict[str, list[float]] = defaultdict(list)
    for (task, doc), score in before.items():
        strata[task].append(after[task, doc] - score)
    mean, stderr = mean_and_stderr(list(strata.values()))
    return PairedDifference(difference=mean, stderr=stderr, pairs=len(before))
