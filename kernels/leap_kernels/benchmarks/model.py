"""What a product with a packed matrix should take on a GPU, before it is measured.

    python -m leap_kernels.benchmarks.model

microseconds = max(bytes / bandwidth, instructions / issue, lookups of x / shared memory) + start. Bandwidths are
those of a large copy measured on such a card; instructions are those of ``aot_table.json`` for sm_90.
"""

from dataclasses import dataclass

import torch

from leap_kernels.benchmarks.matrices import SHAPES
from leap_kernels.dispatch import choose_op

SPARSITIES = (0.5, 0.6, 0.7)


@dataclass(frozen=True)
class Gpu:
    bandwidth: float
    """Bytes a second, of a large copy (read and written)."""
    clock: float = 1.83e9
    """Hz."""
    processors: int = 132
    cache: float = 50e6
    """Bytes of the second level, which may still hold what the kernel before has written."""


GPUS = {"H100": Gpu(3.0e12), "H200": Gpu(4.3e12)}

START = 2.5e-6  # of a kernel in a graph: its own start, the first loads' latency twice, the last sums. A guess
ISSUE = 128  # thread-instructions per clock and SM
FILL = 0.75  # of them that are filled. A guess
# Clocks that 32 lookups of x in shared memory take: the fullest of its 32 banks gets that many of them. For 4
# rows of x as one word of 8 bytes, half of the lookups at a time over 16 pairs of banks.
LOOKUP = {1: 3.5, 2: 3.5, 4: 6.2}
# Instructions per weight: of the matrix whatever is kept (the bitmap's), or for half density, in proportion to what is
# kept (IDX8's), by rows of x in a pass.
BITMAP_INSTRUCTIONS = 10.4
SPMM_INSTRUCTIONS = 17.0
IDX8_INSTRUCTIONS = {1: 7.0, 2: 9.0, 4: 13.3}


def bytes_per_weight(sparsity: float, matrix_format: str) -> float:
    """Of a matrix [N, about 4096] with random places and values of 2 bytes: "dense", "bmp128" or "idx8"."""
    density = 1 - sparsity
    if matrix_format == "dense":
        return 2.0
    if matrix_format == "bmp128":
        return density * 2 + 20 / 128
    # A chunk spans 255 columns at most; the fullest of 4 rows sets their number: measured on such matrices.
    padding = 1.04 if density >= 0.35 else 1.06
    return density * padding * (3 + 2 / 64)


def _seconds(read: float, thread_instructions: float, lookup_clocks: float, gpu: Gpu) -> float:
    issued = gpu.processors * gpu.clock
    return max(read / gpu.bandwidth, thread_instructions / (issued * ISSUE * FILL), lookup_clocks / issued)


def predict(shape: tuple[int, int], sparsity: float, matrix_format: str, gpu: str, rows: int = 1) -> float:
    """Microseconds of ``x @ W.T`` in a graph's replay, W not in a cache, bfloat16.

    shape: (N, K). matrix_format: "dense", "bmp128" or "idx8". gpu: a name in GPUS. rows: of x.
    """
    card, weights = GPUS[gpu], shape[0] * shape[1]
    packed = weights * bytes_per_weight(sparsity, matrix_format)
    dense = _seconds(weights * 2, 0, 0, card) + START
    if matrix_format == "dense":
        return dense * 1e6
    op = choose_op("cuda", rows, torch.bfloat16, matrix_format="idx8" if matrix_format == "idx8" else "bmp128")
    if op == "dense":  # unpack, then multiply: where it fits, out of the second-level cache
        again = 0.5 if weights * 2 < card.cache else 1.0
        return (_seconds(packed + weights * 2, 0, 0, card) + START + weights * 2 * again / card.bandwidth + START) * 1e6
    if op == "gemv_idx8_triton":
        batch = min(4, 1 << (rows - 1).bit_length())
        passes = -(-rows // batch)
        kept = weights * (1 - sparsity) * passes
        instructions = kept * 2 * IDX8_INSTRUCTIONS[batch]
        seconds = _seconds(packed, instructions, kept / 32 * LOOKUP[batch], card)
        return (seconds + START) * 1e6
    if op == "gemv_bitmap_triton":
        return (_seconds(packed, weights * BITMAP_INSTRUCTIONS, weights / 32, card) + START) * 1e6
    return (_seconds(packed, weights * SPMM_INSTRUCTIONS, weights / 32, card) + 2 * START) * 1e6  # and adds the parts


def main() -> None:
    for gpu in GPUS:
        for rows in (1, 8):
            for shape in SHAPES:
                dense = predict(shape, 0.0, "dense", gpu, rows)
                print(f"{gpu}, {rows} rows of x, {shape[0]} x {shape[1]}: dense {dense:.1f} microseconds")
                for sparsity in SPARSITIES:
                    taken = {name: predict(shape, sparsity, name, gpu, rows) for name in ("bmp128", "idx8")}
                    told = ", ".join(f"{name} {took:.1f} ({dense / took:.2f} x)" for name, took in taken.items())
                    print(f"    {sparsity:.0%}: {told}")


if __name__ == "__main__":
    main()
