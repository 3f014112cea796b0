"""The layer-wise methods by name. Light: a method's module is imported when the method is taken out."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, MutableMapping
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from leap.layerwise.base import Method

#: Of a layer-wise method: what weights of one matrix are compared within.
LayerScope = Literal["row", "layer"]


class Home(NamedTuple):
    """Where a method is, and what has to be known of it before it is imported."""

    module: str
    """Holds the method under the method's name."""
    changes_weights: bool
    native: LayerScope
    """Within what its authors compare weights (method.md, section 4, and their code). SparseGPT's are blocks of 128
    columns; OPTIMA takes Wanda's mask."""


class Methods(MutableMapping[str, "Method"]):
    """Methods by name, in the order of ``homes``, then as they were put in."""

    def __init__(self, homes: Mapping[str, Home]) -> None:
        self._homes = dict(homes)
        self._methods: dict[str, Method] = {}

    def changes_weights(self, name: str) -> bool:
        """Whether the method gives kept weights new values."""
        return self._methods[name].changes_weights if name in self._methods else self._homes[name].changes_weights

    def native(self, name: str) -> LayerScope:
        """Within what the authors of the method compare weights; the row, where an entry was put in without a home."""
        return self._homes[name].native if name in self._homes else "row"

    def __getitem__(self, name: str) -> Method:
        if name not in self._methods:
            self._methods[name] = getattr(importlib.import_module(self._homes[name].module), name)
        return self._methods[name]

    def __setitem__(self, name: str, method: Method) -> None:
        self._methods[name] = method

    def __delitem__(self, name: str) -> None:
        if name not in self:
            raise KeyError(name)
        self._methods.pop(name, None)
        self._homes.pop(name, None)

    def __contains__(self, name: object) -> bool:
        return name in self._homes or name in self._methods

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._homes, *self._methods]))

    def __len__(self) -> int:
        return len({*self._homes, *self._methods})


#: A new method is its own file and an entry here.
METHODS = Methods(
    {
        "magnitude": Home("leap.layerwise.magnitude", changes_weights=False, native="layer"),
        "wanda": Home("leap.layerwise.wanda", changes_weights=False, native="row"),
        "sparsegpt": Home("leap.layerwise.sparsegpt", changes_weights=True, native="layer"),
        "thanos": Home("leap.layerwise.thanos", changes_weights=True, native="layer"),
        "admm": Home("leap.layerwise.admm", changes_weights=True, native="layer"),
        "alps": Home("leap.layerwise.alps", changes_weights=True, native="layer"),
        "optima": Home("leap.layerwise.optima", changes_weights=True, native="row"),
    }
)
