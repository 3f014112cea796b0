"""Optimisers of the mask logits, applied matrix by matrix as gradients come out of the backward pass.

No optimiser here needs more than one element's own history, so a slice of a flattened logit matrix has the same state
whatever the number of workers the matrix is cut for, and a gradient can be consumed as soon as it exists.

Bytes per logit, parameter and state: ``adam`` 4 + 8, ``adam8bit`` 4 + 2, ``adam8bit-bf16`` 2 + 2. Where a step
accumulates several micro-batches, it holds one gradient per logit in the dtype of the logits besides.

``adam8bit`` packs both moments of Adam (Kingma and Ba, arXiv 1412.6980) into 16 bits:

- v is stored on a geometric grid, 10 bits at 12 values an octave from 2**-68 to 2**17, and 0;
- m is stored as a multiple of √v, which bounds it: by Cauchy and Schwarz
  |m| ≤ (1 − β1) / √((1 − β2)(1 − β1²/β2)) · √v. 6 bits divide that range evenly, so what an update can be wrong by is
  the same share of the learning rate for every logit, however small its gradient.

The block-wise format of Dettmers et al. (arXiv 2110.02861) costs as much and ties state to where blocks begin. Rounding
is stochastic, with the counter-based generator of the masks' noise: with nearest values, decay by less than half a grid
step would never take place, neither would updates of bfloat16 logits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from leap_kernels.mask_ops import random_words
from torch import Tensor, nn

from leap.settings import LearnSettings

_EPS = 1e-8  # added to √v, as in the paper
_FLOOR = 2.0**-68  # smallest v above 0
_PER_OCTAVE = 12
_RATIO = 2 ** (1 / _PER_OCTAVE)
_V_MAX, _U_MAX = 1023, 31
_NO_MOMENTS = (_U_MAX + 1) - (1 << 15)  # v = 0, m = 0
# Halves of the layer number in the noise's counter that no layer of a model reaches.
_OF_STATE, _OF_SUM = 1 << 31, 1 << 30

State = dict[str, Tensor]


@dataclass(frozen=True)
class Place:
    """Where a slice of logits comes from, and when: the counter of what is rounded at random."""

    seed: int
    layer: int
    step: int
    """Optimiser step from 0."""
    offset: int = 0
    """Flat index of the slice's first element in the whole matrix."""


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
        for part in _chunks(logits):
            logits[part].sub_(_adam_step(m[part], v[part], rate, self.betas, place.step))


class Adam8bit:
    """Adam with both moments in 16 bits, see the head of the module.

    Args:
        betas: with β1² < β2, without which m has no bound, and β2 ≤ 0.99, above which rounding would drown v.
        dtype: of the logits, fp32 or bfloat16.
    """

    def __init__(self, betas: tuple[float, float], dtype: torch.dtype) -> None:
        self.betas, self.dtype = betas, dtype
        self.parts = {"moments": (torch.int16, float(_NO_MOMENTS))}
        self._unit = _bound(betas) / _U_MAX

    def update(self, logits: Tensor, grad: Tensor, state: State, rate: float, place: Place) -> None:
        """See :meth:`LogitOptimiser.update`."""
        beta1, beta2 = self.betas
        for part in _chunks(logits):
            words = random_words(
                part.stop - part.start,
                seed=place.seed,
                layer=_OF_STATE | place.layer,
                step=place.step,
                offset=place.offset + part.start,
                device=logits.device,
            )
            g = grad[part].float()
            m, v = unpack_moments(state["moments"][part], self._unit)
            m.lerp_(g, 1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            state["moments"][part] = pack_moments(m, v, self._unit, words)
            moved = logits[part].float() - _adam_step(m, v, rate, self.betas, place.step)
            logits[part] = moved if self.dtype == torch.float32 else round_to_bf16(moved, words >> 16)


class Updater:
    """Takes the gradients of one optimiser step as they come, and moves the logits with the last micro-batch's.

    Args:
        optimiser: shared by all layers.
        seed: of the stochastic rounding.
    """

    def __init__(self, optimiser: LogitOptimiser, seed: int) -> None:
        self.optimiser, self.seed = optimiser, seed
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
        """Take the gradients of whole logit matrices, in layer order, out of every backward pass to come."""
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
        """Add the gradient [n] of one micro-batch; on the last one, update the flat slice ``logits`` [n]."""
        if layer in self._sums:
            grad = self._add(self._sums.pop(layer), grad, layer, offset)
        if self._last:
            place = Place(self.seed, layer, self._step, offset)
            self.optimiser.update(logits, grad, self.state(layer, logits), self._rate, place)
        else:
            self._sums[layer] = grad

    def _add(self, total: Tensor, grad: Tensor, layer: int, offset: int) -> Tensor:
        if total.dtype == torch.float32:
            return total.add_(grad)
        for part in _chunks(total):
            words = random_words(
                part.stop - part.start,
                seed=self.seed,
                layer=_OF_SUM | layer,
                step=self._draw,
                offset=offset + part.start,
                device=total.device,
            )
            total[part] = round_to_bf16(total[part].float() + grad[part].float(), words)
        return total


def logit_optimiser(settings: LearnSettings) -> LogitOptimiser:
    """The optimiser that ``settings.optimiser`` names."""
    if settings.optimiser == "adam":
        return Adam(settings.betas)
    return Adam8bit(settings.betas, torch.bfloat16 if settings.optimiser == "adam8bit-bf16" else torch.float32)


def pack_moments(m: Tensor, v: Tensor, unit: float, words: Tensor) -> Tensor:
    """int16 [n] from fp32 m and v [n], rounded so that the mean of v is kept, and that of m given the rounded v.

    Args:
        unit: step of m's grid relative to √v.
        words: random int32 [n], of which the low 16 bits are used.
    """
    code = torch.log2(v / _FLOOR).mul_(_PER_OCTAVE).add_(1).floor_().clamp_(0, _V_MAX)
    low = _grid(code)
    gap = torch.where(code > 0, low * (_RATIO - 1), _FLOOR)
    code = (code + ((v - low) / gap > _uniform(words))).clamp_(max=_V_MAX)
    multiple = (m / (_grid(code).sqrt_() * unit)).nan_to_num_(0.0, 0.0, 0.0)  # m is given up where v rounds to 0
    multiple = (multiple + _uniform(words >> 8)).floor_().clamp_(-_U_MAX, _U_MAX)
    return (code * 64 + multiple + _NO_MOMENTS).to(torch.int16)


def unpack_moments(packed: Tensor, unit: float) -> tuple[Tensor, Tensor]:
    """fp32 m and v [n] from :func:`pack_moments`."""
    bits = packed.to(torch.int32) + (1 << 15)
    v = _grid((bits >> 6).float())
    return ((bits & 63) - (_U_MAX + 1)).float() * unit * v.sqrt(), v


def round_to_bf16(x: Tensor, words: Tensor) -> Tensor:
    """Finite fp32 [n] to bfloat16, up or down at random with the mean kept; the low 16 bits of ``words`` are used."""
    return ((x.view(torch.int32) + (words & 0xFFFF)) & -0x10000).view(torch.float32).to(torch.bfloat16)


def _grid(code: Tensor) -> Tensor:
    return torch.exp2((code - 1) / _PER_OCTAVE).mul_(_FLOOR).mul_(code > 0)


def _uniform(words: Tensor) -> Tensor:
    """Middles of 256 equal parts of (0, 1), by the lowest byte."""
    return ((words & 0xFF).float() + 0.5) / 256


def _bound(betas: tuple[float, float]) -> float:
    """Least upper bound of |m| / √v."""
    beta1, beta2 = betas
    return (1 - beta1) / math.sqrt((1 - beta2) * (1 - beta1**2 / beta2))


def _adam_step(m: Tensor, v: Tensor, rate: float, betas: tuple[float, float], step: int) -> Tensor:
    """rate · m̂ / (√v̂ + ε), the hats for bias-corrected."""
    correction1, correction2 = (1 - beta ** (step + 1) for beta in betas)
    return m / v.sqrt().div_(math.sqrt(correction2)).add_(_EPS) * (rate / correction1)


def _chunks(tensor: Tensor) -> Iterator[slice]:
    """Parts whose temporaries are small, and on a CPU stay in its caches."""
    size = 1 << (16 if tensor.device.type == "cpu" else 24)
    return (slice(first, min(first + size, len(tensor))) for first in range(0, len(tensor), size))
