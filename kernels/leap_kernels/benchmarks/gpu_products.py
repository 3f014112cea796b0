"""Speed of the packed products, of their configurations and of unpacking, by graph replay, beside the dense product."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn.functional import linear

from leap_kernels.benchmarks.checkrun import CheckRun
from leap_kernels.benchmarks.graph_timing import launch_seconds, replayed, rotating
from leap_kernels.benchmarks.matrices import SHAPES, copied, random_matrix
from leap_kernels.benchmarks.model import GPUS, predict
from leap_kernels.benchmarks.timing import quantile
from leap_kernels.bmp128 import byte_limit
from leap_kernels.idx8 import from_bmp128
from leap_kernels.product import dense as dense_of
from leap_kernels.sparse_linear import SparseLinear

SPARSITIES = (0.6, 0.7, 0.5)


def products(run: CheckRun, ceilings: dict[str, float]) -> None:
    """A record for each shape, sparsity, batch and kernel: the kernel alone (graph) and the full call (eager)."""
    shapes = run.pick(SHAPES, ((64, 256),))
    cases = [(shape, s, batch) for batch in (1, 8) for s in SPARSITIES for shape in shapes]
    for shape, sparsity, batch in run.affordable(cases):
        with run.guarded(f"{shape[0]}x{shape[1]} at {sparsity:.0%}, batch {batch}"):
            _one_matrix(run, shape, sparsity, batch, ceilings)
    unpacking(run, ceilings)


def _one_matrix(run: CheckRun, shape: tuple[int, int], sparsity: float, batch: int, ceilings: dict[str, float]) -> None:
    packed = random_matrix(shape, sparsity, torch.bfloat16, run.device)
    derived, dense = from_bmp128(packed), packed.unpack()
    x = torch.randn(batch, shape[1], device=run.device).bfloat16()
    sizes = {"dense": 2 * dense.numel(), "bmp128": packed.nbytes, "idx8": derived.nbytes}
    calls: dict[str, Sequence[Callable[[], object]]] = {
        "dense": [partial(linear, x, w) for w in rotating(dense.clone, sizes["dense"], run.device)],
        "bmp128": _layer_calls(rotating(lambda: copied(packed), sizes["bmp128"], run.device), x),
        "idx8": _layer_calls(rotating(lambda: copied(derived), sizes["idx8"], run.device), x),
    }
    timed = replayed(calls, run.device, run.pick(16, 1))
    names = [gpu for gpu in GPUS if run.device.type == "cuda" and gpu in torch.cuda.get_device_name(run.device)]
    card = names[0] if names else None
    real = 1 - packed.nnz / dense.numel()
    for name, seconds in timed.items():
        median, fast, slow = (quantile(seconds, q) for q in (0.5, 0.1, 0.9))
        speedup = quantile(timed["dense"], 0.5) / median
        predicted = {"predicted_us": predict(shape, sparsity, name, card, batch)} if card else {}
        about = {} if name == "dense" else {"speedup": speedup, "share_of_byte_limit": speedup / byte_limit(real, 2)}
        run.figure(
            f"product {shape[0]}x{shape[1]} {sparsity:.0%} batch {batch} {name}", sparsity=real, bytes=sizes[name],
            us=1e6 * median, us_p10=1e6 * fast, us_p90=1e6 * slow, gb_s=sizes[name] / median / 1e9,
            share_of_read=sizes[name] / median / ceilings["read"], **about, **predicted,
            **launch_seconds(calls[name][0], run.device, run.pick(200, 2)),
        )  # fmt: skip


def configurations(run: CheckRun, _ceilings: dict[str, float]) -> None:
    """Microseconds of every configuration of the product kernels, for choosing the defaults."""
    if run.device.type != "cuda":
        run.figure("configurations", skipped="the kernels run on a GPU only")
        return
    from leap_kernels import gemv_bitmap_triton, gemv_idx8_triton, spmm_bitmap_triton

    kernels: dict[str, tuple[Any, int]] = {
        "gemv_idx8_triton": (gemv_idx8_triton, 1),
        "gemv_bitmap_triton": (gemv_bitmap_triton, 1),
        "spmm_bitmap_triton": (spmm_bitmap_triton, 8),
    }
    for name, (module, batch) in kernels.items():
        kernel = getattr(module, name)
        for shape in run.affordable(SHAPES):
            bitmap = random_matrix(shape, 0.6, torch.bfloat16, run.device)
            packed = from_bmp128(bitmap) if name == "gemv_idx8_triton" else bitmap
            turns = rotating(partial(copied, packed), packed.nbytes, run.device)
            x = torch.randn(batch, shape[1], device=run.device).bfloat16()
            calls = {}
            for config in run.affordable(module.candidates(), repr):
                with run.guarded(f"{name} {config}"):
                    kernel(x, packed, None, config)
                    calls[repr(config)] = [partial(kernel, x, turn, None, config) for turn in turns]
            timed = {config: 1e6 * quantile(seconds, 0.5) for config, seconds in replayed(calls, run.device, 8).items()}
            run.figure(
                f"{name} {shape[0]}x{shape[1]} 60% batch {batch}", **dict(sorted(timed.items(), key=lambda t: t[1]))
            )


def unpacking(run: CheckRun, ceilings: dict[str, float]) -> None:
    """GB/s of unpacking a matrix whole, as prefill does for each call."""
    for shape in run.affordable(run.pick(SHAPES[:2], ((64, 256),))):
        packed = random_matrix(shape, 0.6, torch.bfloat16, run.device)
        for name, matrix in (("bmp128", packed), ("idx8", from_bmp128(packed))):
            with run.guarded(f"unpack {name}"):
                turns = rotating(partial(copied, matrix), matrix.nbytes, run.device)
                (seconds,) = replayed({name: [partial(dense_of, turn) for turn in turns]}, run.device).values()
                moved, median = matrix.nbytes + 2 * shape[0] * shape[1], quantile(seconds, 0.5)
                rate = moved / median
                run.figure(f"unpack {shape[0]}x{shape[1]} 60% {name}", us=1e6 * median, gb_s=rate / 1e9,
                           share_of_copy=rate / ceilings["copy"])  # fmt: skip


def _layer_calls(matrices: Sequence[Any], x: torch.Tensor) -> list[Callable[[], object]]:
    layers = [SparseLinear(matrix) for matrix in matrices]
    return [partial(layer, x) for layer in layers]
