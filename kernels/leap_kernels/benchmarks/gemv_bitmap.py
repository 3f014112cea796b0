"""Speed of the CPU bitmap GEMV against ``torch.nn.functional.linear`` on the dense matrix, in the same dtype.

python -m leap_kernels.benchmarks.gemv_bitmap [--shape 4096 4096] [--threads 1] [--batch 1] [--seconds 3] [--csr]

How it is measured stands in :mod:`leap_kernels.benchmarks.products`.
"""

import argparse
import itertools
import os

import torch

from leap_kernels.benchmarks.products import DENSE, READ, measure
from leap_kernels.benchmarks.timing import machine
from leap_kernels.bmp128 import pack
from leap_kernels.gemv_bitmap_cpu import ISAS, native_library
from leap_kernels.sparse_linear import sparse_linear, sparse_linear_reference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, default=[4096, 4096], metavar=("OUT", "IN"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--isa", nargs="+", default=None, help="all that this CPU has")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.6, 0.75, 0.9])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--csr", action="store_true", help="torch's and scipy's CSR too, in float32")
    parser.add_argument("--seconds", type=float, default=3, help="per sparsity and dtype")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    library = native_library()
    if library is None:
        raise SystemExit("no native code here")
    available = ISAS[1 : library.leap_best_isa() + 1] or ISAS[:1]
    rows, columns = arguments.shape
    print(f"[{rows}, {columns}], batch {arguments.batch}; {machine()}")
    for dtype_name, sparsity in itertools.product(arguments.dtype, arguments.sparsity):
        float32 = dtype_name == "float32"
        weight = torch.randn(rows, columns).to(getattr(torch, dtype_name))
        packed = pack(weight, torch.rand(rows, columns) >= sparsity)
        # For float32, avx512_bf16 is the same code as avx512.
        isas = [isa for isa in arguments.isa or available[::-1] if not (float32 and isa == "avx512_bf16")]
        timed = measure(packed, arguments.batch, arguments.seconds, isas, arguments.csr and float32)
        x = torch.randn(arguments.batch, columns).to(weight.dtype)
        exact = sparse_linear_reference(x, packed)
        for name, t in timed.items():
            low, middle, high = (1e3 * t.quantile(q) for q in (0.2, 0.5, 0.8))
            line = f"{dtype_name:9} {sparsity:4.0%} {name:15} {middle:7.3f} ms [{low:.3f}, {high:.3f}]"
            line += f" {t.bandwidth / 1e9:6.1f} GB/s  {t.bandwidth / timed[READ].bandwidth:4.0%} of read"
            line += "" if name == READ else f"  x{timed[DENSE].median / t.median:.2f}"
            if name in isas:
                os.environ["LEAP_CPU_ISA"] = name
                error = (sparse_linear(x, packed).double() - exact).norm() / exact.norm()
                line += f"  error {error:.1e}"
            print(f"{line}  {len(t.durations)} runs", flush=True)


if __name__ == "__main__":
    main()
