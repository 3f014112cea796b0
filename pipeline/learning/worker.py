"""What every Ray Train worker runs to learn masks."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import ray.train
import torch
import torch.distributed as dist
from torch import Tensor

from leap.gates import Matrix, PriorMask
from leap.learner import MaskLearner, NonFiniteLossError
from leap.loop import learn
from pipeline.artifacts.store import StageDir
from pipeline.config import LearnConfig, ModelConfig
from pipeline.learning.memory import give_back_large_blocks

if TYPE_CHECKING:
    from pipeline.artifacts.logit_checkpoint import Checkpoint
    from pipeline.artifacts.packed_rows import PackedRows


@dataclass(frozen=True)
class Job:
    """All that a worker needs to know."""

    stage: StageDir
    model: ModelConfig
    learn: LearnConfig
    sparsities: tuple[float, ...]
    """Shares of the weights to remove; several for a nested run."""
    seed: int
    calibration: StageDir
    heldout: StageDir
    prior: StageDir
    board: Any
    """Actor that takes the events of the run, see :class:`pipeline.learning.board.Board`."""

    @property
    def own_seed(self) -> int:
        """Of first logits and of the order of the rows: another for each seed of the run and of the settings."""
        return self.seed * 1009 + self.learn.settings.seed


def train_loop(config: dict[str, Any]) -> None:
    """Entry point of a worker; ``config["job"]`` is a :class:`Job`."""
    job: Job = config["job"]
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if job.learn.gpu else "cpu")
    torch.set_num_threads(job.learn.threads)
    give_back_large_blocks(job.learn.settings)
    torch.set_flush_denormal(True)  # in softmax and activations; the kernels see to their own
    join_processes("nccl" if job.learn.gpu else "gloo")
    _Worker(job).run()


def join_processes(backend: str) -> None:
    """DeepSpeed's process group, from ``MASTER_ADDR``, ``RANK`` and ``WORLD_SIZE``."""
    # Not at the top: deepspeed probes the machine when it is imported.
    import deepspeed

    # None of its operations compiled for this machine. On a CPU it would build one for inference, under a lock file
    # that an interrupted build leaves behind and every later process waits for without end.
    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(backend)


class _Worker:
    def __init__(self, job: Job) -> None:
        from pipeline.artifacts.logit_checkpoint import FOLDER
        from pipeline.artifacts.packed_rows import PackedRows
        from pipeline.artifacts.prior_files import PriorArtifact
        from pipeline.learning.zero import ZeroModel

        self.job, self.settings = job, job.learn.settings
        self.rank = dist.get_rank()
        self.uri = job.stage.uri_of(FOLDER)
        self.sent: list[Any] = []
        resumed = self._resume()
        prior, gate = PriorArtifact(job.prior.path()), self.settings.family.gate()

        def initial(number: int, name: str, readers: Sequence[Matrix]) -> Tensor:
            if resumed:
                return resumed.logits(name)
            seed = (job.own_seed * 1_000_003 + number) % 2**63
            device = torch.device("cuda" if job.learn.gpu else "cpu")
            priors = [PriorMask(m, *(tensor.to(device) for tensor in prior.layer(m.name))) for m in readers]
            return gate.initial(name, priors, torch.Generator(device).manual_seed(seed))

        over_prior = self.settings.weights == "prior"
        self.zero = ZeroModel(job.model, job.learn, gate, initial, prior.new_weight if over_prior else None)
        self.learner = MaskLearner(self.zero, self.settings, [1 - sparsity for sparsity in job.sparsities])
        self.rows = PackedRows(job.calibration.path(), shuffle=job.own_seed)
        self.heldout = PackedRows(job.heldout.path())
        self.history: list[dict[str, float]] = []
        self.first_step = 0
        if resumed:
            self.zero.restore(resumed)
            self.learner.multipliers = resumed.facts["multipliers"]
            self.history = resumed.facts["history"]
            self.first_step = resumed.step

    def _resume(self) -> Checkpoint | None:
        """Collective: the newest whole checkpoint, which the first worker looks for."""
        from pipeline.artifacts.logit_checkpoint import Checkpoint, resume

        found: list[Any] = [None]
        resumed = None
        if self.rank == 0:
            resumed, damaged = resume(self.uri)
            found = [resumed.name if resumed else None]
            for error in damaged:
                after = f"step {resumed.step}" if resumed else "the start"
                self._tell({"warning": f"{error.what}; learning continues from {after}"})
        dist.broadcast_object_list(found)
        return Checkpoint(self.uri, found[0]) if found[0] and resumed is None else resumed

    def run(self) -> None:
        self._began = time.perf_counter()
        try:
            learn(self.learner, partial(self._take, self.rows), self._after_step, self.first_step)
        except NonFiniteLossError as error:  # the same on every rank, and no use to try again
            self._tell({"error": str(error), "last_checkpoint": self._last_checkpoint()})
        # Events are sent without waiting, and a process that ends takes along what is still under way.
        ray.get(self.sent)

    def _take(self, rows: PackedRows, first: int, count: int) -> Tensor:
        return torch.from_numpy(rows.take(first, count)).to(self.zero.engine.device)

    def _after_step(self, metrics: dict[str, float]) -> None:
        """Watch the masks, tell of the step and write a checkpoint, each when it is due."""
        learn, step = self.job.learn, int(metrics["step"])
        metrics["seconds"] = time.perf_counter() - self._began
        last = step == self.settings.steps - 1
        if step % learn.watch_every == 0 or last:
            metrics |= {f"mask_loss.{k}": v for k, v in self._watch(step).items()}
        self.history.append(metrics)
        self._tell(metrics)
        if (step + 1) % learn.checkpoint_every == 0 or last:
            self._save(step + 1)
        if "mask_loss.hard" in metrics:
            ray.train.report(metrics)
        self._began = time.perf_counter()

    def _watch(self, step: int) -> dict[str, float]:
        """Sampled, mean and hard mask on held-out rows. A forward pass is collective: all ranks do as many."""
        size = self.settings.microbatch_rows
        batches = max(1, self.job.learn.watch_rows // (size * self.zero.world))
        mine = range(self.rank * batches * size, (self.rank + 1) * batches * size, size)
        rows = [self._take(self.heldout, first, size) for first in mine]
        losses = {s: self.learner.mask_losses(rows, step, self.learner.hardener(s)) for s in self.job.sparsities}
        if len(losses) == 1:
            return losses[self.job.sparsities[0]]
        modes = losses[self.job.sparsities[0]]
        means = {mode: sum(found[mode] for found in losses.values()) / len(losses) for mode in modes}
        return means | {f"{mode}-{s:g}": found[mode] for s, found in losses.items() for mode in modes}

    def _save(self, step: int) -> None:
        from pipeline.artifacts import logit_checkpoint

        facts = {"multipliers": self.learner.multipliers, "history": self.history, **self.zero.facts()}
        logit_checkpoint.save(self.uri, step, facts, self.zero.shard(), self.zero.shapes())
        self._tell({"checkpoint": step})

    def _last_checkpoint(self) -> int:
        from pipeline.artifacts.logit_checkpoint import Checkpoint

        found = Checkpoint.find(self.uri)
        return found.step if found else 0

    def _tell(self, event: dict[str, Any]) -> None:
        if self.rank == 0:
            # They arrive in order: who waits for the last has waited for all.
            self.sent = [self.job.board.push.remote(event | {"run": self.job.stage.key})]
