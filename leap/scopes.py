"""Within what a sparsity holds. No torch here: reading a recipe does not need it."""

from __future__ import annotations

from typing import Literal

from leap.methods import METHODS, LayerScope

#: Of a learned mask: the model, each layer, each row.
Scope = Literal["global", "layer", "row"]
#: The same as it is asked for; ``native``: as the authors of the method have it.
PriorScope = Literal["native", "row", "layer"]


def layer_scope(method: str, requested: PriorScope) -> LayerScope:
    """Within what a layer-wise method compares weights.

    Magnitude does so within the layer in any case: by row it would be another method than the usual one.
    """
    return METHODS.native(method) if requested == "native" or method == "magnitude" else requested


def scope_name(method: str, scope: LayerScope) -> str:
    """What a table calls it: SparseGPT holds the sparsity of a layer in each of its blocks of columns."""
    return "block" if (method, scope) == ("sparsegpt", "layer") else scope
