"""Differences between two variants measured on the same rows or documents.

Two variants fail on mostly the same documents, so the standard error of their difference is far smaller than the two
separate standard errors suggest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import TypedDict

from pipeline.evaluation.perplexity import Perplexity
from pipeline.evaluation.scores import ZeroShot, strata
from pipeline.evaluation.statistics import mean_and_stderr


class PairedDifference(TypedDict):
    """``variant`` minus ``base``."""

    difference: float
    stderr: float | None
    """None for a single pair."""
    pairs: int


class GapClosed(TypedDict):
    """How much of what pruning cost ``base`` a variant wins back.

    1 where the variant is as good as the dense model, 0 where it is no better than ``base``. In perplexity, large gaps
    make for large shares; in nats, the logarithm of perplexity, they do not.
    """

    share: float
    """Of the gap in perplexity."""
    stderr: float | None
    """None for a single row."""
    share_nats: float
    """Of the gap in nats a token."""
    stderr_nats: float | None


def paired_nll(base: Perplexity, variant: Perplexity) -> PairedDifference:
    """Difference in mean nll (nats per token; its exponential is the ratio of the perplexities) over the same rows.

    Raises:
        ValueError: the two were measured on different numbers of rows or tokens.
    """
    _check_rows(base, variant)
    differences = [b - a for a, b in zip(base["nll_per_row"], variant["nll_per_row"], strict=True)]
    mean, stderr = mean_and_stderr([differences])
    return PairedDifference(difference=mean, stderr=stderr, pairs=len(differences))


def gap_closed(dense: Perplexity, base: Perplexity, variant: Perplexity) -> GapClosed | None:
    """Share (B − V) / (B − D) of the gap between ``base`` and ``dense`` that ``variant`` closes, and the same in nats.

    The standard errors are those of the linearised shares: the nll of row r moves the one of perplexities B, V, D by
    (B(1 − share)·b_r − V·v_r + D·share·d_r) / (B − D), and that in nats likewise without the three factors.

    Returns:
        None where ``base`` is no worse than the dense model, so that there is no gap.

    Raises:
        ValueError: the three were measured on different numbers of rows or tokens.
    """
    _check_rows(dense, base)
    _check_rows(dense, variant)
    if base["perplexity"] <= dense["perplexity"]:
        return None
    rows = list(zip(base["nll_per_row"], variant["nll_per_row"], dense["nll_per_row"], strict=True))
    three = (base, variant, dense)
    share, stderr = _share([scored["perplexity"] for scored in three], [scored["perplexity"] for scored in three], rows)
    share_nats, stderr_nats = _share([scored["nll"] for scored in three], [1.0, 1.0, 1.0], rows)
    return GapClosed(share=share, stderr=stderr, share_nats=share_nats, stderr_nats=stderr_nats)


def _share(
    values: Sequence[float], slopes: Sequence[float], rows: Sequence[tuple[float, ...]]
) -> tuple[float, float | None]:
    """(B − V) / (B − D) and its standard error.

    Args:
        values: B, V, D.
        slopes: of each with respect to its nll.
        rows: nll of a row with each of the three.
    """
    base, variant, dense = values
    share = (base - variant) / (base - dense)
    weights = (slopes[0] * (1 - share), -slopes[1], slopes[2] * share)
    moved = [sum(w * x for w, x in zip(weights, row, strict=True)) / (base - dense) for row in rows]
    return share, mean_and_stderr([moved])[1]


def _check_rows(base: Perplexity, variant: Perplexity) -> None:
    rows, other = len(base["nll_per_row"]), len(variant["nll_per_row"])
    if rows != other or base["tokens"] != variant["tokens"]:
        raise ValueError(
            f"cannot pair {rows} rows ({base['tokens']} tokens) with {other} rows ({variant['tokens']} tokens)"
        )


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
    differences = ((task, after[task, doc] - score) for (task, doc), score in before.items())
    mean, stderr = mean_and_stderr(strata(differences))
    return PairedDifference(difference=mean, stderr=stderr, pairs=len(before))


def mean_difference(differences: Sequence[PairedDifference]) -> PairedDifference:
    """Mean over at least one task, each weighing the same; their documents are independent strata."""
    errors = [d["stderr"] for d in differences]
    known = [e for e in errors if e is not None]
    return PairedDifference(
        difference=fmean(d["difference"] for d in differences),
        stderr=math.sqrt(sum(e * e for e in known)) / len(errors) if len(known) == len(errors) else None,
        pairs=sum(d["pairs"] for d in differences),
    )
