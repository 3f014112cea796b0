"""Within what a sparsity holds. No torch here: reading a recipe does not need it."""

from __future__ import annotations

from typing import Literal

#: Of a learned mask: the model, each layer, each row.
Scope = Literal["global", "layer", "row"]
#: Of a layer-wise method: what weights of one matrix are compared within.
LayerScope = Literal["row", "layer"]
#: The same as it is asked for; ``native``: as the authors of the method have it.
PriorScope = Literal["native", "row", "layer"]

#: As the authors have it (method.md, section 4, and their code). SparseGPT's are blocks of 128 columns; OPTIMA takes
#: Wanda's mask.
NATIVE: dict[str, LayerScope] = {
    "magnitude": "layer",
    "wanda": "row",
    "sparsegpt": "layer",
    "thanos": "layer",
    "admm": "layer",
    "alps": "layer",
    "optima": "row",
}


def layer_scope(method: str, requested: PriorScope) -> LayerScope:
    """Within what a layer-wise method compares weights.

    Magnitude does so within the layer in any case: by row it would be another method than the usual one.
    """
    return NATIVE[method] if requested == "native" or method == "magnitude" else requested


def scope_name(method: str, scope: LayerScope) -> str:
    """What a table calls it: SparseGPT holds the sparsity of a layer in each of its blocks of columns."""
    return "block" if (method, scope) == ("sparsegpt", "layer") else scope
