"""A learning run in the background, as a run of the pipeline shows and records it."""

from __future__ import annotations

import time
from typing import Any

import ray

from pipeline.artifacts.logit_checkpoint import FOLDER, Checkpoint
from pipeline.execution.progress import Console, TrainingProgress
from pipeline.execution.ray_cluster import result_of
from pipeline.learning.board import start_board
from pipeline.results import recording
from pipeline.stages.learn import Learn, TrainingError
from pipeline.tracking.curves import Curves
from pipeline.tracking.tracker import Run


class Training:
    """A learning run that has been started, or continued from its last checkpoint.

    Args:
        run: the tracker's run of the phase, below which the learning run gets its own.
    """

    def __init__(self, learn: Learn, console: Console, run: Run) -> None:
        self.learn, self._console = learn, console
        self._run = _run_of(run, learn)
        self._board = start_board()
        settings, length = learn.config.settings, learn.calibration.data.context_length
        self._progress = TrainingProgress(
            console, learn.item, settings.steps, settings.batch_rows * length, 1 - learn.sparsities[0]
        )
        self._error: str | None = None
        self._curves = Curves(self._run)
        if checkpoint := Checkpoint.find(learn.directory.uri_of(FOLDER)):
            console.say(f"  {learn.name} continues at step {checkpoint.step}")
            self._curves.fill(checkpoint.facts["history"])
        self._began = time.time()
        self._end = learn.start(self._board)

    def poll(self) -> bool:
        """Show what has happened; true when the run has ended well.

        Raises:
            TrainingError: its loss is not finite.
            DamagedError: what it reads is not what was written.
        """
        ended, _ = ray.wait([self._end], timeout=0)
        for event in ray.get(self._board.drain.remote()):
            self._show(event)
        if not ended:
            return False
        result_of(self._end)
        try:
            self.learn.finish(time.time() - self._began, self._error)
        except TrainingError:
            self._run.end("FAILED", self._error)
            raise
        # Steps whose worker was killed before it could tell of them.
        self._curves.fill(self.learn.history())
        self._run.end()
        ray.kill(self._board)
        return True

    def _show(self, event: dict[str, Any]) -> None:
        if "error" in event:
            self._error = event["error"]
        elif "warning" in event:
            self._console.warn(f"{self.learn.name}: {event['warning']}")
        elif "loss" in event:
            self._progress.show(event)
            self._curves.add(event)


def record_curves(run: Run, learn: Learn) -> None:
    """Record a finished learning run below ``run``, as far as it is not recorded."""
    with _run_of(run, learn) as child:
        Curves(child).fill(learn.history())


def _run_of(run: Run, learn: Learn) -> Run:
    """The tracker's run of a learning run, below that of its phase."""
    child = run.child(learn.name, recording.learn_tags(learn))
    child.log_params(learn.config.model_dump(mode="json") | recording.sparsity_of(learn))
    return child
