"""Records of the packed products on this machine, GPU and CPU, as a CSV table and a plot.

python -m leap_kernels.benchmarks.harness --out DIRECTORY [--shape 4096 4096] [--batch 1 8] [--runs 1000] [--smoke]

A row for each shape, batch, dtype, mask, sparsity and kernel: the machine (device, clocks, driver, versions), the bytes
of each array, median, p10 and p90 of the duration, bytes a second and the share of a plain stream's (a copy on the GPU,
a read on the CPU), the ratio to ``F.linear`` and to the limit that bytes set, and the error against float64. How it is
timed stands in :mod:`leap_kernels.benchmarks.products`. Where there is no GPU it says so and measures the CPU alone.
``--smoke``: the same on small matrices with few runs, to see that it works; the figures mean nothing.

Tokens a second and peak memory of whole models: ``python pipeline/benchmarks/decode.py --device cuda``.
"""

import argparse
import csv
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leap_kernels.benchmarks import plot
from leap_kernels.benchmarks.device import facts
from leap_kernels.benchmarks.products import BITMAP, COPY, DENSE, IDX8, READ, Timing, measure, reference
from leap_kernels.bmp128 import BMP128, byte_limit, pack
from leap_kernels.idx8 import from_bmp128
from leap_kernels.sparse_linear import sparse_linear, sparse_linear_reference

MASKS = ("random", "rows")
NO_GPU = "No GPU here: the CPU part alone is measured."


def make_mask(kind: str, shape: tuple[int, int], sparsity: float) -> Tensor:
    """bool [N, K]: "random" keeps each weight by chance, "rows" the same number in every row (less padding in IDX8)."""
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    if kind == "random":
        return scores >= sparsity
    kept = scores.topk(round((1 - sparsity) * shape[1]), dim=1).indices
    return torch.zeros(shape, dtype=torch.bool).scatter_(1, kept, True)


def rows_of(
    device: torch.device, shape: tuple[int, int], batch: int, dtype: torch.dtype, mask: str, sparsity: float,
    seconds: float, runs: int,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """The table's rows for one matrix: one for each kernel, and one for the dense product."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    packed = pack(weight, make_mask(mask, shape, sparsity)).to(device)
    real = 1 - packed.nnz / weight.numel()
    timed = measure(packed, batch, seconds, csr=dtype == torch.float32, least=runs)
    stream = reference(timed).bandwidth
    for name, timing in timed.items():
        if name in (READ, COPY):
            continue
        yield {
            **facts(device),
            "out": shape[0],
            "in": shape[1],
            "batch": batch,
            "dtype": str(dtype).removeprefix("torch."),
            "mask": mask,
            "sparsity": real,
            "kernel": name,
            **_bytes(name, packed, timing),
            "runs": len(timing.durations),
            **{f"{key}_us": 1e6 * timing.quantile(q) for key, q in (("p10", 0.1), ("median", 0.5), ("p90", 0.9))},
            "gb_per_s": timing.bandwidth / 1e9,
            "stream_gb_per_s": stream / 1e9,
            "share_of_stream": timing.bandwidth / stream,
            "speedup": timed[DENSE].median / timing.median,
            "byte_limit": "" if name == DENSE else byte_limit(real, dtype.itemsize),
            "share_of_limit": ""
            if name == DENSE
            else timed[DENSE].median / timing.median / byte_limit(real, dtype.itemsize),
            "error": _error(name, packed, batch),
        }


def _bytes(name: str, packed: BMP128, timing: Timing) -> dict[str, Any]:
    """Bytes by array: of the format that a kernel reads, and in all."""
    arrays: dict[str, Tensor] = {}
    if name in (BITMAP, IDX8):
        arrays = from_bmp128(packed).tensors() if name == IDX8 else packed.tensors()
    parts = ("bits", "off", "start", "base", "index", "vals")
    sizes = {f"bytes_{part}": arrays[part].nbytes if part in arrays else "" for part in parts}
    return {**sizes, "bytes": timing.nbytes}


def _error(name: str, packed: BMP128, batch: int) -> float | str:
    """Relative to the float64 product, where the kernel is ours."""
    if name not in (BITMAP, IDX8):
        return ""
    x = torch.randn(batch, packed.shape[1], generator=torch.Generator().manual_seed(2))
    x = x.to(packed.vals.device, packed.vals.dtype)
    exact = sparse_linear_reference(x, packed)
    y = sparse_linear(x, from_bmp128(packed) if name == IDX8 else packed)
    return float((y.double() - exact).norm() / exact.norm())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for speed.csv and speed.png")
    parser.add_argument("--shape", type=int, nargs=2, action="append", metavar=("OUT", "IN"))
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.6, 0.75, 0.9])
    parser.add_argument("--mask", nargs="+", choices=MASKS, default=["random"])
    parser.add_argument("--runs", type=int, default=1000, help="of each kernel, at least")
    parser.add_argument("--seconds", type=float, default=3, help="for one matrix, at least")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--smoke", action="store_true")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    shapes = [tuple(shape) for shape in given.shape or [[4096, 4096], [4096, 14336]]]
    if given.smoke:
        shapes, given.runs, given.seconds = [(256, 512)], 3, 0.01
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    if "cuda" not in devices:
        print(NO_GPU)
    rows: list[dict[str, Any]] = []
    for device, shape, batch, dtype, mask, sparsity in itertools.product(
        devices, shapes, given.batch, given.dtype, given.mask, given.sparsity
    ):
        wanted = (torch.device(device), shape, batch, getattr(torch, dtype), mask, sparsity)
        for row in rows_of(*wanted, given.seconds, given.runs):
            print(
                f"{device} {shape[0]}x{shape[1]} batch {batch} {dtype:9} {mask} {row['sparsity']:.1%} "
                f"{row['kernel']:15} {row['median_us']:9.1f} us  {row['gb_per_s']:7.1f} GB/s  x{row['speedup']:.2f}",
                flush=True,
            )
            rows.append(row)
    given.out.mkdir(parents=True, exist_ok=True)
    with (given.out / "speed.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    plot.draw(rows, given.out / "speed.png")
    print(given.out / "speed.csv", given.out / "speed.png")


if __name__ == "__main__":
    main()
