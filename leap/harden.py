"""From logits or scores to masks that have exactly the sparsity that was asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from leap.layerwise.selection import Target, prune_count, select_mask
from leap.selection import Cut, cut, keep_above
from leap.settings import Scope


@dataclass(frozen=True)
class Hardener:
    """Keeps the weights with the largest logits, exactly as many as ``sparsity`` leaves in each unit of ``scope``."""

    sparsity: float
    scope: Scope
    cut: Cut | None = None
    """Cut through all logits of the model; for the scope ``global`` only."""
    ties_before: dict[int, int] = field(default_factory=dict)
    """Ties at the cut in the layers before a layer; without an entry all of the layer's ties are pruned."""

    def mask(self, layer: int, logits: Tensor) -> Tensor:
        """Boolean mask [out, in] of layer number ``layer``."""
        if self.scope != "global":
            return select_mask(logits.float(), Target(self.sparsity, self.scope))
        assert self.cut is not None
        if layer in self.ties_before:
            return keep_above(logits, self.cut, self.ties_before[layer])[0]
        return logits.float() > self.cut.value


def global_hardener(
    tensors: Callable[[], Iterable[Tensor]],
    sparsity: float,
    reduce: Callable[[Tensor], Tensor] = lambda counts: counts,
) -> Hardener:
    """A hardener of scope ``global`` without tie-breaking, from logits that may be spread over processes."""
    return Hardener(sparsity, "global", cut(tensors, lambda n: prune_count(sparsity, n), reduce))


def exact_hardener(tensors: Callable[[], Iterable[Tensor]], sparsity: float, scope: Scope) -> Hardener:
    """A hardener whose masks have exactly the asked sparsity over ``scope``.

    Args:
        tensors: gives the logits of all layers in layer order, at every call. Three passes are made.
    """
    if scope != "global":
        return Hardener(sparsity, scope)
    at = cut(tensors, lambda n: prune_count(sparsity, n))
    ties, before = 0, {}
    for layer, logits in enumerate(tensors()):
        before[layer] = ties
        ties += int(torch.count_nonzero(logits.float() == at.value))
    return Hardener(sparsity, scope, at, before)
