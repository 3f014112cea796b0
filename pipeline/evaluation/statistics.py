"""Means and their standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, variance


def mean_and_stderr(strata: Sequence[Sequence[float]]) -> tuple[float, float | None]:
    """Mean over all values of all strata, and its standard error.

    The strata (the subjects of MMLU, say) are fixed and only the values within them are a sample, so the variance of
    the mean is ``sum_i n_i s_i^2 / N^2`` with the sample variance ``s_i^2`` of each stratum; with one stratum that is
    the usual ``s^2 / N``. When some stratum holds a single value its variance is unknown, and all values are treated
    as one stratum, which errs on the large side.

    Args:
        strata: at least one value in all; every stratum non-empty.

    Returns:
        The mean and its standard error, ``None`` when there is only one value in all.
    """
    values = [value for stratum in strata for value in stratum]
    if len(values) < 2:
        return values[0], None
    if any(len(stratum) < 2 for stratum in strata):
        strata = [values]
    mean_variance = sum(len(stratum) * variance(stratum) for stratum in strata) / len(values) ** 2
    return fmean(values), math.sqrt(mean_variance)
