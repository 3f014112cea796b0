"""Exact masks from the logits of a learning run."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from leap.harden import exact_hardener
from leap.scopes import Scope
from pipeline.artifacts.logit_checkpoint import Checkpoint


def learned_masks(
    checkpoint: Checkpoint, names: list[str], sparsity: float, scope: Scope
) -> Callable[[int, str], Tensor]:
    """Exact masks [out, in] from learned logits, by number and name of a layer.

    Args:
        names: all layers in model order.
    """

    def logits() -> Iterable[Tensor]:
        return (checkpoint.logits(name) for name in names)

    hardener = exact_hardener(logits, sparsity, scope)
    return lambda number, name: hardener.mask(number, checkpoint.logits(name))
