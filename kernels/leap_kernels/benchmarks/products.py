"""Products with one matrix, packed and dense, timed in turn: what the benchmarks and the pipeline share.

On a CPU each call takes the next of several copies of its matrix, enough of them (128 MiB) that none is in the cache
when its turn comes: in a model, the other layers have pushed it out. ``read`` adds up as much memory: the bandwidth
that a plain read reaches in the same run. On a GPU the calls are replayed from a graph
(:mod:`leap_kernels.benchmarks.graph_timing`), and ``copy`` copies as much.
"""

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from leap_kernels.benchmarks.graph_timing import replayed, rotating
from leap_kernels.benchmarks.matrices import copied
from leap_kernels.benchmarks.timing import interleaved, quantile
from leap_kernels.bmp128 import BMP128
from leap_kernels.idx8 import IDX8 as IDX8Matrix
from leap_kernels.idx8 import MAX_COLUMNS, from_bmp128
from leap_kernels.sparse_linear import SparseLinear, sparse_linear

T = TypeVar("T")
COLD_BYTES = 128 * 2**20
DENSE, BITMAP, IDX8, READ, COPY = "dense F.linear", "bitmap", "idx8", "read", "copy"


@dataclass(frozen=True)
class Timing:
    """Sorted durations of one variant in seconds, and the bytes that a call moves: of the matrix, or of the stream."""

    durations: list[float]
    nbytes: int

    def quantile(self, q: float) -> float:
        return quantile(self.durations, q)

    @property
    def median(self) -> float:
        return self.quantile(0.5)

    @property
    def bandwidth(self) -> float:
        """Bytes a second."""
        return self.nbytes / self.median


def reference(timed: dict[str, Timing]) -> Timing:
    """The plain stream that bandwidths are measured against."""
    return timed.get(READ) or timed[COPY]


def measure(
    packed: BMP128,
    batch: int,
    seconds: float,
    isas: Sequence[str | None] = (None,),
    csr: bool = False,
    cold_bytes: int = COLD_BYTES,
) -> dict[str, Timing]:
    """Time a product with ``batch`` rows of x on the device of ``packed``, all variants in turn for about ``seconds``.

    Args:
        isas: instruction sets by their names for LEAP_CPU_ISA; None is what the kernel chooses, called ``bitmap``.
        csr: time the CSR matrices of torch and scipy too (float32 on a CPU, scipy where it is installed).
        cold_bytes: what a CPU reads before a copy of the matrix has its turn again; less where a model is smaller.
    """
    if packed.vals.is_cuda:
        return _measure_on_gpu(packed, batch)
    weight = packed.unpack()
    x = torch.randn(batch, weight.shape[1]).to(weight.dtype)
    sizes = {DENSE: weight.numel() * weight.element_size(), READ: cold_bytes}
    dense = itertools.cycle(_copies(weight.clone, sizes[DENSE], cold_bytes))
    calls: dict[str, Callable[[], object]] = {DENSE: lambda: linear(x, next(dense))}
    cold = _copies(
        lambda: BMP128(packed.shape, packed.bits.clone(), packed.off.clone(), packed.vals.clone()),
        packed.nbytes,
        cold_bytes,
    )
    turns = itertools.cycle(cold)  # one cycle for all instruction sets: none finds what another has just read
    for isa in isas:
        calls[isa or BITMAP] = lambda isa=isa: _sparse(x, next(turns), isa)  # type: ignore[misc]
        sizes[isa or BITMAP] = packed.nbytes
    if csr:
        calls |= _csr_calls(weight, x, sizes, cold_bytes)
    stream = torch.ones(cold_bytes // 8, dtype=torch.int64)
    calls[READ] = stream.sum
    return {name: Timing(times, sizes[name]) for name, times in interleaved(calls, seconds).items()}


def _measure_on_gpu(packed: BMP128, batch: int) -> dict[str, Timing]:
    weight, device = packed.unpack(), packed.vals.device
    x = torch.randn(batch, weight.shape[1], device=device).to(weight.dtype)
    source = torch.ones(COLD_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    sizes = {DENSE: weight.numel() * weight.element_size(), BITMAP: packed.nbytes, COPY: 2 * COLD_BYTES}
    packed_forms: dict[str, BMP128 | IDX8Matrix] = {BITMAP: packed}
    if weight.element_size() == 2 and weight.shape[1] <= MAX_COLUMNS:
        packed_forms[IDX8] = from_bmp128(packed)
        sizes[IDX8] = packed_forms[IDX8].nbytes
    calls: dict[str, Sequence[Callable[[], object]]] = {
        name: [partial(SparseLinear(turn), x) for turn in rotating(partial(copied, form), sizes[name], device)]
        for name, form in packed_forms.items()
    }
    calls[DENSE] = [partial(linear, x, turn) for turn in rotating(weight.clone, sizes[DENSE], device)]
    calls[COPY] = [lambda: target.copy_(source)]
    return {name: Timing(times, sizes[name]) for name, times in replayed(calls, device).items()}


def _sparse(x: Tensor, weight: BMP128, isa: str | None) -> None:
    if isa is not None:
        os.environ["LEAP_CPU_ISA"] = isa
    sparse_linear(x, weight)


def _csr_calls(weight: Tensor, x: Tensor, sizes: dict[str, int], cold_bytes: int) -> dict[str, Callable[[], object]]:
    matrix = weight.to_sparse_csr()
    row_starts, columns, values = matrix.crow_indices().int(), matrix.col_indices().int(), matrix.values()
    nbytes = 4 * (row_starts.numel() + 2 * values.numel())
    shape, right = tuple(weight.shape), x.T.contiguous()

    def copy() -> Tensor:
        return torch.sparse_csr_tensor(row_starts.clone(), columns.clone(), values.clone(), shape)

    torch_turns = itertools.cycle(_copies(copy, nbytes, cold_bytes))
    calls: dict[str, Callable[[], object]] = {"torch CSR": lambda: next(torch_turns) @ right}
    sizes["torch CSR"] = sizes["scipy CSR"] = nbytes
    try:
        from scipy.sparse import csr_matrix
    except ImportError:
        return calls
    parts = (values.numpy(), columns.numpy(), row_starts.numpy())
    scipy_turns = itertools.cycle(_copies(lambda: csr_matrix(parts, shape=shape, copy=True), nbytes, cold_bytes))
    return calls | {"scipy CSR": lambda: next(scipy_turns) @ right.numpy()}


def _copies(make: Callable[[], T], nbytes: int, cold_bytes: int) -> list[T]:
    return [make() for _ in range(max(2, -(-cold_bytes // nbytes)))]
