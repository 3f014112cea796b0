"""Runs a plan on Ray: what is finished is skipped, what is independent runs side by side."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any

import ray

from pipeline.errors import DamagedError
from pipeline.execution import ray_cluster
from pipeline.execution.progress import Console
from pipeline.execution.ray_cluster import result_of
from pipeline.execution.training import Training, record_curves
from pipeline.results.schema import StageTime
from pipeline.stages.learn import Learn
from pipeline.stages.planned import Plan
from pipeline.stages.stage import Place, Stage
from pipeline.tracking.tracker import Run


class Flow:
    """Executes the stages of one plan.

    Attributes:
        timings: in the order of finishing.
        started: when the flow was made, in seconds since the epoch.
    """

    def __init__(self, plan: Plan, console: Console, run: Run) -> None:
        self.plan, self.console, self._run = plan, console, run
        self._phase_run = run
        self.timings: list[StageTime] = []
        self._anew: set[Stage[Any]] = set()
        self.started = time.time()

    def execute(self, last: type[Stage[Any]] | None = None) -> None:
        """Run everything that is not finished yet, and anew what is damaged.

        Args:
            last: leave out what comes after work of this kind.

        Raises:
            UserError: something the user gave does not work, found only now (a corpus that is too small, say).
            TrainingError: the loss of a learning run is not finite.
        """
        stages = self.plan.stages
        if last is not None:
            stages = stages[: 1 + max(number for number, stage in enumerate(stages) if isinstance(stage, last))]
        while True:
            try:
                return self._execute(stages)
            except DamagedError as error:  # found by who reads it: work on a remote store, say
                self._forget(next((s for s in stages if s.directory.uri_of() == error.work), None), error)

    def _execute(self, stages: Sequence[Stage[Any]]) -> None:
        work = {Place.DRIVER: self._here, Place.TASK: self._as_tasks, Place.NODE: self._alone}
        for phase, of_phase in itertools.groupby(stages, key=lambda stage: stage.PHASE):
            with self.console.stage(phase), self._run.child(phase, {"stage": phase}) as self._phase_run:
                for place, group in itertools.groupby(of_phase, key=lambda stage: stage.PLACE):
                    if place is Place.TRAINING:
                        self._train([stage for stage in group if isinstance(stage, Learn)])
                    else:
                        work[place](phase, list(group))

    def _note(self, stage: Stage[Any], cached: bool) -> None:
        seconds = stage.facts.get("seconds", 0.0)
        self.timings.append({"name": stage.name, "seconds": seconds, "cached": cached})
        self._phase_run.log_metrics({f"seconds.{stage.item or stage.KIND}": seconds})
        remarks = stage.remarks()
        for text in remarks.warnings:  # also of what was done earlier: they are about the results
            self.console.warn(text)
        if not cached:
            self.console.say(f"  {stage.name}  {seconds:.1f} s", "finished", item=stage.name, seconds=seconds)
            if remarks.metrics:
                self._phase_run.log_metrics(remarks.metrics)
            for text in remarks.lines:
                self.console.say(text)
        stage.record(self._run)

    def _cached(self, stage: Stage[Any]) -> bool:
        if damage := stage.directory.damage():
            self._forget(stage, damage)
        if not stage.finished:
            return False
        if stage.name not in {timing["name"] for timing in self.timings}:
            self._note(stage, cached=True)
        return True

    def _forget(self, stage: Stage[Any] | None, damage: DamagedError) -> None:
        """Take damaged work for unfinished. Not of this plan, or damaged again, it is the user's to delete."""
        if stage is None or stage in self._anew:
            raise damage
        self._anew.add(stage)
        self.console.warn(f"{damage.what}; {stage.name} is made anew")
        stage.directory.forget()
        self.timings = [timing for timing in self.timings if timing["name"] != stage.name]

    def _here(self, phase: str, stages: Sequence[Stage[Any]]) -> None:  # noqa: ARG002 - as the other two
        for stage in stages:
            if not self._cached(stage):
                stage.run()
                self._note(stage, cached=False)

    @property
    def _gpus(self) -> int:
        """What a task reserves: a GPU, if learning has any."""
        return 1 if any(learn.gpu for learn in self.plan.config.learn.values()) else 0

    def _as_tasks(self, phase: str, stages: Sequence[Stage[Any]]) -> None:
        """Run independent work as Ray tasks, as many at a time as there are CPUs (or GPUs, if learning has any)."""
        waiting = [stage for stage in stages if not self._cached(stage)]
        running = {_task(stage, cpus=1, gpus=self._gpus): stage for stage in waiting}
        total, damaged = len(running), None
        while running:
            finished, _ = ray.wait(list(running), num_returns=1, timeout=5)
            for reference in finished:
                stage = running.pop(reference)
                try:
                    result_of(reference)
                except DamagedError as error:  # what does not read that goes on
                    damaged = error
                else:
                    self._note(stage, cached=False)
            self.console.progress(phase, total - len(running), total, "done")
        if damaged:
            raise damaged

    def _alone(self, phase: str, stages: Sequence[Stage[Any]]) -> None:
        for number, stage in enumerate(stages):
            if not self._cached(stage):
                result_of(_task(stage, cpus=ray_cluster.largest_node(), gpus=self._gpus))
                self._note(stage, cached=False)
            self.console.progress(phase, number + 1, len(stages), "done")

    def _train(self, learns: Sequence[Learn]) -> None:
        waiting = []
        for learn in learns:
            if self._cached(learn):
                record_curves(self._phase_run, learn)
            else:
                waiting.append(learn)
        cpus = ray.cluster_resources().get("CPU", 1)
        running: list[Training] = []
        damaged = None
        while waiting or running:
            while waiting:
                # Side by side as far as the CPUs go; on GPUs one at a time, each over all workers.
                used = sum(training.learn.cpus for training in running)
                if running and (waiting[0].config.gpu or used + waiting[0].cpus > cpus):
                    break
                running.append(Training(waiting.pop(0), self.console, self._phase_run))
            time.sleep(0.2)
            for training in list(running):
                try:
                    if not training.poll():
                        continue
                except DamagedError as error:
                    damaged = error
                else:
                    self._note(training.learn, cached=False)
                running.remove(training)
        if damaged:
            raise damaged


def _run(stage: Stage[Any]) -> None:
    stage.run()


def _task(stage: Stage[Any], cpus: float, gpus: int) -> Any:
    """Start ``stage`` as a Ray task; returns the reference to its end."""
    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=1)(_run)
    return task.options(name=stage.name).remote(stage)
