"""Runs a plan on Ray: what is finished is skipped, what is independent runs side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ray

from pipeline import ray_cluster, records
from pipeline.checksums import FILES
from pipeline.errors import DamagedError, UserError
from pipeline.learning.checkpoint import FOLDER, Checkpoint
from pipeline.learning.worker import Job
from pipeline.plan import LearnWork, Plan
from pipeline.progress import Console, TrainingProgress, start_board
from pipeline.stages import benchmark, calibrate, evaluate, harden, learn, mask_map, prior
from pipeline.storage import StageDir
from pipeline.tracking.base import Run
from pipeline.tracking.curves import Curves


class TrainingError(Exception):
    """Training stopped for a reason that trying again will not mend."""


class Flow:
    """Executes the stages of one plan.

    Attributes:
        timings: (stage, seconds, cached) in the order of finishing.
        started: when the flow was made, in seconds since the epoch.
    """

    def __init__(self, plan: Plan, console: Console, run: Run) -> None:
        self.plan, self.console, self._run = plan, console, run
        self._stage_run = run
        self.timings: list[dict[str, Any]] = []
        self._anew: set[StageDir] = set()
        self.started = time.time()

    def execute(self, last: str = "benchmark") -> None:
        """Run everything that is not finished yet, and anew what is damaged.

        Args:
            last: the kind of stage to stop after.

        Raises:
            UserError: something the user gave does not work, found only now (a corpus that is too small, say).
            TrainingError: the loss of a learning run is not finite.
        """
        while True:
            try:
                return self._execute(last)
            except DamagedError as error:  # found by who reads it: work on a remote store, say
                self._forget(next((s for s in self.plan.stages if s.uri_of() == error.work), None), error)

    def _execute(self, last: str) -> None:
        for title, step in (
            ("calibrate", self._calibrate),
            ("prior", self._priors),
            ("learn", self._learn),
            ("reconstruct", self._reconstruct),
            ("harden", self._harden),
            ("evaluate", self._evaluate),
            ("benchmark", self._benchmark),
        ):
            with self.console.stage(title), self._run.child(title, {"stage": title}) as self._stage_run:
                step()
            if title == last:
                return

    def _note(self, stage: StageDir, cached: bool) -> None:
        seconds = (stage.manifest() or {}).get("seconds", 0.0)
        self.timings.append({"name": stage.name, "seconds": seconds, "cached": cached})
        self._stage_run.log_metrics({f"seconds.{stage.item or stage.stage}": seconds})
        if not cached:
            self.console.say(f"  {stage.name}  {seconds:.1f} s", "finished", item=stage.name, seconds=seconds)

    def _cached(self, stage: StageDir) -> bool:
        if damage := stage.damage():
            self._forget(stage, damage)
        if stage.manifest() is None:
            return False
        if stage.name not in {timing["name"] for timing in self.timings}:
            self._note(stage, cached=True)
        return True

    def _forget(self, stage: StageDir | None, damage: DamagedError) -> None:
        """Take damaged work for unfinished. Not of this plan, or damaged again, it is the user's to delete."""
        if stage is None or stage in self._anew:
            raise damage
        self._anew.add(stage)
        self.console.warn(f"{damage.what}; {stage.name} is made anew")
        stage.forget()
        self.timings = [timing for timing in self.timings if timing["name"] != stage.name]

    def _calibrate(self) -> None:
        config = self.plan.config
        for role, (stage, corpus, apart) in self.plan.corpora.items():
            if self._cached(stage):
                continue
            others = [self.plan.corpora[other][0] for other in apart]
            keep_texts = config.evaluate.cloze is not None and role == next(iter(config.data.evaluation), None)
            try:
                facts = calibrate.run(stage, corpus, config.data, config.model, others, keep_texts)
            except UserError as error:
                key = f"evaluation.{role}" if role in config.data.evaluation else role
                raise UserError(f"data.{key}.{error}") from error
            self._note(stage, cached=False)
            if without := facts["records_without_text"]:
                self.console.warn(f"data.{role}: {without} records without text were left out")
            self._stage_run.log_metrics({f"tokens_per_second.{role}": facts["tokens_per_second"]})
            self.console.say(
                f"    {facts['source']}: {facts['documents']} documents, {facts['rows']} rows of "
                f"{facts['context_length']}, {facts['tokens_per_second']:.0f} tokens/s"
            )
        records.log_inputs(self._run, self.plan)

    @property
    def _gpus(self) -> int:
        """What a task reserves: a GPU, if learning has any."""
        return 1 if any(learn.gpu for learn in self.plan.config.learn.values()) else 0

    def _fan_out(self, title: str, work: Iterable[tuple[StageDir, Callable[..., Any], tuple[Any, ...]]]) -> None:
        """Run independent work as Ray tasks, as many at a time as there are CPUs (or GPUs, if learning has any)."""
        running = {}
        for stage, function, arguments in work:
            if not self._cached(stage):
                task = ray.remote(num_cpus=1, num_gpus=self._gpus, max_retries=1)(function)
                running[task.remote(stage, *arguments)] = stage
        total, damaged = len(running), None
        while running:
            finished, _ = ray.wait(list(running), num_returns=1, timeout=5)
            for reference in finished:
                stage = running.pop(reference)
                try:
                    _get(reference)
                except DamagedError as error:  # what does not read that goes on
                    damaged = error
                else:
                    self._note(stage, cached=False)
            self.console.progress(title, total - len(running), total, "done")
        if damaged:
            raise damaged

    def _priors(self) -> None:
        config = self.plan.config
        rows = self.plan.corpora["calibration"][0]
        self._fan_out(
            "prior",
            (
                (stage, prior.run, (method, sparsity, scope, config.prior, config.model, rows, config.seed))
                for (method, scope, sparsity), stage in self.plan.priors.items()
            ),
        )

    def _learn(self) -> None:
        waiting = []
        for work in self.plan.learns:
            if self._cached(work.stage):
                with _learning_run(self._stage_run, work) as child:
                    Curves(child).fill(Checkpoint(work.stage.uri_of(FOLDER)).facts["history"])
            else:
                waiting.append(work)
        cpus = ray.cluster_resources().get("CPU", 1)
        running: list[_Learning] = []
        damaged = None
        while waiting or running:
            while waiting:
                # Side by side as far as the CPUs go; on GPUs one at a time, each over all workers.
                used = sum(r.work.config.workers * r.work.config.threads for r in running)
                cost = waiting[0].config.workers * waiting[0].config.threads
                if running and (waiting[0].config.gpu or used + cost > cpus):
                    break
                running.append(_Learning(self.plan, waiting.pop(0), self.console, self._stage_run))
            time.sleep(0.2)
            for learning in list(running):
                try:
                    if not learning.poll():
                        continue
                except DamagedError as error:
                    damaged = error
                else:
                    self._note(learning.work.stage, cached=False)
                running.remove(learning)
        if damaged:
            raise damaged

    def _reconstruct(self) -> None:
        config = self.plan.config
        rows = self.plan.corpora["calibration"][0]
        self._fan_out(
            "reconstruct",
            (
                (
                    work.stage,
                    prior.reconstruct,
                    (
                        work.learned.stage,
                        work.sparsity,
                        work.learned.config.settings.scope,
                        config.prior,
                        config.model,
                        rows,
                        config.seed,
                    ),
                )
                for work in self.plan.reconstructions
            ),
        )

    def _harden(self) -> None:
        config = self.plan.config
        self._fan_out(
            "harden",
            (
                (v.export, harden.run, (config.model, v.method, v.sparsity, v.scope, v.made_by, v.weights))
                for v in self.plan.variants
                if v.export
            ),
        )

    def _evaluate(self) -> None:
        config = self.plan.config
        if self.plan.cloze and not self._cached(self.plan.cloze):
            assert config.evaluate.cloze is not None
            text = self.plan.corpora[next(iter(config.data.evaluation))][0]
            try:
                evaluate.write_cloze(self.plan.cloze, config.model, text, config.evaluate.cloze, config.seed)
            except ValueError as error:
                raise UserError(f"evaluate.cloze: {error}") from error
            self._note(self.plan.cloze, cached=False)
        work: list[tuple[StageDir, Callable[..., Any], tuple[Any, ...]]] = []
        first_text = self.plan.corpora[next(iter(config.data.evaluation), "heldout")][0]
        for m in self.plan.measurements:
            export = m.variant.export
            match m.kind:
                case "perplexity":
                    rows = self.plan.corpora[m.subject][0]
                    work.append(
                        (m.stage, evaluate.perplexity, (config.model, export, rows, config.evaluate.batch_rows))
                    )
                case "task":
                    on_task = (config.model, export, m.spec, config.evaluate, config.seed)
                    work.append((m.stage, evaluate.zero_shot, on_task))
                case "samples":
                    on_rows = (config.model, export, first_text, config.evaluate.samples, config.seed)
                    work.append((m.stage, evaluate.samples, on_rows))
                case "map":
                    work.append((m.stage, mask_map.run, (export,)))
        self._fan_out("evaluate", work)

    def _benchmark(self) -> None:
        """One measurement after the other, each with a whole node's CPUs to itself."""
        config = self.plan.config
        for number, work in enumerate(self.plan.speeds):
            if not self._cached(work.stage):
                arguments: tuple[Any, ...] = (work.stage, config.model, work.variant.export, config.benchmark)
                task = ray.remote(num_cpus=ray_cluster.largest_node(), num_gpus=self._gpus, max_retries=1)(
                    benchmark.run
                )
                _get(task.remote(*arguments))
                self._note(work.stage, cached=False)
            self.console.progress("benchmark", number + 1, len(self.plan.speeds), "done")


class _Learning:
    """One learning run in the background."""

    def __init__(self, plan: Plan, work: LearnWork, console: Console, run: Run) -> None:
        config = plan.config
        self.work = work
        settings = work.config.settings
        self._run = _learning_run(run, work)
        self._board = start_board()
        self._progress = TrainingProgress(
            console,
            work.stage.item,
            settings.steps,
            settings.batch_rows * config.data.context_length,
            1 - work.sparsities[0],
        )
        self._console = console
        self._error: dict[str, Any] | None = None
        job = Job(
            stage=work.stage,
            model=config.model,
            learn=work.config,
            sparsities=work.sparsities,
            seed=config.seed,
            calibration=plan.corpora["calibration"][0],
            heldout=plan.corpora["heldout"][0],
            prior=work.prior,
            board=self._board,
        )
        found = Checkpoint.find(work.stage.uri_of(FOLDER))
        self._curves = Curves(self._run)
        if found:
            console.say(f"  {work.stage.name} continues at step {found.step}")
            self._curves.fill(found.facts["history"])
        self._began = time.time()
        books = str(Path(plan.directory).resolve() / "ray_train") if "://" not in plan.directory else plan.directory
        self._future = learn.fit.options(scheduling_strategy=ray_cluster.here()).remote(job, books)

    def poll(self) -> bool:
        """Show what has happened; true when the run has ended well."""
        finished, _ = ray.wait([self._future], timeout=0)
        for event in ray.get(self._board.drain.remote()):
            if "error" in event:
                self._error = event
            elif "warning" in event:
                self._console.warn(f"{self.work.stage.name}: {event['warning']}")
            elif "loss" in event:
                self._progress.show(event)
                self._curves.add(event)
        if not finished:
            return False
        _get(self._future)
        if self._error:
            self._run.end("FAILED", self._error["error"])
            raise TrainingError(
                f"{self.work.stage.name}: {self._error['error']}; the checkpoint of step "
                f"{self._error['last_checkpoint']} is kept in {self.work.stage.uri_of('checkpoints')}. "
                f"Lower learn.{self.work.name}.settings.learning_rate or check the calibration text"
            )
        saved = Checkpoint(self.work.stage.uri_of(FOLDER))
        with self.work.stage.work(keep=True) as (_, facts):
            facts |= {"seconds": round(time.time() - self._began, 3), FILES: saved.files()}
        # Steps whose worker was killed before it could tell of them.
        self._curves.fill(saved.facts["history"])
        self._run.end()
        ray.kill(self._board)
        return True


def _learning_run(run: Run, work: LearnWork) -> Run:
    """The tracker's run of a learning run, below that of its stage."""
    child = run.child(work.stage.name, records.learn_tags(work))
    child.log_params(work.config.model_dump(mode="json") | records.sparsity_of(work))
    return child


def _get(reference: Any) -> Any:
    """The result of a Ray task; the user's errors come out as they went in."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = _cause(error)
        if isinstance(cause, UserError):
            raise cause from error
        if isinstance(cause, ValueError):
            raise UserError(str(cause)) from error
        raise


def _cause(error: Any) -> Any:
    """What a task or the workers of a learning run failed with, out of all that Ray wraps it in."""
    while True:
        failures = getattr(error, "worker_failures", {})
        inner = [getattr(error, "cause", None), getattr(error, "_base_exc", None), *failures.values()]
        if not any(inner):
            return error
        error = next(filter(None, inner))
