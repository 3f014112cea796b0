"""Layer-wise pruning: one-shot masks, and for some methods new weights, from the inputs each layer sees."""

from leap.layerwise.base import LayerResult, Method
from leap.layerwise.collect import collect_statistics
from leap.layerwise.reconstruct import reconstruct, reconstruct_admm
from leap.layerwise.selection import Target, prune_count, select_mask
from leap.layerwise.statistics import InputStatistics
from leap.layerwise.sweep import reconstruct_sweep, sweep
from leap.methods import METHODS

__all__ = [
    "METHODS",
    "InputStatistics",
    "LayerResult",
    "Method",
    "Target",
    "collect_statistics",
    "prune_count",
    "reconstruct",
    "reconstruct_admm",
    "reconstruct_sweep",
    "select_mask",
    "sweep",
]
