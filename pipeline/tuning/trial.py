"""One trial: a learning run of Ray Train, driven by a function of Ray Tune."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import fsspec
import ray
from ray import tune

from pipeline.artifacts.logit_checkpoint import FOLDER, Checkpoint
from pipeline.artifacts.store import StageDir
from pipeline.config import RunConfig
from pipeline.learning.trainer import trainer
from pipeline.learning.worker import Job
from pipeline.stages.calibrate import Calibrate
from pipeline.stages.learn import Learn
from pipeline.stages.prior import Prior, PriorKey
from pipeline.stages.stage import PinnedModel
from pipeline.tuning import space

#: What trials are judged by, among the metrics of a step.
LOSS = "mask_loss.hard"
#: What a trial may have besides settings: the share of weights to remove.
SPARSITY = "sparsity"
#: Seconds between looks at what a trial's workers have measured.
LOOK_EVERY = 0.5


@dataclass(frozen=True)
class Trials:
    """What the trials of a search share. Picklable."""

    config: RunConfig
    learn: str
    sparsity: float
    """Of the trials whose values do not name one."""
    watch_every: int
    uri: str
    """Where the trials and Ray Train's books lie."""
    model: PinnedModel
    calibration: Calibrate
    heldout: Calibrate
    priors: Mapping[PriorKey, Prior]
    """Finished before the search begins."""
    board: Any
    """Actor that takes the events of all trials, see :class:`pipeline.learning.board.Board`."""

    def trial(self, values: Mapping[str, Any]) -> Trial:
        """The learning run of a trial. Trials of the same values have the same directory."""
        settings = {key: value for key, value in values.items() if key != SPARSITY}
        config = space.place(self.config, self.learn, settings)
        sparsity = values.get(SPARSITY, self.sparsity)
        return Trial(
            store=self.uri,
            model=self.model,
            entry=self.learn,
            config=config.model_copy(update={"watch_every": self.watch_every}),
            shown_seed=None,
            sparsities=(sparsity,),
            seed=self.config.seed,
            prior=self.priors[config.settings.prior, self.config.prior.start_scope(config.settings), sparsity],
            calibration=self.calibration,
            heldout=self.heldout,
        )


@dataclass(frozen=True, eq=False)
class Trial(Learn):
    """A learning run of a search."""

    KIND = "trials"

    @property
    def item(self) -> str:
        return self.entry


class TrialError(Exception):
    """A trial that cannot be finished."""


def run(values: dict[str, Any], trials: Trials) -> None:
    """Trainable of Tune. Reports what an earlier attempt measured, then continues from its last checkpoint.

    Raises:
        TrialError: the loss became NaN or infinite.
    """
    trial = trials.trial(values)
    told = _Told({"tokens": trial.tokens, SPARSITY: trial.sparsities[0]})
    if trial.finished:
        told.all(trial.facts["history"])
        return
    resumed = Checkpoint.find(trial.directory.uri_of(FOLDER))
    told.all(resumed.facts["history"] if resumed else [])
    fitting = _Fitting(trial.job(trials.board), f"{trials.uri}/ray_train")
    while not fitting.ended(after=LOOK_EVERY):
        told.all(ray.get(trials.board.measured.remote(trial.key, told.last)))
    if error := ray.get(trials.board.error.remote(trial.key)):
        raise TrialError(error)
    history = trial.history()
    told.all(history)
    with trial.directory.work(keep=True) as (_, facts):
        facts |= {"values": values, "settings": dataclasses.asdict(trial.config.settings), "history": history}
    forget_logits(trial.directory)


class _Told:
    """Reports to Tune what a trial measured on held-out rows, each step once and in order.

    Not by Ray's ``TuneReportCallback`` (2.60): the last report may still wait in its queue when the trial ends, and is
    lost then, or blocks the trial's process for good.

    Args:
        constants: what a trial is, which a search may weigh against its loss; added to each report.
    """

    def __init__(self, constants: Mapping[str, float]) -> None:
        self._constants = constants
        self.last = -1
        """The last step that was reported."""

    def all(self, history: Iterable[Mapping[str, float]]) -> None:
        """Report the steps of ``history`` that were measured and are new."""
        for step in history:
            if step["step"] > self.last and LOSS in step and math.isfinite(step[LOSS]):
                self.last = int(step["step"])
                tune.report({**step, **self._constants})


class _Fitting(threading.Thread):
    """A learning run of Ray Train in the background. It does not outlive the process."""

    def __init__(self, job: Job, storage_path: str) -> None:
        super().__init__(name="fit", daemon=True)
        self._trainer = trainer(job, storage_path)
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._trainer.fit()
        except BaseException as error:  # raised again where somebody waits
            self._error = error

    def ended(self, after: float) -> bool:
        """Whether it ended within so many seconds. Raises what it failed with."""
        self.join(after)
        if self._error:
            raise self._error
        return not self.is_alive()


def forget_logits(stage: StageDir) -> None:
    """Delete the checkpoints of a trial: of 12 bytes a weight, of use only while it can be continued."""
    fs, path = fsspec.core.url_to_fs(stage.uri_of(FOLDER))
    if fs.exists(path):
        fs.rm(path, recursive=True)
