"""Optimisers of the mask logits, applied matrix by matrix as gradients come out of the backward pass.

No optimiser here needs more than one element's own history, so a slice of a flattened logit matrix has the same state
whatever the number of workers the matrix is cut for, and a gradient can be consumed as soon as it exists. The step that
all logits of a matrix make together (:class:`SharedSteps`) adds one number a matrix that the workers exchange.

Bytes per logit, parameter and state: ``adam`` 4 + 8, ``adam8bit`` 4 + 2, ``adam8bit-bf16`` 2 + 2. Where a step
accumulates several micro-batches, it holds one gradient per logit in the dtype of the logits besides.

``adam8bit`` packs both moments into 16 bits, see :mod:`leap_kernels.adam8bit`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from leap_kernels.adam8bit import EPS, NO_MOMENTS, AdamStep, adam8bit, chunks
from leap_kernels.add_stochastic import add_stochastic
from leap_kernels.shared_step import shared_step
from torch import Tensor, nn

from leap.settings import LearnSettings

# Halves of the layer number in the noise's counter that no layer of a model reaches.
_OF_STATE, _OF_SUM = 1 << 31, 1 << 30

State = dict[str, Tensor]


@dataclass(frozen=True)
class Place:
    """Identity of a slice of logits at one step, and the step that its whole matrix makes.

    Seed, layer, step and offset are the counter of the random rounding.
    """

    seed: int
    layer: int
    step: int
    """Optimiser step from 0."""
    offset: int = 0
    """Flat index of the slice's first element in the whole matrix."""
    shift: float | Tensor = 0.0
    """Subtracted from all logits of the matrix, besides their own step: a number, or a tensor [] on their device."""


class LogitOptimiser(Protocol):
    """Updates a flat slice [n] of logits in place."""

    dtype: torch.dtype
    """Number type of the logits."""
    parts: dict[str, tuple[torch.dtype, float]]
    """Number type and first value of each state tensor [n], by name."""

    def update(self, logits: Tensor, grad: Tensor, state: State, rate: float, place: Place) -> None:
        """One step on ``logits`` and ``state`` with ``grad``, each [n]."""


class Adam:
    """Adam with fp32 moments."""

    def __init__(self, betas: tuple[float, float]) -> None:
        self.betas, self.dtype = betas, torch.float32
        self.parts = {"exp_avg": (torch.float32, 0.0), "exp_avg_sq": (torch.float32, 0.0)}

    def update(self, logits: Tensor, grad: Tensor, state: State, rate: float, place: Place) -> None:
        """See :meth:`LogitOptimiser.update`."""
        beta1, beta2 = self.betas
        m, v = state["exp_avg"], state["exp_avg_sq"]
        m.lerp_(grad, 1 - beta1)
        v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        for part in chunks(logits):
            logits[part].sub_(_adam_step(m[part], v[part], rate, self.betas, place.step)).sub_(place.shift)


class Adam8bit:
    """Adam with both moments in 16 bits, :mod:`leap_kernels.adam8bit`.

    Args:
        betas: see :class:`leap_kernels.adam8bit.AdamStep`.
        dtype: of the logits, fp32 or bfloat16.
    """

    def __init__(self, betas: tuple[float, float], dtype: torch.dtype) -> None:
        self.betas, self.dtype = betas, dtype
        self.parts = {"moments": (torch.int16, float(NO_MOMENTS))}

    def update(self, logits: Tensor, grad: Tensor, state: State, rate: float, place: Place) -> None:
        """See :meth:`LogitOptimiser.update`."""
        layer = _OF_STATE | place.layer
        step = AdamStep(rate, self.betas, place.seed, layer, place.step, place.offset, place.shift)
        adam8bit(logits, grad, state["moments"], step)


class SharedSteps:
    """Adam on one number a matrix, the sum of its gradient: a step that all logits of the matrix make together.

    That is how sparsity moves between matrices. What the logits of a matrix have in common is a small part of the
    gradient of each, which elementwise Adam turns into steps of one size up and down.

    Args:
        rate: relative to the rate of the single logits.
        total: adds up a float64 scalar over the workers that hold slices of a matrix, on the device of the slices.
    """

    def __init__(
        self, rate: float, betas: tuple[float, float], total: Callable[[Tensor], Tensor] = lambda value: value
    ) -> None:
        self.rate, self.betas, self._total = rate, betas, total
        self.moments: dict[int, tuple[float, float] | Tensor] = {}
        """Adam's of each layer; on a GPU float64 [2] there, for which the backward pass need not wait."""

    def step(self, layer: int, grad: Tensor, rate: float, step: int) -> float | Tensor:
        """What the logits of a matrix move down by, from this worker's slice ``grad`` [n] of its gradient.

        Args:
            rate: of the single logits.
            step: optimiser step from 0.
        """
        if self.rate == 0:
            return 0.0
        if _is_waited_for(grad):
            total = self._total(grad.sum(dtype=torch.float64))
            return shared_step(total, self._moments_on(grad.device, layer), self.rate * rate, self.betas, step)
        g = float(self._total(grad.sum(dtype=torch.float32).double()))
        (beta1, beta2), (m, v) = self.betas, map(float, self.moments.get(layer, (0.0, 0.0)))
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        self.moments[layer] = m, v
        unbiased_m, unbiased_v = m / (1 - beta1 ** (step + 1)), v / (1 - beta2 ** (step + 1))
        return self.rate * rate * unbiased_m / (math.sqrt(unbiased_v) + EPS)

    def _moments_on(self, device: torch.device, layer: int) -> Tensor:
        known = self.moments.get(layer)
        if not isinstance(known, Tensor):
            # Filled on the device: a copy of numbers from the host would wait for it. A run that continues copies once.
            made = torch.zeros(2, dtype=torch.float64, device=device)
            known = self.moments[layer] = made if known is None else made.copy_(torch.tensor(known))
        return known


@dataclass(frozen=True)
class _Waiting:
    """A slice of logits whose whole gradient exists and waits for those of the other layers."""

    logits: Tensor
    grad: Tensor
    offset: int


class Updater:
    """Takes the gradients of one optimiser step as they come, and moves the logits with the last micro-batch's.

    Where gradients are clipped, no logits move before the gradients of all have come: :meth:`end` moves them.

    Args:
        settings: which optimiser, for all layers, and the seed of the stochastic rounding.
        total: see :class:`SharedSteps`.
    """

    def __init__(self, settings: LearnSettings, total: Callable[[Tensor], Tensor] = lambda value: value) -> None:
        self.optimiser, self.seed = logit_optimiser(settings), settings.seed
        shared = settings.matrix_rate / settings.learning_rate if settings.family.shares_sparsity else 0.0
        self.shared = SharedSteps(shared, settings.betas, total)
        self._clip, self._total = settings.clip, total
        self._waiting: dict[int, _Waiting] = {}
        self._states: dict[int, State] = {}
        self._sums: dict[int, Tensor] = {}
        self._step, self._draw, self._rate, self._last = 0, 0, 0.0, True

    def state(self, layer: int, like: Tensor) -> State:
        """State of the slice ``like`` [n] of a layer; made when first asked for."""
        if layer not in self._states:
            self._states[layer] = {
                name: torch.full(like.shape, value, dtype=dtype, device=like.device)
                for name, (dtype, value) in self.optimiser.parts.items()
            }
        return self._states[layer]

    def attach(self, parameters: Iterable[nn.Parameter]) -> None:
        """Register a hook on each logit tensor, in the layout's order, that takes its gradient out of a backward pass.

        The gradient goes to :meth:`take` as soon as it is complete, and ``parameter.grad`` is None afterwards.
        """
        for layer, parameter in enumerate(parameters):
            parameter.register_post_accumulate_grad_hook(partial(self._take_whole, layer))

    def _take_whole(self, layer: int, parameter: Tensor) -> None:
        grad, parameter.grad = parameter.grad, None
        assert grad is not None
        self.take(layer, parameter.detach().view(-1), grad.view(-1))

    def begin(self, step: int, rate: float, microbatch: int, microbatches: int) -> None:
        """Say, before its backward pass, which of the step's micro-batches (of this worker) is next."""
        self._step, self._rate = step, rate
        self._draw = step * microbatches + microbatch
        self._last = microbatch == microbatches - 1

    def take(self, layer: int, logits: Tensor, grad: Tensor, offset: int = 0) -> None:
        """Add the gradient [n] of one micro-batch; on the last one, update the flat slice ``logits`` [n].

        ``grad`` is the updater's from then on.
        """
        if layer in self._sums:
            grad = self._add(self._sums.pop(layer), grad, layer, offset)
        if not self._last:
            self._sums[layer] = grad
        elif self._clip:
            self._waiting[layer] = _Waiting(logits, grad, offset)
        else:
            self._move(layer, logits, grad, offset)

    def end(self) -> None:
        """Collective: say, after its backward pass, that the micro-batch is through.

        With the last one of a step, gradients that waited are clipped: multiplied by min(1, clip / (‖g‖ + 1e-6)), g all
        gradients of all workers' slices together, as ``torch.nn.utils.clip_grad_norm_`` does.
        """
        if not self._waiting:
            return
        squares = [w.grad.square().sum(dtype=torch.float64) for w in self._waiting.values()]
        norm = self._total(torch.stack([s.to(squares[0].device) for s in squares]).sum()).sqrt()
        factor = (self._clip / (norm + 1e-6)).clamp(max=1.0).float()
        for layer in list(self._waiting):
            waiting = self._waiting.pop(layer)
            self._move(layer, waiting.logits, waiting.grad.mul_(factor.to(waiting.grad.device)), waiting.offset)

    def _move(self, layer: int, logits: Tensor, grad: Tensor, offset: int) -> None:
        shift = self.shared.step(layer, grad, self._rate, self._step)
        place = Place(self.seed, layer, self._step, offset, shift)
        self.optimiser.update(logits, grad, self.state(layer, logits), self._rate, place)

    def _add(self, total: Tensor, grad: Tensor, layer: int, offset: int) -> Tensor:
        if total.dtype == torch.float32:
            return total.add_(grad)
        add_stochastic(total, grad, seed=self.seed, layer=_OF_SUM | layer, step=self._draw, offset=offset)
        return total


def logit_optimiser(settings: LearnSettings) -> LogitOptimiser:
    """The optimiser that ``settings.optimiser`` names."""
    if settings.optimiser == "adam":
        return Adam(settings.betas)
    return Adam8bit(settings.betas, torch.bfloat16 if settings.optimiser == "adam8bit-bf16" else torch.float32)


def _adam_step(m: Tensor, v: Tensor, rate: float, betas: tuple[float, float], step: int) -> Tensor:
    """rate · m̂ / (√v̂ + ε), the hats for bias-corrected."""
    correction1, correction2 = (1 - beta ** (step + 1) for beta in betas)
    return m / v.sqrt().div_(math.sqrt(correction2)).add_(EPS) * (rate / correction1)


def _is_waited_for(tensor: Tensor) -> bool:
    """Whether the processor would stand still until a number from this tensor's device has arrived."""
    return tensor.is_cuda
