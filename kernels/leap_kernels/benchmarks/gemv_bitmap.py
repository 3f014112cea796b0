"""Speed of the CPU bitmap GEMV against ``torch.nn.functional.linear`` on the dense matrix, in the same dtype.

python -m leap_kernels.benchmarks.gemv_bitmap [--shape 4096 4096] [--threads 1] [--batch 1] [--seconds 3]

Calls of all variants take turns, and each call takes the next of several copies of its matrix, enough of them (128 MiB)
that none is in the cache when its turn comes: in a model, the other layers have pushed it out.
"""

import argparse
import itertools
import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from leap_kernels.benchmarks.timing import interleaved, machine, quantile
from leap_kernels.bmp128 import BMP128, pack
from leap_kernels.gemv_bitmap_cpu import native_library
from leap_kernels.sparse_linear import sparse_linear, sparse_linear_reference

COLD_BYTES = 128 * 2**20


def copies(matrix_bytes: int) -> int:
    return max(2, -(-COLD_BYTES // matrix_bytes))


def dense_call(x: Tensor, weight: Tensor) -> Callable[[], object]:
    cold = itertools.cycle([weight.clone() for _ in range(copies(weight.numel() * weight.element_size()))])
    return lambda: torch.nn.functional.linear(x, next(cold))


def sparse_call(x: Tensor, weight: BMP128, isa: str) -> Callable[[], object]:
    cold: Iterator[BMP128] = itertools.cycle(
        [
            BMP128(weight.shape, weight.bits.clone(), weight.off.clone(), weight.vals.clone())
            for _ in range(copies(weight.nbytes))
        ]
    )

    def call() -> None:
        os.environ["LEAP_CPU_ISA"] = isa
        sparse_linear(x, next(cold))

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, default=[4096, 4096], metavar=("OUT", "IN"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--isa", nargs="+", default=["avx512_bf16", "avx512", "avx2"])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.6, 0.75, 0.9])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--seconds", type=float, default=3, help="per sparsity and dtype")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if native_library() is None:
        raise SystemExit("no native code here")
    rows, columns = arguments.shape
    print(f"[{rows}, {columns}], batch {arguments.batch}; {machine()}")
    for dtype_name, sparsity in itertools.product(arguments.dtype, arguments.sparsity):
        dtype = getattr(torch, dtype_name)
        weight = torch.randn(rows, columns).to(dtype)
        x = torch.randn(arguments.batch, columns).to(dtype)
        packed = pack(weight, torch.rand(rows, columns) >= sparsity)
        exact = sparse_linear_reference(x, packed)
        variants = {"dense F.linear": dense_call(x, weight)}
        for isa in arguments.isa:
            if dtype == torch.float32 and isa == "avx512_bf16":
                continue  # the same code as avx512
            variants[isa] = sparse_call(x, packed, isa)
        timed = interleaved(variants, arguments.seconds)
        dense = quantile(timed["dense F.linear"], 0.5)
        for name, durations in timed.items():
            p20, p50, p80 = (quantile(durations, q) for q in (0.2, 0.5, 0.8))
            nbytes = weight.numel() * weight.element_size() if name.startswith("dense") else packed.nbytes
            line = f"{dtype_name:9} {sparsity:4.0%} {name:15} {p50 * 1e3:7.3f} ms [{p20 * 1e3:.3f}, {p80 * 1e3:.3f}]"
            line += f" {nbytes / p50 / 1e9:6.1f} GB/s  x{dense / p50:.2f}"
            if name in arguments.isa:
                os.environ["LEAP_CPU_ISA"] = name
                error = (sparse_linear(x, packed).double() - exact).norm() / exact.norm()
                line += f"  error {error:.1e}"
            print(f"{line}  {len(durations)} runs")


if __name__ == "__main__":
    main()
