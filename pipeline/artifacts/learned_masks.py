"""Exact masks from the logits of a learning run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor, nn

from leap.families import MaskFamily
from leap.masked_linear import layout_of
from pipeline.artifacts.logit_checkpoint import Checkpoint


def learned_masks(
    checkpoint: Checkpoint, linears: Mapping[str, nn.Linear], sparsity: float, family: MaskFamily
) -> Callable[[str], Tensor]:
    """Exact masks [out, in] from learned logits, by the name of a layer.

    Args:
        linears: the layers of the model by name, in model order.
        family: of the masks.
    """
    gate = family.gate()
    layout = layout_of(linears, gate)
    matrices = {matrix.name: matrix for matrix in layout.matrices}

    def logits() -> Iterable[tuple[str, Tensor]]:
        return ((name, checkpoint.logits(name)) for name in layout.shapes)

    hardener = gate.hardener(layout, logits, sparsity, lambda counts: counts, exact=True)
    return lambda name: hardener.mask(matrices[name], [checkpoint.logits(tensor) for tensor in layout.reads[name]])
