"""Speed of the CPU bitmap GEMV against ``torch.nn.functional.linear`` on the dense matrix, in the same dtype.

python -m leap_kernels.benchmarks.gemv_bitmap [--shape 4096 4096] [--threads 1] [--batch 1] [--seconds 3] [--csr]

Calls of all variants take turns, and each call takes the next of several copies of its matrix, enough of them (128 MiB)
that none is in the cache when its turn comes: in a model, the other layers have pushed it out. ``read`` adds up as much
memory: the bandwidth that a plain read reaches in the same run.
"""

import argparse
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from leap_kernels.benchmarks.timing import interleaved, machine, quantile
from leap_kernels.bmp128 import BMP128, pack
from leap_kernels.gemv_bitmap_cpu import native_library
from leap_kernels.sparse_linear import sparse_linear, sparse_linear_reference

T = TypeVar("T")
COLD_BYTES = 128 * 2**20
DENSE, BITMAP, READ = "dense F.linear", "bitmap", "read"


@dataclass(frozen=True)
class Timing:
    """Durations of one variant in seconds, and the bytes of the matrix that a call reads."""

    p20: float
    p50: float
    p80: float
    runs: int
    nbytes: int

    @property
    def bandwidth(self) -> float:
        """Bytes a second."""
        return self.nbytes / self.p50


def measure(
    packed: BMP128, batch: int, seconds: float, isas: Sequence[str | None] = (None,), csr: bool = False
) -> dict[str, Timing]:
    """Time a product with ``batch`` rows of x, all variants in turn for about ``seconds``.

    Args:
        isas: instruction sets by their names for LEAP_CPU_ISA; None is what the kernel chooses, called ``bitmap``.
        csr: time the CSR matrices of torch and scipy too (float32 only, scipy where it is installed).
    """
    weight = packed.unpack()
    x = torch.randn(batch, weight.shape[1]).to(weight.dtype)
    sizes = {DENSE: weight.numel() * weight.element_size(), READ: COLD_BYTES}
    dense = itertools.cycle(_copies(weight.clone, sizes[DENSE]))
    calls: dict[str, Callable[[], object]] = {DENSE: lambda: torch.nn.functional.linear(x, next(dense))}
    cold = _copies(
        lambda: BMP128(packed.shape, packed.bits.clone(), packed.off.clone(), packed.vals.clone()), packed.nbytes
    )
    turns = itertools.cycle(cold)  # one cycle for all instruction sets: none finds what another has just read
    for isa in isas:
        calls[isa or BITMAP] = lambda isa=isa: _sparse(x, next(turns), isa)  # type: ignore[misc]
        sizes[isa or BITMAP] = packed.nbytes
    if csr:
        calls |= _csr_calls(weight, x, sizes)
    stream = torch.ones(COLD_BYTES // 8, dtype=torch.int64)
    calls[READ] = stream.sum
    timed = interleaved(calls, seconds)
    return {
        name: Timing(
            quantile(durations, 0.2), quantile(durations, 0.5), quantile(durations, 0.8), len(durations), sizes[name]
        )
        for name, durations in timed.items()
    }


def _sparse(x: Tensor, weight: BMP128, isa: str | None) -> None:
    if isa is not None:
        os.environ["LEAP_CPU_ISA"] = isa
    sparse_linear(x, weight)


def _csr_calls(weight: Tensor, x: Tensor, sizes: dict[str, int]) -> dict[str, Callable[[], object]]:
    matrix = weight.to_sparse_csr()
    row_starts, columns, values = matrix.crow_indices().int(), matrix.col_indices().int(), matrix.values()
    nbytes = 4 * (row_starts.numel() + 2 * values.numel())
    shape, right = tuple(weight.shape), x.T.contiguous()

    def copy() -> Tensor:
        return torch.sparse_csr_tensor(row_starts.clone(), columns.clone(), values.clone(), shape)

    torch_turns = itertools.cycle(_copies(copy, nbytes))
    calls: dict[str, Callable[[], object]] = {"torch CSR": lambda: next(torch_turns) @ right}
    sizes["torch CSR"] = sizes["scipy CSR"] = nbytes
    try:
        from scipy.sparse import csr_matrix
    except ImportError:
        return calls
    parts = (values.numpy(), columns.numpy(), row_starts.numpy())
    scipy_turns = itertools.cycle(_copies(lambda: csr_matrix(parts, shape=shape, copy=True), nbytes))
    return calls | {"scipy CSR": lambda: next(scipy_turns) @ right.numpy()}


def _copies(make: Callable[[], T], nbytes: int) -> list[T]:
    return [make() for _ in range(max(2, -(-COLD_BYTES // nbytes)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, default=[4096, 4096], metavar=("OUT", "IN"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--isa", nargs="+", default=["avx512_bf16", "avx512", "avx2"])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.6, 0.75, 0.9])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--csr", action="store_true", help="torch's and scipy's CSR too, in float32")
    parser.add_argument("--seconds", type=float, default=3, help="per sparsity and dtype")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if native_library() is None:
        raise SystemExit("no native code here")
    rows, columns = arguments.shape
    print(f"[{rows}, {columns}], batch {arguments.batch}; {machine()}")
    for dtype_name, sparsity in itertools.product(arguments.dtype, arguments.sparsity):
        float32 = dtype_name == "float32"
        weight = torch.randn(rows, columns).to(getattr(torch, dtype_name))
        packed = pack(weight, torch.rand(rows, columns) >= sparsity)
        isas = [isa for isa in arguments.isa if not (float32 and isa == "avx512_bf16")]  # the same code as avx512
        timed = measure(packed, arguments.batch, arguments.seconds, isas, arguments.csr and float32)
        x = torch.randn(arguments.batch, columns).to(weight.dtype)
        exact = sparse_linear_reference(x, packed)
        for name, t in timed.items():
            line = (
                f"{dtype_name:9} {sparsity:4.0%} {name:15} {t.p50 * 1e3:7.3f} ms [{t.p20 * 1e3:.3f}, {t.p80 * 1e3:.3f}]"
            )
            line += f" {t.bandwidth / 1e9:6.1f} GB/s  {t.bandwidth / timed[READ].bandwidth:4.0%} of read"
            line += "" if name == READ else f"  x{timed[DENSE].p50 / t.p50:.2f}"
            if name in isas:
                os.environ["LEAP_CPU_ISA"] = name
                error = (sparse_linear(x, packed).double() - exact).norm() / exact.norm()
                line += f"  error {error:.1e}"
            print(f"{line}  {t.runs} runs", flush=True)


if __name__ == "__main__":
    main()
