"""A search as Ray Tune runs it: who proposes trials, who stops them, how many at a time, and how it continues."""

from __future__ import annotations

import functools
import itertools
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import optuna
import ray
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from pipeline.config import LearnConfig, RunConfig
from pipeline.errors import UserError
from pipeline.tuning import trial
from pipeline.tuning.domains import Choice, Domain
from pipeline.tuning.space import Space
from pipeline.tuning.trial import LOSS, SPARSITY, Trials
from pipeline.tuning.trial_records import Record, Records
from pipeline.tuning.watch import Relay, Watcher

Proposer = Literal["optuna", "random", "grid"]
Cost = Literal["tokens", "sparsity"]

#: Shares of the recipe's steps that a search against tokens compares.
BUDGETS = (0.25, 0.5, 1.0)
#: Of the trials that get as far as a rung, one in so many goes on; the rungs lie at 1/9 and 1/3 of a trial.
REDUCTION = 3
#: Trials before TPE trusts what it has seen, Optuna's own default being 10.
RANDOM_TRIALS = 8


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is asked of a search."""

    proposer: Proposer = "optuna"
    trials: int | None = None
    """None: as many as the space says."""
    against: Cost | None = None
    """A second objective: fewer tokens, or more sparsity."""
    stop_early: bool = True
    """ASHA; only where there is one objective."""


@dataclass(frozen=True)
class Search:
    """What is tried, in which order, and on what terms."""

    options: Options
    domains: dict[str, Domain]
    points: list[dict[str, Any]]
    """The first trials, or all of them on a grid."""
    trials: int

    @property
    def stops_early(self) -> bool:
        """Whether trials that fall behind are stopped."""
        return self.options.stop_early and self.options.against is None


def make_search(config: RunConfig, learn: str, space: Space, options: Options) -> Search:
    """The search of a space on a recipe.

    Raises:
        UserError: an option out of its range, or options that do not go together.
    """
    if options.trials is not None and options.trials < 1:
        raise UserError(f"--trials: must be 1 or more, not {options.trials}")
    domains = dict(space.domains)
    points = [space.published, space.current]
    steps = config.learn[learn].settings.steps
    if options.against == "tokens":
        domains["steps"] = Choice(tuple(dict.fromkeys(max(1, round(share * steps)) for share in BUDGETS)))
        points = [point | {"steps": steps} for point in points]
    elif options.against == "sparsity":
        if len(config.sparsities) < 2:
            raise UserError("--against sparsity: needs two or more sparsities, as in sparsities=[0.5,0.6,0.7]")
        domains[SPARSITY] = Choice(tuple(config.sparsities))
        points = [point | {SPARSITY: max(config.sparsities)} for point in points]
    if options.proposer == "grid":
        points += _grid(domains)
    # The published values may be the recipe's own, and a grid holds both.
    points = [point for i, point in enumerate(points) if point not in points[:i]]
    if options.proposer == "grid" and options.trials is not None:
        raise UserError(f"--trials: a grid is tried whole, in this space {len(points)} trials")
    trials = len(points) if options.proposer == "grid" else options.trials or space.trials
    return Search(options, domains, points[:trials], trials)


def _grid(domains: dict[str, Domain]) -> list[dict[str, Any]]:
    axes = []
    for key, domain in domains.items():
        if not isinstance(domain, Choice):
            raise UserError(f"--search grid: {key} is a range; a grid needs a list of values for every field")
        axes.append(domain.values)
    return [dict(zip(domains, values, strict=True)) for values in itertools.product(*axes)]


def first_rung(learn: LearnConfig) -> int:
    """The step at which the first trials are stopped; the second rung lies at ``REDUCTION`` times as many."""
    return max(1, learn.settings.steps // REDUCTION**2)


def watch_every(learn: LearnConfig, stops_early: bool) -> int:
    """Steps between measurements of a trial: often enough for the first rung."""
    return min(learn.watch_every, first_rung(learn)) if stops_early else learn.watch_every


def concurrent(learn: LearnConfig, resources: dict[str, float]) -> int:
    """Trials that the cluster has room for at a time."""
    kind, each = ("GPU", learn.workers) if learn.gpu else ("CPU", learn.workers * learn.threads)
    return max(1, int(resources.get(kind, 0)) // each)


def run(search: Search, trials: Trials, records: Records, watcher: Watcher, at_a_time: int) -> None:
    """Run the search to its end, from the start or from where an earlier process was stopped.

    Tune begins anew each time and is told what ``records`` hold. Its own books are pickles, and a run directory may
    come from anywhere: they lie in a directory of this process, which ends with it, and are never read.
    """
    _quieten()
    Relay.watcher = watcher
    numbers = records.numbers(search.trials)
    if not numbers:
        return
    # The driver function of a trial waits; what computes are the workers of its trainer, which have CPUs of their own.
    # Tune refuses a trial that asks for nothing: one byte. All wait on this node, where Tune's books are.
    node = ray.get_runtime_context().get_node_id()
    address = next(found["NodeManagerAddress"] for found in ray.nodes() if found["NodeID"] == node)
    here = {"memory": 1, f"node:{address}": 0.001}
    trainable: Callable[..., Any] = tune.with_resources(
        tune.with_parameters(trial.run, trials=trials), tune.PlacementGroupFactory([here])
    )
    with tempfile.TemporaryDirectory(prefix="tune-", ignore_cleanup_errors=True) as books:
        tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=_proposer(search, trials.config.seed, list(records)),
                scheduler=_scheduler(search, trials, list(records)),
                num_samples=len(numbers),
                max_concurrent_trials=at_a_time,
            ),
            run_config=tune.RunConfig(
                name="search",
                storage_path=books,
                callbacks=[Relay(numbers)],
                failure_config=tune.FailureConfig(max_failures=0, fail_fast=False),
                verbose=0,
            ),
        ).fit()


def _proposer(search: Search, seed: int, known: Sequence[Record] = ()) -> OptunaSearch:
    """Proposes the trials that were begun, then the points that were not, then what it thinks best.

    Args:
        known: the trials of earlier processes; of those that ended it learns.
    """
    samplers: dict[Proposer, Callable[..., optuna.samplers.BaseSampler]] = {
        "optuna": functools.partial(optuna.samplers.TPESampler, n_startup_trials=RANDOM_TRIALS, multivariate=True),
        "random": optuna.samplers.RandomSampler,
        "grid": optuna.samplers.RandomSampler,  # it is never asked: every point is given
    }
    objectives: dict[str, Any] = {"metric": LOSS, "mode": "min"}
    if search.options.against:
        mode = "min" if search.options.against == "tokens" else "max"
        objectives = {"metric": [LOSS, search.options.against], "mode": ["min", mode]}
    distributions = {key: domain.distribution() for key, domain in search.domains.items()}
    storage = optuna.storages.InMemoryStorage()
    directions = {"min": optuna.study.StudyDirection.MINIMIZE, "max": optuna.study.StudyDirection.MAXIMIZE}
    modes = [objectives["mode"]] if isinstance(objectives["mode"], str) else objectives["mode"]
    study = optuna.create_study(storage=storage, study_name=_STUDY, directions=[directions[mode] for mode in modes])
    for record in known:
        if record.status != "running":
            study.add_trial(_told(record, distributions, search.options.against))
    tried = [record.values for record in known]
    begun = [record.values for record in known if record.status == "running"]
    return OptunaSearch(
        space=distributions,
        points_to_evaluate=begun + [point for point in search.points if point not in tried],
        # From the same seed the sampler would draw again what it drew for the first trials.
        sampler=samplers[search.options.proposer](seed=seed + len(known)),
        storage=storage,
        study_name=_STUDY,
        **objectives,
    )


_STUDY = "search"


def _told(record: Record, distributions: dict[str, Any], against: Cost | None) -> optuna.trial.FrozenTrial:
    """A trial that ended, as Optuna knows it when Tune tells of it."""
    state = optuna.trial.TrialState.FAIL
    values = None
    if record.status != "failed" and record.loss is not None:
        state = optuna.trial.TrialState.COMPLETE
        values = [record.loss] + ([float(getattr(record, against))] if against else [])
    return optuna.trial.create_trial(state=state, values=values, params=record.values, distributions=distributions)


def _scheduler(search: Search, trials: Trials, known: Sequence[Record]) -> TrialScheduler:
    if not search.stops_early:
        return FIFOScheduler()
    first = first_rung(trials.config.learn[trials.learn])
    return _Asha(
        search.points,
        known,
        time_attr="step",
        metric=LOSS,
        mode="min",
        grace_period=first,
        reduction_factor=REDUCTION,
        # Two rungs. A third at the end would stop trials that have just finished, and so would max_t itself.
        max_t=first * REDUCTION**2 - 1,
        stop_last_trials=False,
    )


class _Asha(ASHAScheduler):
    """Lets the known values run to their end, which others are compared with.

    Args:
        known: values that are not stopped.
        earlier: trials of earlier processes, with which the later ones are compared.
    """

    def __init__(self, known: list[dict[str, Any]], earlier: Sequence[Record], **settings: Any) -> None:
        super().__init__(**settings)
        self._known = known
        self._begun = [record for record in earlier if record.status == "running"]
        for record in earlier:
            if record.status != "running":
                self._remember(record.id, record)

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        super().on_trial_add(tune_controller, trial)
        for record in self._begun:
            if record.values == trial.config:
                # What was decided of it before holds; it tells of the same measurements again.
                self._remember(trial.trial_id, record)
                self._begun.remove(record)
                break

    def _remember(self, id: str, record: Record) -> None:
        (bracket,) = self._brackets
        trial: Any = SimpleNamespace(trial_id=id)  # a bracket asks for no more of it
        for step, loss in zip(record.steps, record.losses, strict=True):
            bracket.on_result(trial, step, -loss)  # a reward: the more, the better

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        action = super().on_trial_result(tune_controller, trial, result)
        return TrialScheduler.CONTINUE if trial.config in self._known else action


def _quieten() -> None:
    """Tune's tables, its own log files of each trial, and remarks on settings that are meant."""
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the new one prints at verbosity 0 too
    for noisy in ("ray.tune", "ray.train"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
