"""The packed matrices of a pruned model against dense ones, a matrix of each shape."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from leap_kernels import pack
from leap_kernels.benchmarks.products import BITMAP, COLD_BYTES, DENSE, IDX8, measure, reference
from leap_kernels.bmp128 import byte_limit
from leap_kernels.dispatch import format_for
from torch import nn

from leap.packed import MaskFile
from leap.surgery import prunable_linears
from pipeline.evaluation.speed import MatrixSpeed


def compare(model: nn.Module, masks: MaskFile, dtype: torch.dtype, seconds: float) -> list[MatrixSpeed]:
    """A row for each shape among the pruned layers: the layer whose sparsity is the median, timed at batch 1.

    Args:
        seconds: time for a shape, dense and packed calls in turn.

    Returns:
        ``shape`` [out, in], how many ``layers`` have it, the ``layer`` that was taken, its ``sparsity``, ``dtype``,
        ``dense_us`` and ``sparse_us`` a call, ``speedup``, ``byte_limit`` on it, and ``bandwidth``: the share of a
        plain read's (on a GPU a copy's) that the packed product reached.
    """
    by_shape: dict[tuple[int, int], list[tuple[float, str]]] = {}
    linears = prunable_linears(model)
    for name, linear in linears.items():
        sparsity = 1 - masks[name].float().mean().item()
        by_shape.setdefault((linear.out_features, linear.in_features), []).append((sparsity, name))
    rows = []
    weights = sum(linear.weight.numel() for linear in linears.values())
    for shape, layers in by_shape.items():
        sparsity, name = sorted(layers)[len(layers) // 2]
        weight = linears[name].weight.detach().to(dtype)
        packed = pack(weight, masks[name].to(weight.device))
        # In a model, all other layers are read before a matrix has its turn again, and no more than those.
        timed = measure(packed, 1, seconds, cold_bytes=min(COLD_BYTES, weights * dtype.itemsize))
        ours = timed[IDX8 if format_for(weight.device, dtype, shape[1]) == "idx8" else BITMAP]
        rows.append(
            MatrixSpeed(
                shape=list(shape),
                layers=len(layers),
                layer=name,
                sparsity=sparsity,
                dtype=str(dtype).removeprefix("torch."),
                dense_us=1e6 * timed[DENSE].median,
                sparse_us=1e6 * ours.median,
                speedup=timed[DENSE].median / ours.median,
                byte_limit=byte_limit(sparsity, dtype.itemsize),
                bandwidth=ours.bandwidth / reference(timed).bandwidth,
            )
        )
    return rows


def speedup(rows: Sequence[MatrixSpeed]) -> float:
    """Of all pruned layers together, each shape as often as the model has it."""
    dense = sum(row["layers"] * row["dense_us"] for row in rows)
    return dense / sum(row["layers"] * row["sparse_us"] for row in rows)
