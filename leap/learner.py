"""The objective of mask learning and what has to be done around each optimiser step.

The learner knows nothing of how gradients are computed, reduced or applied: a plain loop (:mod:`leap.api`) and the
DeepSpeed worker of the pipeline drive the same object.

    total = (1 − d)·CE + d·KL(dense ‖ masked) + density term − λ2·(1 − t/T)·Σ‖M⊙W‖_F / Σ‖W‖_F
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leap.gates import Draw, GateState, Mode
from leap.harden import Hardener
from leap.settings import LearnSettings


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite."""


@dataclass(frozen=True)
class MaskedWeights:
    """Totals over all masked weights that the objective is relative to."""

    numel: int
    norm: float
    """Σ over layers of ‖W‖_F."""


def cross_entropy(logits: Tensor, rows: Tensor) -> Tensor:
    """Mean next-token cross-entropy in nats. ``logits`` [R, S, V], ``rows`` [R, S]."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), rows[:, 1:].flatten())


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean KL(teacher ‖ student) per position in nats, from logits [R, S, V]."""
    target = F.log_softmax(teacher.flatten(0, 1).float(), dim=-1)
    return F.kl_div(F.log_softmax(student.flatten(0, 1).float(), dim=-1), target, log_target=True, reduction="batchmean")


class MaskLearner:
    """Losses, metrics and the density controller of one run.

    Args:
        forward: maps rows [R, S] to logits [R, S, V] through the model that ``state`` belongs to.
        density: the share of weights to keep.
        reduce: mean of a float64 tensor over all workers.
    """

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        state: GateState,
        weights: MaskedWeights,
        settings: LearnSettings,
        density: float,
        reduce: Callable[[Tensor], Tensor] = lambda t: t,
    ) -> None:
        self.forward, self.state, self.weights = forward, state, weights
        self.settings, self.density, self.reduce = settings, density, reduce
        self.multiplier = 0.0
        self._sums: dict[str, float] = {}
        self._count = 0

    def draw(self, step: int, microbatch: int) -> Draw:
        """The noise and schedules of micro-batch ``microbatch`` (counted over all workers) of optimiser step ``step``."""
        s = self.settings
        progress = step / max(1, s.steps - 1)
        index = step * (s.batch_rows // s.microbatch_rows) + microbatch
        return Draw(s.scale.at(progress), s.temperature.at(progress), s.noise, s.seed, index)

    def loss(self, rows: Tensor, step: int, microbatch: int) -> Tensor:
        """The total loss of one micro-batch, rows [R, S], with its graph."""
        s, state = self.settings, self.state
        teacher = None
        if s.distillation > 0:
            state.mode = "dense"
            with torch.no_grad():
                teacher = self.forward(rows)
        state.mode, state.draw = "sampled", self.draw(step, microbatch)
        state.stats.clear()
        state.collecting = True
        logits = self.forward(rows)
        state.collecting = False  # recomputed activations must not add to the sums

        device = state.stats[0].device
        sums = torch.stack([t.to(device) for t in state.stats])  # [layers, 3]
        state.stats.clear()
        sampled, expected = sums[:, 0].sum() / self.weights.numel, sums[:, 2].sum() / self.weights.numel
        gap = (sampled if s.density.of == "sampled" else expected) - self.density
        if s.density.kind == "penalty":
            density_term = s.density.weight * gap.abs()
        else:
            density_term = self.multiplier * gap + s.density.weight / 2 * gap.square()
        norm = sums[:, 1].clamp_min(torch.finfo(sums.dtype).tiny).sqrt().sum() / self.weights.norm
        fading = 1 - step / s.steps

        lm_loss = cross_entropy(logits, rows)
        task = lm_loss
        parts = {"lm_loss": lm_loss, "density": sampled, "expected_density": expected, "gap": gap, "norm": norm}
        if teacher is not None:
            parts["divergence"] = divergence(teacher, logits)
            task = (1 - s.distillation) * lm_loss + s.distillation * parts["divergence"]
        total = task + (density_term - s.weight_reward * fading * norm).to(task.dtype)
        for name, value in {**parts, "loss": total}.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value.detach())
        self._count += 1
        return total

    def finish_step(self, step: int) -> dict[str, float]:
        """Means over the micro-batches and workers of the step; moves the multiplier.

        Raises:
            NonFiniteLossError: the loss of any worker is NaN or infinite. Call it before the optimiser's step.
        """
        s = self.settings
        names = list(self._sums)
        means = self.reduce(torch.tensor([self._sums[n] for n in names], dtype=torch.float64) / self._count)
        metrics = dict(zip(names, means.tolist(), strict=True))
        self._sums, self._count = {}, 0
        if not math.isfinite(metrics["loss"]):
            raise NonFiniteLossError(f"the loss is {metrics['loss']} at step {step}")
        gap = metrics.pop("gap")
        if s.density.kind == "lagrangian":
            self.multiplier += s.density.weight * gap / (s.density.relaxation * s.steps)
            metrics["multiplier"] = self.multiplier
        draw = self.draw(step, 0)
        return metrics | {"temperature": draw.temperature, "scale": draw.scale}

    @torch.no_grad()
    def mask_losses(self, batches: list[Tensor], step: int, hardener: Hardener) -> dict[str, float]:
        """Cross-entropy in nats with the sampled, the mean and the hard mask over ``batches`` of rows [R, S]."""
        self.state.draw, self.state.harden = self.draw(step, 0), hardener
        losses = {}
        modes: tuple[Mode, ...] = ("sampled", "mean", "hard")
        for mode in modes:
            self.state.mode = mode
            values = [float(cross_entropy(self.forward(rows), rows)) for rows in batches]
            losses[mode] = sum(values) / len(values)
        means = self.reduce(torch.tensor(list(losses.values()), dtype=torch.float64))
        return dict(zip(losses, means.tolist(), strict=True))


def weight_norms(layers: dict[str, nn.Linear]) -> MaskedWeights:
    """Totals over ``layers`` whose weights are whole in this process."""
    norm = sum(float(torch.linalg.vector_norm(layer.weight.detach().float())) for layer in layers.values())
    return MaskedWeights(sum(layer.weight.numel() for layer in layers.values()), norm)
