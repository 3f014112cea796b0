"""What every layer-wise method takes and gives back."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from leap.layerwise.selection import Target
from leap.layerwise.statistics import InputStatistics

Needs = Literal["none", "norm", "gram"]
Precision = Literal["float32", "float64"]


class LayerResult(NamedTuple):
    """One pruned layer.

    Attributes:
        mask: bool [out, in], True = keep; meets the target exactly.
        weight: [out, in] in the input's dtype. The input tensor itself, still dense, when the method leaves weights
            alone; otherwise new values, zero where the mask is False.
        score: fp32 [out, in], higher = keep, as the method saw it when it chose the mask. Comparable within the layer;
            methods that choose the mask piece by piece need not rank the whole layer as the mask does.
    """

    mask: Tensor
    weight: Tensor
    score: Tensor


@dataclass(frozen=True)
class Method:
    """A layer-wise pruning method: call it with (weight, stats, target, **options).

    Attributes:
        name: key in ``leap.methods.METHODS``.
        needs: the input statistics it reads; "none" accepts ``stats=None``, and "gram" also serves "norm".
        changes_weights: whether the kept weights get new values.
        steps: what its solver takes in each layer, in products of in²·out multiplications; zero where it needs no
            Gram matrix. Estimates of time go by it.
        run: the method itself; its keyword-only arguments are the options.
    """

    name: str
    needs: Needs
    changes_weights: bool
    steps: float
    run: Callable[..., LayerResult]

    def check_options(self, options: dict[str, Any]) -> None:
        """Raises ValueError for an option that the method does not have."""
        parameters = inspect.signature(self.run).parameters.values()
        known = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
        for name in options:
            if name not in known:
                raise ValueError(f"{self.name} has no option {name!r}; it has {', '.join(known) or 'none'}")

    @torch.no_grad()
    def __call__(self, weight: Tensor, stats: InputStatistics | None, target: Target, **options: Any) -> LayerResult:
        """Prunes one layer.

        Args:
            weight: [out, in], any float dtype; never modified.
            stats: of the layer's inputs, on the weight's device.

        Raises:
            ValueError: an unknown option or a bad value of one, statistics that are missing, empty, not finite or of
                another layer, or columns that do not split into the target's N:M groups.
            torch.linalg.LinAlgError: a Cholesky factorisation failed at every damping tried.
        """
        self.check_options(options)
        target.check_columns(weight.shape[1])
        if self.needs != "none":
            _check_statistics(self, weight, stats)
        return self.run(weight, stats, target, **options)


def layer_method(
    *, needs: Needs, changes_weights: bool, steps: float = 0
) -> Callable[[Callable[..., LayerResult]], Method]:
    """Makes a function (weight, stats, target, *, options) -> LayerResult the ``Method`` of the same name.

    The ``steps`` of this package's methods: layers of 576 × 576 and 576 × 1536 at 60 %, CPU time over that of a plain
    matrix product at half its speed, beside other work (docs/log.md, 2026-11-25). Those that iterate stop when they
    settle.
    """
    return lambda run: Method(run.__name__, needs, changes_weights, steps, run)


def compute_dtype(precision: Precision) -> torch.dtype:
    """The dtype in which a method computes.

    Raises:
        ValueError: ``precision`` is neither "float32" nor "float64".
    """
    dtypes = {"float32": torch.float32, "float64": torch.float64}
    if precision not in dtypes:
        raise ValueError(f"precision must be one of {', '.join(dtypes)}, got {precision!r}")
    return dtypes[precision]


def _check_statistics(method: Method, weight: Tensor, stats: InputStatistics | None) -> None:
    if stats is None or stats.tokens == 0:
        raise ValueError(f"{method.name} needs statistics of the layer's inputs, and none were collected")
    if stats.in_features != weight.shape[1]:
        raise ValueError(f"statistics of {stats.in_features} inputs for a weight of {weight.shape[1]} columns")
    if method.needs == "gram" and stats.needs != "gram":
        raise ValueError(f"{method.name} needs the Gram matrix of the inputs; collect statistics with needs='gram'")
    if not stats.norm.isfinite().all():
        raise ValueError("the layer's inputs overflowed: their column norms hold inf or NaN")
