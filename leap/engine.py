"""What the loop of learning asks of a masked model, and the engine of a model that lies whole in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from leap.gates import GateState
from leap.masked_linear import MaskedLinear, logit_tensors
from leap.optimisers import Updater


@dataclass(frozen=True)
class MaskedWeights:
    """Totals over all masked weights that the objective is relative to."""

    numel: int
    norm: float
    """Σ over layers of ‖W‖_F."""


class Engine(Protocol):
    """A masked model with the optimiser of its logits, wherever the two lie.

    Of ``world`` processes, number ``rank`` computes an equal share of the micro-batches of each step. All methods are
    collective: every process calls them equally often.
    """

    state: GateState
    """Of the masked layers."""
    weights: MaskedWeights
    rank: int
    world: int

    def forward(self, rows: Tensor) -> Tensor:
        """Logits [R, S, V] of rows [R, S]."""

    def hidden_forward(self, rows: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """The same, and the hidden states [R, S, H] after each block."""

    def backward(self, loss: Tensor, step: int, rate: float, microbatch: int, microbatches: int) -> None:
        """Take the gradients of ``loss``; with the last of this process's micro-batches of a step, move the logits.

        Args:
            loss: of this process's micro-batch number ``microbatch`` out of ``microbatches``, not divided by them.
            rate: learning rate of the step.
        """

    def local_logits(self) -> Iterable[tuple[str, Tensor]]:
        """See :data:`leap.gates.Logits`; all processes together hold each logit once."""

    def reduce(self, values: Tensor) -> Tensor:
        """The sum of ``values`` over all processes, on the CPU."""


class LocalEngine:
    """The engine of a model in this process alone.

    Args:
        model_forward: see :meth:`Engine.forward`.
        state: of ``layers``.
        layers: with their logits, by dotted name, in layer order.
        updater: moves the logits, once :meth:`backward` is called.
        model_hidden_forward: see :meth:`Engine.hidden_forward`; for distillation on hidden states.
    """

    rank, world = 0, 1

    def __init__(
        self,
        model_forward: Callable[[Tensor], Tensor],
        state: GateState,
        layers: Mapping[str, MaskedLinear],
        updater: Updater | None = None,
        model_hidden_forward: Callable[[Tensor], tuple[Tensor, Sequence[Tensor]]] | None = None,
    ) -> None:
        self.state, self.layers = state, layers
        self.weights = weight_norms(layers)
        self._forward, self._hidden_forward, self._updater = model_forward, model_hidden_forward, updater
        if updater is not None:
            updater.attach(logit_tensors(layers).values())

    def forward(self, rows: Tensor) -> Tensor:
        """See :meth:`Engine.forward`."""
        return self._forward(rows)

    def hidden_forward(self, rows: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """See :meth:`Engine.hidden_forward`."""
        assert self._hidden_forward is not None
        return self._hidden_forward(rows)

    def backward(self, loss: Tensor, step: int, rate: float, microbatch: int, microbatches: int) -> None:
        """See :meth:`Engine.backward`."""
        assert self._updater is not None
        self._updater.begin(step, rate, microbatch, microbatches)
        (loss / microbatches).backward()
        self._updater.end()

    def local_logits(self) -> Iterable[tuple[str, Tensor]]:
        """The whole logit tensors."""
        return logit_tensors(self.layers).items()

    def reduce(self, values: Tensor) -> Tensor:
        """See :meth:`Engine.reduce`."""
        return values.cpu()


def weight_norms(layers: Mapping[str, MaskedLinear]) -> MaskedWeights:
    """Totals over ``layers`` whose weights are whole in this process."""
    norm = sum(float(torch.linalg.vector_norm(layer.masked_weight.detach().float())) for layer in layers.values())
    return MaskedWeights(sum(layer.weight.numel() for layer in layers.values()), norm)
