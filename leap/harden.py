"""From logits or scores to masks that have exactly the sparsity that was asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from leap.gates import Matrix
from leap.layerwise.selection import Target, prune_count, select_mask
from leap.scopes import Scope
from leap.selection import Cut, cut, keep_above


@dataclass(frozen=True)
class RankHardener:
    """Keeps the weights with the largest logits, of one each: as many as ``sparsity`` leaves in each unit of ``scope``.

    Equal logits are settled by position: the first in layer order and flat index stays. So masks of the same logits are
    nested: what is kept at one sparsity is kept at every lower one.

    Raises:
        ValueError: a sparsity outside [0, 1).
    """

    sparsity: float
    """Share of the weights to prune; their number is rounded to the nearest integer."""
    scope: Scope
    """Unit within which the number is exact."""
    cut: Cut | None = None
    """Cut through all logits of the model; for the scope ``global`` only."""
    ties_before: dict[int, int] = field(default_factory=dict)
    """Ties at the cut in the layers before a layer, by its number; without an entry the layer's ties are pruned."""

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity must lie in [0, 1), not {self.sparsity}")

    @property
    def offset(self) -> float:
        """See :attr:`leap.gates.Hardener.offset`."""
        return 0.0 if self.cut is None else self.cut.value

    def mask(self, matrix: Matrix, logits: Sequence[Tensor]) -> Tensor:
        """See :meth:`leap.gates.Hardener.mask`.

        Raises:
            ValueError: a NaN among the logits.
        """
        (values,) = logits
        if self.scope != "global":
            return select_mask(values.detach().float(), Target(self.sparsity, self.scope))
        assert self.cut is not None
        if matrix.number in self.ties_before:
            return keep_above(values, self.cut, self.ties_before[matrix.number])[0]
        return self.cut.above(values.detach())


@dataclass(frozen=True)
class PatternHardener:
    """Of one logit a weight, keeps the largest n of every m consecutive inputs; of equal ones the first.

    Raises:
        ValueError: a sparsity that is not the pattern's.
    """

    sparsity: float
    pattern: tuple[int, int]
    offset: float = 0.0
    """See :attr:`leap.gates.Hardener.offset`."""

    def __post_init__(self) -> None:
        self._target()

    def _target(self) -> Target:
        return Target(self.sparsity, pattern=self.pattern)

    def mask(self, matrix: Matrix, logits: Sequence[Tensor]) -> Tensor:  # noqa: ARG002
        """See :meth:`leap.gates.Hardener.mask`.

        Raises:
            ValueError: a NaN among the logits.
        """
        return select_mask(logits[0].detach().float(), self._target())


def ranked(
    tensors: Callable[[], Iterable[Tensor]],
    sparsity: float,
    scope: Scope,
    reduce: Callable[[Tensor], Tensor] = lambda counts: counts,
    exact: bool = True,
) -> RankHardener:
    """The hardener of one logit a weight.

    Args:
        tensors: gives the logits at every call: of all layers, in layer order, where ``exact``; else what this process
            holds of them, in any order and shape. Two or three passes are made.
        sparsity: share of the logits to prune in each unit of ``scope``.
        reduce: adds up a tensor of counts over the processes.
        exact: settle ties. Else all ties at the cut are pruned, so where there are some, slightly more than requested.

    Raises:
        ValueError: a NaN among the logits, or a sparsity outside [0, 1).
    """
    if scope != "global":
        return RankHardener(sparsity, scope)
    at = cut(tensors, lambda n: prune_count(sparsity, n), reduce)
    before: dict[int, int] = {}
    ties = 0
    if exact:
        for layer, logits in enumerate(tensors()):
            before[layer] = ties
            ties += int(torch.count_nonzero(logits.detach().float() == at.value))
    return RankHardener(sparsity, scope, at, before)
