"""From logits or scores to masks that have exactly the sparsity that was asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from leap.layerwise.selection import Target, prune_count, select_mask
from leap.scopes import Scope
from leap.selection import Cut, cut, keep_above


@dataclass(frozen=True)
class Hardener:
    """Keeps the weights with the largest logits, exactly as many as ``sparsity`` leaves in each unit of ``scope``.

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
    """Ties at the cut in the layers before a layer; without an entry all of the layer's ties are pruned."""

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity must lie in [0, 1), not {self.sparsity}")

    def mask(self, layer: int, logits: Tensor) -> Tensor:
        """Boolean mask [out, in] of layer number ``layer``.

        Raises:
            ValueError: a NaN among the logits.
        """
        if self.scope != "global":
            return select_mask(logits.detach().float(), Target(self.sparsity, self.scope))
        assert self.cut is not None
        if layer in self.ties_before:
            return keep_above(logits, self.cut, self.ties_before[layer])[0]
        return self.cut.above(logits.detach())


def global_hardener(
    tensors: Callable[[], Iterable[Tensor]],
    sparsity: float,
    reduce: Callable[[Tensor], Tensor] = lambda counts: counts,
) -> Hardener:
    """A hardener of scope ``global`` without tie-breaking, from logits that may be spread over processes.

    It prunes all ties at the cut, so where there are some, slightly more than asked: good enough to watch a run.

    Args:
        tensors: gives the logits that this process holds, in any order and shape, at every call. Two passes are made.
        sparsity: share of all logits to prune.
        reduce: adds up a tensor of counts over the processes.

    Raises:
        ValueError: a NaN among the logits, or a sparsity outside [0, 1).
    """
    return Hardener(sparsity, "global", cut(tensors, lambda n: prune_count(sparsity, n), reduce))


def exact_hardener(tensors: Callable[[], Iterable[Tensor]], sparsity: float, scope: Scope) -> Hardener:
    """A hardener whose masks have exactly the asked sparsity over ``scope``.

    Args:
        tensors: gives the logits of all layers in layer order, at every call. Three passes are made.
        sparsity: share of the logits to prune in each unit of ``scope``.

    Raises:
        ValueError: a NaN among the logits, or a sparsity outside [0, 1).
    """
    if scope != "global":
        return Hardener(sparsity, scope)
    at = cut(tensors, lambda n: prune_count(sparsity, n))
    ties = 0
    before: dict[int, int] = {}
    for layer, logits in enumerate(tensors()):
        before[layer] = ties
        ties += int(torch.count_nonzero(logits.detach().float() == at.value))
    return Hardener(sparsity, scope, at, before)
