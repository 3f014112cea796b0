"""Runs a plan on Ray: what is finished is skipped, what is independent runs side by side."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ray
import torch

from pipeline.errors import UserError
from pipeline.learning.checkpoint import Checkpoint
from pipeline.learning.worker import Job
from pipeline.plan import LearnWork, Plan
from pipeline.progress import Board, Console, TrainingProgress
from pipeline.stages import calibrate, evaluate, harden, learn, prior
from pipeline.storage import StageDir
from pipeline.tracking.base import Run


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
        self.timings: list[dict[str, Any]] = []
        self.started = time.time()

    def execute(self, last: str = "evaluate") -> None:
        """Run everything that is not finished yet.

        Args:
            last: the kind of stage to stop after.

        Raises:
            UserError: something the user gave does not work, found only now (a corpus that is too small, say).
            TrainingError: the loss of a learning run is not finite.
        """
        for title, step in (
            ("calibrate", self._calibrate),
            ("prior", self._priors),
            ("learn", self._learn),
            ("reconstruct", self._reconstruct),
            ("harden", self._harden),
            ("evaluate", self._evaluate),
        ):
            began = time.time()
            step()
            self.console.say(f"{title} done in {time.time() - began:.1f} s")
            if title == last:
                return

    def _note(self, stage: StageDir, cached: bool) -> None:
        manifest = stage.manifest() or {}
        self.timings.append({"name": stage.name, "seconds": manifest.get("seconds", 0.0), "cached": cached})
        if not cached:
            self.console.say(f"  {stage.name}  {manifest.get('seconds', 0.0):.1f} s")

    def _cached(self, stage: StageDir) -> bool:
        if stage.manifest() is None:
            return False
        self._note(stage, cached=True)
        return True

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
            with self._run.child(stage.name, {"stage": "calibrate"}) as child:
                child.log_params({"source": facts["source"], "fingerprint": stage.key})
                child.log_metrics({k: v for k, v in facts.items() if isinstance(v, int | float)})
            self.console.say(
                f"    {facts['source']}: {facts['documents']} documents, {facts['rows']} rows of "
                f"{facts['context_length']}, {facts['tokens_per_second']:.0f} tokens/s"
            )

    def _fan_out(self, work: Iterable[tuple[StageDir, Callable[..., Any], tuple[Any, ...]]]) -> None:
        """Run independent work as Ray tasks, as many at a time as there are CPUs (or GPUs, if learning has any)."""
        running = {}
        gpus = 1 if any(learn.gpu for learn in self.plan.config.learn.values()) else 0
        for stage, function, arguments in work:
            if not self._cached(stage):
                task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=1)(function)
                running[task.remote(stage, *arguments)] = stage
        total = len(running)
        while running:
            finished, _ = ray.wait(list(running), num_returns=1, timeout=5)
            for reference in finished:
                stage = running.pop(reference)
                _get(reference)
                self._note(stage, cached=False)
            self.console.live(f"  {total - len(running)}/{total} done")

    def _priors(self) -> None:
        config = self.plan.config
        rows = self.plan.corpora["calibration"][0]
        self._fan_out(
            (stage, prior.run, (method, sparsity, config.prior, config.model, rows, config.seed))
            for (method, sparsity), stage in self.plan.priors.items()
        )

    def _learn(self) -> None:
        waiting = [work for work in self.plan.learns if not self._cached(work.stage)]
        cpus = ray.cluster_resources().get("CPU", 1)
        running: list[_Learning] = []
        while waiting or running:
            while waiting:
                # Side by side as far as the CPUs go; on GPUs one at a time, each over all workers.
                used = sum(r.work.config.workers * r.work.config.threads for r in running)
                cost = waiting[0].config.workers * waiting[0].config.threads
                if running and (waiting[0].config.gpu or used + cost > cpus):
                    break
                running.append(_Learning(self.plan, waiting.pop(0), self.console, self._run))
            time.sleep(0.2)
            for learning in list(running):
                if learning.poll():
                    running.remove(learning)
                    self._note(learning.work.stage, cached=False)

    def _reconstruct(self) -> None:
        config = self.plan.config
        rows = self.plan.corpora["calibration"][0]
        self._fan_out(
            (
                work.stage,
                prior.reconstruct,
                (
                    work.learned.stage,
                    work.learned.sparsity,
                    work.learned.config.settings.scope,
                    config.prior,
                    config.model,
                    rows,
                    config.seed,
                ),
            )
            for work in self.plan.reconstructions
        )

    def _harden(self) -> None:
        config = self.plan.config
        self._fan_out(
            (v.export, harden.run, (config.model, v.method, v.sparsity, v.scope, v.made_by))
            for v in self.plan.variants
            if v.export
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
        for m in self.plan.measurements:
            if m.kind == "perplexity":
                rows = self.plan.corpora[m.subject][0]
                on_text = (config.model, m.variant.export, rows, config.evaluate.batch_rows)
                work.append((m.stage, evaluate.perplexity, on_text))
            else:
                on_task = (config.model, m.variant.export, m.spec, config.evaluate, config.seed)
                work.append((m.stage, evaluate.zero_shot, on_task))
        self._fan_out(work)


class _Learning:
    """One learning run in the background."""

    def __init__(self, plan: Plan, work: LearnWork, console: Console, run: Run) -> None:
        config = plan.config
        self.work = work
        settings = work.config.settings
        self._run = run.child(
            work.stage.name, {"stage": "learn", "method": work.name, "sparsity": f"{work.sparsity:g}"}
        )
        self._run.log_params(work.config.model_dump(mode="json") | {"sparsity": work.sparsity})
        self._board = Board.remote()  # type: ignore[attr-defined]
        self._progress = TrainingProgress(
            console,
            work.stage.item,
            settings.steps,
            settings.batch_rows * config.data.context_length,
            1 - work.sparsity,
        )
        self._console = console
        self._error: dict[str, Any] | None = None
        job = Job(
            stage=work.stage,
            model=config.model,
            learn=work.config,
            sparsity=work.sparsity,
            seed=config.seed,
            calibration=plan.corpora["calibration"][0],
            heldout=plan.corpora["heldout"][0],
            prior=work.prior,
            board=self._board,
        )
        found = Checkpoint.find(work.stage.uri_of("checkpoints"))
        if found:
            console.say(f"  {work.stage.name} continues at step {found.step}")
        self._began = time.time()
        books = str(Path(plan.directory).resolve() / "ray_train") if "://" not in plan.directory else plan.directory
        self._future = learn.fit.remote(job, books)

    def poll(self) -> bool:
        """Show what has happened; true when the run has ended well."""
        finished, _ = ray.wait([self._future], timeout=0)
        for event in ray.get(self._board.drain.remote()):
            if "error" in event:
                self._error = event
            elif "loss" in event:
                self._progress.show(event)
                self._run.log_metrics(numbers(event), step=int(event["step"]))
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
        with self.work.stage.work(keep=True) as (_, facts):
            facts["seconds"] = round(time.time() - self._began, 3)
        self._run.end()
        ray.kill(self._board)
        return True


def numbers(event: Mapping[str, Any]) -> dict[str, float]:
    """What a step measured, of what a training worker tells about it."""
    return {key: value for key, value in event.items() if key not in ("step", "run")}


def _get(reference: Any) -> Any:
    """The result of a Ray task; the user's errors come out as they went in."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        while isinstance(cause, ray.exceptions.RayTaskError):
            cause = cause.cause
        if isinstance(cause, (UserError, ValueError)):
            raise UserError(str(cause)) from error
        raise


def resources() -> dict[str, float]:
    """CPUs and GPUs of the cluster; before Ray runs, those of the cluster that it will start on this machine."""
    if ray.is_initialized():
        return ray.cluster_resources()
    # Two at least: the second is idle most of the time, but a single one could not place two workers.
    return {"CPU": max(2, os.cpu_count() or 1), "GPU": torch.cuda.device_count()}


def start_ray() -> None:
    """Connect to the cluster of a submitted job, else start one on this machine, for this run only."""
    for noisy in ("ray", "ray.data"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if "RAY_ADDRESS" in os.environ:
        ray.init(**quiet)
    else:
        # A run starts a dozen processes that mostly wait; Ray would warn of more than there are CPUs.
        os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "8")
        root = Path(__file__).resolve().parents[1]
        paths = [str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")]
        ray.init(
            num_cpus=int(resources()["CPU"]),
            include_dashboard=True,  # without it, a killed worker group is never cleaned up
            dashboard_host="127.0.0.1",
            runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, paths))}},
            **quiet,
        )
    # After ray.init, which sets a handler of its own: a terminated run ends like an interrupted one.
    signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt
