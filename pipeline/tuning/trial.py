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

from pipeline.config import RunConfig
from pipeline.learning.checkpoint import FOLDER, Checkpoint
from pipeline.learning.worker import Job
from pipeline.plan import PriorKey
from pipeline.stages import learn
from pipeline.storage import StageDir, fingerprint
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
    calibration: StageDir
    heldout: StageDir
    priors: Mapping[PriorKey, StageDir]
    """Finished before the search begins."""
    board: Any
    """Actor that takes the events of all trials, see :mod:`pipeline.progress`."""

    def job(self, values: Mapping[str, Any]) -> Job:
        """The learning run of a trial. Trials of the same values have the same directory."""
        settings = {key: value for key, value in values.items() if key != SPARSITY}
        config = space.place(self.config, self.learn, settings)
        config = config.model_copy(update={"watch_every": self.watch_every})
        sparsity = values.get(SPARSITY, self.sparsity)
        prior = self.priors[config.settings.prior, self.config.prior.start_scope(config.settings), sparsity]
        key = fingerprint(
            learn.VERSION, config, sparsity, self.config.seed, prior.key, self.calibration.key, self.heldout.key
        )
        return Job(
            stage=StageDir(self.uri, "trials", self.learn, key),
            model=self.config.model,
            learn=config,
            sparsities=(sparsity,),
            seed=self.config.seed,
            calibration=self.calibration,
            heldout=self.heldout,
            prior=prior,
            board=self.board,
        )

    def tokens(self, job: Job) -> int:
        """Tokens that a trial learns from when it is not stopped."""
        settings = job.learn.settings
        return settings.steps * settings.batch_rows * self.config.data.context_length


class TrialError(Exception):
    """A trial that cannot be finished."""


def run(values: dict[str, Any], trials: Trials) -> None:
    """Trainable of Tune. Reports what an earlier attempt measured, then continues from its last checkpoint.

    Raises:
        TrialError: the loss became NaN or infinite.
    """
    job = trials.job(values)
    told = _Told({"tokens": trials.tokens(job), SPARSITY: job.sparsities[0]})
    finished = job.stage.manifest()
    if finished:
        told.all(finished["history"])
        return
    resumed = Checkpoint.find(job.stage.uri_of(FOLDER))
    told.all(resumed.facts["history"] if resumed else [])
    fitting = _Fitting(job, f"{trials.uri}/ray_train")
    while not fitting.ended(after=LOOK_EVERY):
        told.all(ray.get(trials.board.measured.remote(job.stage.key, told.last)))
    if error := ray.get(trials.board.error.remote(job.stage.key)):
        raise TrialError(error)
    history = Checkpoint(job.stage.uri_of(FOLDER)).facts["history"]
    told.all(history)
    with job.stage.work(keep=True) as (_, facts):
        facts |= {"values": values, "settings": dataclasses.asdict(job.learn.settings), "history": history}
    forget_logits(job.stage)


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
        self._trainer = learn.trainer(job, storage_path)
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
