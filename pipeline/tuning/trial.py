"""One trial: a learning run of Ray Train, driven by a function of Ray Tune."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import fsspec
import ray
from ray import tune
from ray.train import Checkpoint as TrainCheckpoint
from ray.tune.integration.ray_train import TuneReportCallback

from pipeline.config import RunConfig
from pipeline.learning.checkpoint import Checkpoint
from pipeline.learning.worker import Job
from pipeline.stages import learn
from pipeline.storage import StageDir, fingerprint
from pipeline.tuning import space

#: What trials are judged by, among the metrics of a step.
LOSS = "mask_loss.hard"
#: What a trial may have besides settings: the share of weights to remove.
SPARSITY = "sparsity"


@dataclass(frozen=True)
class Trials:
    """What the trials of a search share. Picklable."""

    config: RunConfig
    learn: str
    sparsity: float
    """Of the trials whose values do not name one."""
    watch_every: int
    uri: str
    """Where the trials and Ray's own books lie."""
    calibration: StageDir
    heldout: StageDir
    priors: Mapping[tuple[str, float], StageDir]
    """By method and sparsity; finished before the search begins."""
    board: Any
    """Actor that takes the events of all trials, see :mod:`pipeline.progress`."""

    def job(self, values: Mapping[str, Any]) -> Job:
        """The learning run of a trial. Trials of the same values have the same directory."""
        settings = {key: value for key, value in values.items() if key != SPARSITY}
        config = space.place(self.config, self.learn, settings)
        config = config.model_copy(update={"watch_every": self.watch_every})
        sparsity = values.get(SPARSITY, self.sparsity)
        prior = self.priors[config.settings.prior, sparsity]
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


class _Report(TuneReportCallback):
    """Adds to each report what a trial is, which a search may weigh against its loss."""

    def __init__(self, constants: dict[str, float]) -> None:
        super().__init__()
        self._constants = constants

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: TrainCheckpoint | None) -> None:
        super().after_report(run_context, [m | self._constants for m in metrics], checkpoint)


def run(values: dict[str, Any], trials: Trials) -> None:
    """Trainable of Tune. Reports what an earlier attempt measured, then continues from its last checkpoint.

    Raises:
        TrialError: the loss became NaN or infinite.
    """
    job = trials.job(values)
    constants = {"tokens": trials.tokens(job), SPARSITY: job.sparsities[0]}
    finished = job.stage.manifest()
    if finished:
        for report in finished["reports"]:
            tune.report(report | constants)
        return
    resumed = Checkpoint.find(job.stage.uri_of("checkpoints"))
    for report in _reports(resumed):
        tune.report(report | constants)
    learn.trainer(job, f"{trials.uri}/ray_train", [_Report(constants)]).fit()
    if error := ray.get(trials.board.error.remote(job.stage.key)):
        raise TrialError(error)
    last = Checkpoint(job.stage.uri_of("checkpoints"))
    with job.stage.work(keep=True) as (_, facts):
        facts |= {"values": values, "settings": dataclasses.asdict(job.learn.settings), "reports": _reports(last)}
    forget_logits(job.stage)


def forget_logits(stage: StageDir) -> None:
    """Delete the checkpoints of a trial: of 12 bytes a weight, of use only while it can be continued."""
    fs, path = fsspec.core.url_to_fs(stage.uri_of("checkpoints"))
    if fs.exists(path):
        fs.rm(path, recursive=True)


def _reports(checkpoint: Checkpoint | None) -> list[dict[str, float]]:
    """The steps at which a learning run was measured."""
    history = checkpoint.facts["history"] if checkpoint else []
    return [step for step in history if LOSS in step and math.isfinite(step[LOSS])]
