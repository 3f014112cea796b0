"""The interface of a family of masks to the model, the learner, the optimiser and hardening."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

Mode = Literal["dense", "sampled", "mean", "hard"]

#: Gives the logits that this process holds, tensor by tensor with its name in the order of a layout, at every call.
Logits = Callable[[], Iterable[tuple[str, Tensor]]]


@dataclass(frozen=True)
class Draw:
    """What one sampled forward pass and its backward pass have to agree on."""

    scale: float
    """κ, multiplies the logits."""
    temperature: float
    """τ, divides the noisy logits."""
    noise: bool
    """Whether noise is added to the scaled logits."""
    seed: int
    """Key of the noise."""
    index: int
    """Number of the micro-batch over the whole run and all workers; the step in the counter of the noise."""
    offset: float = 0.0
    """Taken from the logits before they are scaled: where the gate is open with probability ½."""

    def still(self) -> Draw:
        """Without noise. Where there was some, at τ = 1: M is then the probability that the gate is open."""
        return replace(self, noise=False, temperature=1.0 if self.noise else self.temperature)


@dataclass(frozen=True)
class Matrix:
    """A weight matrix [out, in] that is masked."""

    number: int
    """In model order; part of the counter of its noise."""
    name: str
    """Of its layer, dotted."""
    shape: torch.Size


class PriorMask(NamedTuple):
    """What a layer-wise prior says of one matrix: bool and float [out, in], a higher score is kept longer."""

    matrix: Matrix
    keep: Tensor
    score: Tensor


class Hardener(Protocol):
    """Decides which weights stay, from logits."""

    @property
    def offset(self) -> float:
        """The logit above which weights stay, where there is one for all; else 0."""

    def mask(self, matrix: Matrix, logits: Sequence[Tensor]) -> Tensor:
        """Boolean mask [out, in] of a matrix from the whole logit tensors that it reads."""


class Gate(Protocol):
    """A way to make masks out of logit tensors. ``logits`` are those that a matrix reads, in the order of their names.

    One tensor a matrix goes by the name of its layer. A tensor that several matrices read is learned once.
    """

    def logit_shapes(self, matrix: Matrix) -> dict[str, torch.Size]:
        """Shapes of the logit tensors that the matrix reads, by a name that is unique in the model.

        Raises:
            ValueError: the family has no mask for a matrix of this shape.
        """

    def initial(self, name: str, priors: Sequence[PriorMask], generator: torch.Generator) -> Tensor:
        """First fp32 logits of the tensor ``name`` from the prior's masks of all matrices that read it."""

    def draw(self, progress: float, seed: int, index: int) -> Draw:
        """Schedules and noise of micro-batch ``index`` when ``progress``, in [0, 1], of the run is done."""

    def apply(self, weight: Tensor, logits: Sequence[Tensor], matrix: Matrix, draw: Draw, out: Tensor) -> Tensor:
        """Write M⊙W into ``out``; returns float64 [Σ M, Σ (M·W)², Σ P(open)]."""

    def backward(
        self,
        grad_masked: Tensor,
        weight: Tensor,
        logits: Sequence[Tensor],
        stats_grad: Tensor,
        matrix: Matrix,
        draw: Draw,
    ) -> tuple[Tensor, ...]:
        """Gradients with respect to the logits, from those with respect to M⊙W and to the three sums.

        One may lie where ``grad_masked`` was.
        """

    def mean(self, weight: Tensor, logits: Sequence[Tensor], matrix: Matrix, draw: Draw) -> Tensor:
        """``weight`` [out, in] times the probability that each gate is open."""

    def norm(self, squares: Tensor, total: float) -> Tensor:
        """What the weight reward pays for, a scalar.

        Args:
            squares: float64 [layers], ‖M⊙W‖_F² of each matrix; may be zero.
            total: Σ over layers of ‖W‖_F.
        """

    def hardener(
        self, layout: Layout, logits: Logits, sparsity: float, reduce: Callable[[Tensor], Tensor], exact: bool
    ) -> Hardener:
        """A hardener that leaves the requested sparsity.

        Args:
            logits: flat slices, of which all processes together hold each once. They are gone through several times.
            sparsity: share of the weights to prune.
            reduce: adds up a tensor over the processes; the sum is on the CPU.
            exact: settle ties by position; then ``logits`` are whole and this process holds all. Else all ties at the
                cut may be pruned, which is good enough to watch a run.

        Raises:
            ValueError: a NaN among the logits, or a sparsity that the family cannot have.
        """


@dataclass(frozen=True)
class Layout:
    """Which logit tensors the matrices of a model read."""

    matrices: tuple[Matrix, ...]
    reads: dict[str, tuple[str, ...]]
    """Names of the tensors that a matrix reads, by the matrix's name."""
    shapes: dict[str, torch.Size]
    """Of each tensor by name, in the order in which the matrices come to them; a tensor's number is its place here."""

    @classmethod
    def of(cls, gate: Gate, matrices: Iterable[Matrix]) -> Layout:
        """The layout of a model's matrices under ``gate``.

        Raises:
            ValueError: see :meth:`Gate.logit_shapes`; or two matrices name one tensor with different shapes.
        """
        matrices = tuple(matrices)
        reads: dict[str, tuple[str, ...]] = {}
        shapes: dict[str, torch.Size] = {}
        for matrix in matrices:
            tensors = gate.logit_shapes(matrix)
            reads[matrix.name] = tuple(tensors)
            for name, shape in tensors.items():
                if shapes.setdefault(name, shape) != shape:
                    raise ValueError(f"{matrix.name} reads {name} as {list(shape)}, others as {list(shapes[name])}")
        return cls(matrices, reads, shapes)

    @cached_property
    def readers(self) -> dict[str, tuple[Matrix, ...]]:
        """The matrices that read a tensor, by the tensor's name."""
        readers: dict[str, tuple[Matrix, ...]] = dict.fromkeys(self.shapes, ())
        for matrix in self.matrices:
            for name in self.reads[matrix.name]:
                readers[name] += (matrix,)
        return readers

    def logits_of(self, matrix: Matrix) -> int:
        """How many logits a matrix reads."""
        return sum(self.shapes[name].numel() for name in self.reads[matrix.name])

    @property
    def numel(self) -> int:
        """How many logits there are."""
        return sum(shape.numel() for shape in self.shapes.values())


@dataclass
class GateState:
    """Mode of the masked layers of one model, and what they leave behind in a sampled forward pass.

    ``dense`` ignores the masks, ``sampled`` draws soft masks and can be differentiated, ``mean`` takes the probability
    that a gate is open, ``hard`` keeps what ``harden`` keeps. The modes ``sampled`` and ``mean`` read ``draw``.
    """

    gate: Gate
    layout: Layout
    mode: Mode = "dense"
    draw: Draw | None = None
    harden: Hardener | None = None
    stats: list[Tensor] = field(default_factory=list)
    """Per layer float64 [Σ M, Σ (M·W)², Σ P(open)] of the last sampled forward pass, part of the graph."""
    collecting: bool = False
    """Whether a sampled forward pass adds to ``stats``."""
