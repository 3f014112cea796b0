"""Collecting the input statistics of linear layers while a model runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from leap.layerwise.statistics import InputStatistics

logger = logging.getLogger(__name__)


@contextmanager
def collect_statistics(
    linears: Mapping[str, nn.Linear], needs: Literal["norm", "gram"], dtype: torch.dtype = torch.float32
) -> Iterator[dict[str, InputStatistics]]:
    """Within the context, forwards add to the statistics of each layer's inputs.

    Layers called one after the other with the same tensor (query, key and value; gate and up) share the product XᵀX of
    that batch, which is most of the work. A layer that never ran, such as an expert no token was routed to, leaves the
    context with statistics of white noise, G = I, and a warning in the log.

    Args:
        linears: by name, each on the device it runs on.
        needs, dtype: what to keep, and in which precision, see ``InputStatistics``.
    """
    statistics = {
        name: InputStatistics(linear.in_features, needs, dtype, linear.weight.device)
        for name, linear in linears.items()
    }
    shared = _LastBatch(needs, dtype)
    with ExitStack() as hooks:
        for name, linear in linears.items():
            hooks.callback(linear.register_forward_pre_hook(_adder(statistics[name], shared)).remove)
        yield statistics
    for name, stats in statistics.items():
        if stats.tokens == 0:
            logger.warning("%s never ran on the calibration rows; its inputs are taken as white noise", name)
            stats.update(torch.eye(stats.in_features, device=linears[name].weight.device))


class _LastBatch:
    """Statistics of the tensor seen last, which is held so that no other tensor can take its identity."""

    def __init__(self, needs: Literal["norm", "gram"], dtype: torch.dtype) -> None:
        self._needs, self._dtype = needs, dtype
        self._input: Tensor | None = None
        self._statistics: InputStatistics | None = None

    def statistics_of(self, x: Tensor) -> InputStatistics:
        if self._statistics is None or x is not self._input:
            self._input = x
            self._statistics = InputStatistics(x.shape[-1], self._needs, self._dtype, x.device)
            self._statistics.update(x)
        return self._statistics


def _adder(total: InputStatistics, shared: _LastBatch) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
        total.merge(shared.statistics_of(args[0]))

    return hook
