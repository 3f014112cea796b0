"""Follows a search while it runs: lines on the terminal, the records of the trials, the tracker."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, ClassVar

import ray
from ray import tune
from ray.tune.experiment import Trial

from pipeline.artifacts.logit_checkpoint import FOLDER, Checkpoint
from pipeline.execution.progress import Console, TrainingProgress
from pipeline.tracking.curves import Curves
from pipeline.tracking.redaction import redact
from pipeline.tracking.tracker import Run
from pipeline.tuning.trial import LOSS, SPARSITY, Trials, forget_logits
from pipeline.tuning.trial_records import Record, Records


class Relay(tune.Callback):
    """Tune copies its callbacks and writes them to its books: so this one holds nothing but plain numbers, and passes
    everything on to the watcher of its process.

    Args:
        numbers: of the trials in the order that this process proposes them in.
    """

    watcher: ClassVar[Watcher | None] = None

    def __init__(self, numbers: list[int]) -> None:
        self._numbers = numbers

    # Tune passes all arguments by name.
    def on_trial_start(self, trials: list[Trial], trial: Trial, **_: Any) -> None:  # type: ignore[override]
        # Trials are created in the order that they were proposed in, and started in any.
        self._live().started(self._numbers[trials.index(trial)], trial.trial_id, trial.config)

    def on_trial_result(self, trial: Trial, result: dict[str, Any], **_: Any) -> None:  # type: ignore[override]
        self._live().reported(trial.trial_id, result)

    def on_trial_complete(self, trial: Trial, **_: Any) -> None:  # type: ignore[override]
        self._live().ended(trial.trial_id)

    def on_trial_error(self, trial: Trial, **_: Any) -> None:  # type: ignore[override]
        self._live().ended(trial.trial_id, error=_last_line(Path(trial.error_file)))

    def on_step_end(self, **_: Any) -> None:  # type: ignore[override]
        self._live().fetch()

    def _live(self) -> Watcher:
        assert self.watcher is not None
        return self.watcher


class Watcher:
    """Turns what happens to the trials into lines, records and metrics.

    Args:
        run: the tracker's run of the search; each trial becomes a child of it.
    """

    def __init__(self, trials: Trials, records: Records, console: Console, run: Run) -> None:
        self._trials, self._records, self._console, self._run = trials, records, console, run
        self._active: dict[str, _Active] = {}

    def started(self, number: int, id: str, values: dict[str, Any]) -> None:
        """A trial begins, or begins again after a kill."""
        record = self._records.open(number, id, values)
        self._active[id] = _Active(record, self._trials, self._console, self._run)
        self._console.say(f"trial {record.number}  {_text(values)}")
        self._records.save()

    def reported(self, id: str, result: dict[str, Any]) -> None:
        """A trial was measured on held-out rows."""
        record = self._active[id].record
        record.report(int(result["step"]), result[LOSS])
        record.tokens, record.sparsity = result["tokens"], result[SPARSITY]
        self._records.save()

    def ended(self, id: str, error: str | None = None) -> None:
        """A trial is over.

        Args:
            error: what Tune says of a trial that failed; what its workers said of it goes before.
        """
        self.fetch()
        active = self._active.pop(id)
        if error:
            error = redact(ray.get(self._trials.board.error.remote(active.key)) or error)
        record = active.record
        record.ended = self._records.seconds
        active.end(error)
        self._console.forget(active.name)
        loss = "no measurement" if record.loss is None else f"held-out loss {record.loss:.4f}"
        why = f": {record.error}" if record.error else ""
        self._console.say(f"trial {record.number} {record.status}  {loss}  {record.seconds:.0f} s{why}")
        self._records.save()

    def fetch(self) -> None:
        """Show what the workers have told since the last call."""
        by_key = {active.key: active for active in self._active.values()}
        for event in ray.get(self._trials.board.drain.remote()):
            # A worker of a trial that was stopped may have the last word.
            if "loss" in event and event["run"] in by_key:
                by_key[event["run"]].show(event)


class _Active:
    """A trial that runs now."""

    def __init__(self, record: Record, trials: Trials, console: Console, run: Run) -> None:
        self.record = record
        trial = trials.trial(record.values)
        settings = trial.config.settings
        self._stage, self._steps = trial.directory, settings.steps
        self.name = f"trial {record.number}"
        self._progress = TrainingProgress(
            console,
            self.name,
            settings.steps,
            settings.batch_rows * trials.config.data.context_length,
            1 - trial.sparsities[0],
        )
        tags = {"stage": "trial", "method": trials.learn, "sparsity": f"{trial.sparsities[0]:g}"}
        self._run = run.child(f"trial-{record.number:03d}", tags)
        self._run.log_params({**record.values, SPARSITY: trial.sparsities[0], "steps": settings.steps})
        self._curves = Curves(self._run)
        self._curves.fill(self._history())
        self._began = time.time()
        self._before = record.seconds

    @property
    def key(self) -> str:
        """What the trial's workers sign their events with."""
        return self._stage.key

    def show(self, event: dict[str, Any]) -> None:
        """Show one step."""
        if self.record.start_up is None:
            self.record.start_up = time.time() - self._began - event["seconds"]
        self._progress.show(event)
        self._curves.add(event)

    def end(self, error: str | None) -> None:
        """Set what is known of the trial now that it is over."""
        record = self.record
        record.seconds = self._before + time.time() - self._began
        self._curves.fill(self._history())
        if error:
            record.status, record.error = "failed", error
            self._run.end("FAILED", error)
        elif record.steps and record.steps[-1] == self._steps - 1:
            record.status = "finished"
            self._run.end()
        else:
            record.status = "stopped"
            step = record.steps[-1] + 1 if record.steps else 0
            record.tokens = record.tokens * step // self._steps
            self._run.end("KILLED", f"stopped early, after step {step}: others were better there")
            forget_logits(self._stage)

    def _history(self) -> list[dict[str, float]]:
        """The steps that are known of the trial without its workers: those that an earlier process did, say."""
        if finished := self._stage.manifest():
            return finished["history"]
        saved = Checkpoint.find(self._stage.uri_of(FOLDER))
        return saved.facts["history"] if saved else []


def _last_line(file: Path) -> str:
    """What a failed trial says. Not ``Trial.get_error``: that looks where Tune copies the file some time later."""
    lines = file.read_text().strip().splitlines() if file.exists() else []
    return lines[-1][:300] if lines else "the process of the trial ended"


def _text(values: dict[str, Any]) -> str:
    return "  ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items()
    )
