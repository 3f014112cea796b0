"""Mask learning, and what its workers take."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from torch import nn

from leap.export import Pruned
from leap.optimisers import logit_optimiser
from pipeline.artifacts.checksums import FILES
from pipeline.artifacts.learned_masks import learned_masks
from pipeline.artifacts.logit_checkpoint import FOLDER, Checkpoint
from pipeline.config import Dtype, LearnConfig
from pipeline.learning.board import here, start_board
from pipeline.learning.trainer import fit
from pipeline.learning.worker import Job
from pipeline.model.sizes import Sizes
from pipeline.stages.calibrate import Calibrate
from pipeline.stages.cost import GPU_SPEED, Cost, Machine
from pipeline.stages.prior import Prior
from pipeline.stages.source import MaskSource, variant_name
from pipeline.stages.stage import PinnedModel, Place

#: Seconds that starting a group of workers takes.
WORKER_START = 12.0
#: Settings of a learning run that do not change what it learns.
_FREE = {
    "like",
    "published",
    "seeds",
    "workers",
    "threads",
    "gpu",
    "activation_checkpointing",
    "checkpoint_every",
    "max_failures",
}


class TrainingError(Exception):
    """Training stopped for a reason that trying again will not mend."""


@dataclass(frozen=True, eq=False)
class Learn(MaskSource[Checkpoint]):
    """The logits of one learning run."""

    KIND = PHASE = "learn"
    VERSION = 3
    PLACE = Place.TRAINING
    ORIGIN = "learned"

    model: PinnedModel
    entry: str
    """Of ``learn`` in the recipe."""
    config: LearnConfig
    shown_seed: int | None
    """Where there are runs that differ in nothing but the seed."""
    sparsities: tuple[float, ...]
    """Several for a nested run."""
    seed: int
    """Of the whole run; that of the settings comes on top."""
    prior: Prior
    calibration: Calibrate
    heldout: Calibrate

    @property
    def item(self) -> str:
        return variant_name(self.entry, self.shown_seed, None if self.nested else self.sparsities[0])

    @property
    def nested(self) -> bool:
        return len(self.sparsities) > 1

    @property
    def scope(self) -> str:
        return self.config.settings.family.scope_name

    @property
    def pattern(self) -> str:
        return self.config.settings.family.pattern_name

    @property
    def learned(self) -> Learn:
        return self

    def inputs(self) -> list[object]:
        decisive = self.config.model_dump(mode="json", exclude=_FREE)
        made_from = [self.prior.key, self.calibration.key, self.heldout.key]
        return [self.model.key, decisive, self.sparsities, self.seed, *made_from]

    @property
    def cpus(self) -> int:
        """CPUs of all workers, where they have no GPU each."""
        return self.config.workers * self.config.threads

    @property
    def tokens(self) -> int:
        """Tokens that the mask is learned from."""
        return training_tokens(self.config, self.calibration.data.context_length)

    def cost(self, sizes: Sizes, machine: Machine) -> Cost:
        length = self.calibration.data.context_length
        return Cost(
            seconds=learn_seconds(self.config, length, sizes, machine.cpu),
            # Two checkpoints that are kept and the one being written, of fp32 logits and at most Adam's fp32 moments.
            disk=3.0 * 12 * sizes.layout(self.config.settings.family).numel,
            memory=worker_memory(self.config, self.model.config.dtype, length, sizes),
        )

    def job(self, board: Any) -> Job:
        """What its workers are told.

        Args:
            board: of :func:`start_board`, which they tell of each step.
        """
        return Job(
            stage=self.directory,
            model=self.model.config,
            learn=self.config,
            sparsities=self.sparsities,
            seed=self.seed,
            calibration=self.calibration.directory,
            heldout=self.heldout.directory,
            prior=self.prior.directory,
            board=board,
        )

    def start(self, board: Any) -> Any:
        """Start the workers, which continue from the last checkpoint. Returns Ray's reference to their end."""
        books = self.store if "://" in self.store else str(Path(self.store) / "ray_train")
        return fit.options(scheduling_strategy=here()).remote(self.job(board), books)

    def run(self) -> None:
        """Learn without telling anyone how it goes."""
        board = start_board()
        began = time.time()
        ray.get(self.start(board))
        self.finish(time.time() - began, ray.get(board.error.remote(self.key)))

    def finish(self, seconds: float, error: str | None) -> None:
        """Say that the run is finished.

        Args:
            error: what its workers stopped for.

        Raises:
            TrainingError: they did.
        """
        if error:
            last = Checkpoint.find(self.directory.uri_of(FOLDER))
            raise TrainingError(
                f"{self.name}: {error}; the checkpoint of step {last.step if last else 0} is kept in "
                f"{self.directory.uri_of(FOLDER)}. Lower learn.{self.entry}.settings.learning_rate or check the "
                "calibration text"
            )
        saved = self.read()
        with self.directory.work(keep=True) as (_, facts):
            facts |= {"seconds": round(seconds, 3), FILES: saved.files()}

    def read(self) -> Checkpoint:
        return Checkpoint(self.directory.uri_of(FOLDER))

    def history(self) -> list[dict[str, Any]]:
        """What was measured in each step."""
        history: list[dict[str, Any]] = self.read().facts["history"]
        return history

    def pruned(self, linears: Mapping[str, nn.Linear], sparsity: float) -> tuple[Pruned, bool]:
        masks = learned_masks(self.read(), linears, sparsity, self.config.settings.family)
        if self.config.settings.weights != "prior":
            return (lambda _, name: (masks(name), None)), False
        prior = self.prior.read()
        return (lambda _, name: (masks(name), prior.new_weight(name, linears[name].weight))), True

    def seconds(self) -> float:
        # Its steps: what a restart or the start-up of workers took does not count.
        return round(sum(step["seconds"] for step in self.history()), 1)


def training_tokens(learn: LearnConfig, context_length: int) -> int:
    """Tokens of one learning run."""
    return learn.settings.steps * learn.settings.batch_rows * context_length


def learn_seconds(learn: LearnConfig, context_length: int, sizes: Sizes, cpu: float) -> float:
    """One learning run, with the measurements on held-out text.

    Args:
        cpu: operations a second of one CPU.
    """
    settings = learn.settings
    a_token = 4 * sizes.linear + 2 * sizes.prunable
    a_token += (
        2
        * sizes.linear
        * (bool(settings.distillation or settings.hidden_distillation) + learn.activation_checkpointing)
    )
    watched = 3 * (settings.steps // learn.watch_every + 1) * learn.watch_rows * context_length
    operations = a_token * training_tokens(learn, context_length) + 2 * sizes.linear * watched
    return WORKER_START + operations / (learn.workers * (GPU_SPEED if learn.gpu else cpu))


def worker_memory(learn: LearnConfig, dtype: Dtype, context_length: int, sizes: Sizes) -> dict[str, float]:
    """Bytes of one worker by what they are for. What an allocator keeps beyond that is not counted."""
    settings, optimiser = learn.settings, logit_optimiser(learn.settings)
    width, logit = getattr(torch, dtype).itemsize, optimiser.dtype.itemsize
    state = sum(dtype.itemsize for dtype, _ in optimiser.parts.values())
    layout = sizes.layout(settings.family)
    # Of a masked layer the weight, the weight under the mask, the logits and their gradient.
    largest = max(2 * (m.shape.numel() * width + layout.logits_of(m) * logit) for m in layout.matrices)
    frozen = sizes.parameters + (sizes.prunable if settings.weights == "prior" else 0)
    accumulated = logit if settings.microbatches > learn.workers or settings.clip else 0
    tokens = settings.microbatch_rows * context_length
    # Within a block: inputs and outputs of the linear layers, and in fp32 what two norms keep, three times the width.
    blocks = tokens * (width * sizes.wires + 24 * sizes.states)
    if learn.activation_checkpointing:
        # What enters each block, and the inside of one at a time.
        blocks = tokens * width * sizes.states + blocks / sizes.blocks
    # Logits and their gradient, and a teacher's logits.
    copies = 3 if settings.distillation else 2
    return {
        f"weights, {dtype}, frozen": frozen * width / learn.workers,
        f"mask logits and {settings.optimiser}": layout.numel * (logit + state) / learn.workers,
        "gradient held to the end of a step": layout.numel * accumulated / learn.workers,
        "largest layer, gathered": float(max(sizes.largest * width, largest)),
        "activations of a micro-batch": float(blocks),
        "output of a micro-batch": float(width * copies * tokens * sizes.vocabulary),
    }
