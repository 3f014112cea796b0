"""What a search found: its best trial, what no other trial beats on both objectives, and which fields mattered."""

from __future__ import annotations

import math
from collections.abc import Iterable

import optuna
from optuna.importance import FanovaImportanceEvaluator, get_param_importances

from pipeline.tuning.domains import Domain
from pipeline.tuning.search import Cost
from pipeline.tuning.trial_records import Record

#: Fewer trials say nothing about a field.
LEAST_TRIALS = 8


def finished(trials: Iterable[Record]) -> list[Record]:
    """Trials that were trained to their end, best first."""
    done = [t for t in trials if t.status == "finished" and t.loss is not None and math.isfinite(t.loss)]
    return sorted(done, key=lambda t: t.loss or 0.0)


def front(trials: Iterable[Record], against: Cost) -> list[Record]:
    """The finished trials that no other one beats or equals in both loss and cost, cheapest first.

    Cheap is few tokens, or much sparsity; of two equal trials the earlier one counts.
    """

    def cost(trial: Record) -> float:
        return trial.tokens if against == "tokens" else -trial.sparsity

    kept: list[Record] = []
    for trial in sorted(finished(trials), key=lambda t: (cost(t), t.loss, t.number)):
        assert trial.loss is not None
        if not kept or trial.loss < (kept[-1].loss or 0.0):
            kept.append(trial)
    return kept


def common_step(trials: Iterable[Record]) -> int | None:
    """The latest step at which every trial that did not fail was measured: there they can be compared."""
    measured = [set(t.steps) for t in trials if t.status != "failed" and t.steps]
    shared = set.intersection(*measured) if measured else set()
    return max(shared, default=None)


def importance(trials: Iterable[Record], domains: dict[str, Domain]) -> dict[str, float]:
    """Share of the variance of the loss at the common step that each field explains (fANOVA), largest first.

    Hutter, Hoos and Leyton-Brown, An Efficient Approach for Assessing Hyperparameter Importance, ICML 2014. Empty
    where there are too few trials, or where all had the same loss.
    """
    trials = list(trials)
    step = common_step(trials)
    if step is None:
        return {}
    study = optuna.create_study()
    distributions = {key: domain.distribution() for key, domain in domains.items()}
    for trial in trials:
        if step in trial.steps:
            done = optuna.trial.create_trial(params=trial.values, distributions=distributions, value=trial.at(step))
            study.add_trial(done)
    values = {trial.value for trial in study.trials}
    if len(study.trials) < LEAST_TRIALS or len(values) < 2:
        return {}
    return get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))
