"""The objective of mask learning and what has to be done around each optimiser step.

The learner knows nothing of how gradients are computed, reduced or applied: that is the business of its engine
(:mod:`leap.engine`), and of the loop that drives both (:mod:`leap.loop`).

    total = (1 − d)·CE + d·KL(dense ‖ masked) + h·(distance of hidden states) + density term
            − λ2·(1 − t/T)·Σ‖M⊙W‖_F / Σ‖W‖_F

With gap = density(M) − target, the density term is λ1·|gap| (docs/method.md, section 1), or λ·gap + c/2·gap² with
λ += c·gap / (relaxation·T) after each of the T steps (docs/method.md, section 2).

With several target densities, each step trains one of them. A cycle visits every density once, in a new random order.
The gates of a density open where the logits exceed the cut that would leave this density. Each density has its own λ,
which integrates over its share of the T steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from leap.engine import Engine
from leap.gates import Draw, Hardener, Mode
from leap.hidden import hidden_divergence
from leap.losses import output_losses
from leap.settings import LearnSettings
from leap.surgery import NotRunError


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite."""


class MaskLearner:
    """Losses, metrics and the density controller of one run.

    Args:
        engine: computes with the masked model.
        densities: the shares of weights to keep; with more than one, the logits serve them all.
    """

    def __init__(self, engine: Engine, settings: LearnSettings, densities: Sequence[float]) -> None:
        assert densities
        self.engine, self.settings, self.densities = engine, settings, tuple(densities)
        self.multipliers = [0.0] * len(densities)
        """λ of each density."""
        self._offset, self._offset_step = 0.0, -1
        self._names: list[str] = []
        self._sums: Tensor | None = None  # float64, in the order of _names
        self._count = 0

    def draw(self, step: int, microbatch: int) -> Draw:
        """Noise and schedules of micro-batch ``microbatch`` (counted over all workers) of optimiser step ``step``."""
        s = self.settings
        return self.engine.state.gate.draw(step / max(1, s.steps - 1), s.seed, step * s.microbatches + microbatch)

    def hardener(self, sparsity: float, exact: bool = False) -> Hardener:
        """The hardener of the logits as they are; collective. ``exact`` wants them whole in this process."""
        engine = self.engine
        state = engine.state
        return state.gate.hardener(state.layout, engine.local_logits, sparsity, engine.reduce, exact)

    def target(self, step: int) -> int:
        """Number of the density that ``step`` trains."""
        number = len(self.densities)
        turn, place = divmod(step, number)
        seed = (self.settings.seed * 1_000_003 + turn) % 2**63
        return int(torch.randperm(number, generator=torch.Generator().manual_seed(seed))[place])

    def _offset_of(self, step: int) -> float:
        """Where the gates of the step's density open; the logits rest during a step, so it is looked for once."""
        if len(self.densities) > 1 and step != self._offset_step:
            self._offset = self.hardener(1 - self.densities[self.target(step)]).offset
            self._offset_step = step
        return self._offset

    def loss(self, rows: Tensor, step: int, microbatch: int) -> Tensor:
        """The total loss of one micro-batch, rows [R, S], with its graph.

        Run its backward pass before anything else goes through the model: with activation checkpointing, that draws
        masks once more from the shared state.

        Raises:
            NotRunError: a masked layer did not run exactly once; the tokens decide that where a model routes them.
            RuntimeError: a layer ran under reentrant activation checkpointing.
        """
        s, state, weights = self.settings, self.engine.state, self.engine.weights
        target = self.target(step)
        teacher: Tensor | None = None
        teacher_states: Sequence[Tensor] = ()
        if s.distillation > 0 or s.hidden_distillation > 0:
            state.mode = "dense"
            with torch.no_grad():
                teacher, teacher_states = self._outputs(rows)
        draw = replace(self.draw(step, microbatch), offset=self._offset_of(step))
        state.mode, state.draw = "sampled", draw
        logits, states, sums = self._collect(rows)
        sampled = sums[:, 0].sum() / weights.numel
        # Without noise the mask is no sample of anything: it is its own expectation.
        expected = sums[:, 2].sum() / weights.numel if draw.noise else sampled
        gap = (sampled if s.density.of == "sampled" else expected) - self.densities[target]
        density_term = self._density_term(gap, target)
        norm = state.gate.norm(sums[:, 1], weights.norm)
        fading = 1 - step / s.steps

        lm_loss, divergence = output_losses(logits, rows, teacher if s.distillation > 0 else None)
        task = lm_loss
        parts = {"lm_loss": lm_loss, "density": sampled, "expected_density": expected, "gap": gap, "norm": norm}
        if divergence is not None:
            parts["divergence"] = divergence
            task = (1 - s.distillation) * lm_loss + s.distillation * divergence
        if s.hidden_distillation > 0:
            parts["hidden_divergence"] = hidden_divergence(states, teacher_states)
            task = task + s.hidden_distillation * parts["hidden_divergence"].to(task)
        total = task + (density_term - s.weight_reward * fading * norm).to(task)
        self._note({**parts, "loss": total})
        return total

    def _density_term(self, gap: Tensor, target: int) -> Tensor:
        s = self.settings
        if s.family.fixed_density:
            return torch.zeros_like(gap)
        if s.density.kind == "penalty":
            return s.density.weight * gap.abs()
        return self.multipliers[target] * gap + s.density.weight / 2 * gap.square()

    def _outputs(self, rows: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """Logits [R, S, V], and the hidden states where they are distilled."""
        if self.settings.hidden_distillation > 0:
            return self.engine.hidden_forward(rows)
        return self.engine.forward(rows), ()

    def _collect(self, rows: Tensor) -> tuple[Tensor, Sequence[Tensor], Tensor]:
        """Outputs of a sampled forward pass and the sums over the masks, float64 [layers, 3]."""
        state = self.engine.state
        state.stats.clear()
        state.collecting = True
        try:
            logits, states = self._outputs(rows)
        finally:
            state.collecting = False  # recomputed activations must not add to the sums
        stats = [t.to(logits.device) for t in state.stats]
        state.stats.clear()
        layers = len(state.layout.matrices)
        if len(stats) != layers:
            raise NotRunError(
                f"{layers} layers are masked, but {len(stats)} ran in a forward pass; the density of a model "
                "that leaves layers out or runs them twice cannot be controlled"
            )
        sums = torch.stack(stats)
        if torch.is_grad_enabled() and not sums.requires_grad:
            raise RuntimeError("the masks have no gradient; use activation checkpointing with use_reentrant=False")
        return logits, states, sums

    def _note(self, parts: dict[str, Tensor]) -> None:
        values = torch.stack([value.detach().to(parts["loss"].device, torch.float64) for value in parts.values()])
        self._names = list(parts)
        self._sums = values if self._sums is None else self._sums + values
        self._count += 1

    def finish_step(self, step: int) -> dict[str, float]:
        """Means over the micro-batches and workers of the step; moves the multiplier.

        Raises:
            NonFiniteLossError: the loss of any worker is NaN or infinite. Call it before the backward pass
                that moves the logits.
        """
        s = self.settings
        assert self._sums is not None
        means = self._mean(self._sums / self._count)
        metrics = dict(zip(self._names, means.tolist(), strict=True))
        self._sums, self._count = None, 0
        if not math.isfinite(metrics["loss"]):
            raise NonFiniteLossError(f"the loss is {metrics['loss']} at step {step}")
        gap = metrics.pop("gap")
        if s.density.kind == "lagrangian" and not s.family.fixed_density:
            target = self.target(step)
            self.multipliers[target] += s.density.weight * gap / (s.density.relaxation * s.steps / len(self.densities))
            metrics["multiplier"] = self.multipliers[target]
        if len(self.densities) > 1:
            metrics["target_density"] = self.densities[self.target(step)]
        draw = self.draw(step, 0)
        return metrics | {"temperature": draw.temperature, "scale": draw.scale}

    @torch.no_grad()
    def mask_losses(self, batches: list[Tensor], step: int, hardener: Hardener) -> dict[str, float]:
        """Cross-entropy in nats with the sampled, the mean and the hard mask over ``batches`` of rows [R, S]."""
        draw = self.draw(step, 0)
        if len(self.densities) > 1:
            draw = replace(draw, offset=hardener.offset)
        state = self.engine.state
        state.draw, state.harden = draw, hardener
        losses = {}
        modes: tuple[Mode, ...] = ("sampled", "mean", "hard")
        for mode in modes:
            state.mode = mode
            values = [float(output_losses(self.engine.forward(rows), rows)[0]) for rows in batches]
            losses[mode] = sum(values) / len(values)
        means = self._mean(torch.tensor(list(losses.values()), dtype=torch.float64))
        return dict(zip(losses, means.tolist(), strict=True))

    def _mean(self, values: Tensor) -> Tensor:
        """Mean over all processes, on the CPU."""
        return self.engine.reduce(values) / self.engine.world
