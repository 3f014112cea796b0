"""Which op multiplies by a packed matrix: the one place where device, rows of x, dtype and format decide."""

import functools
from typing import Literal, Protocol

import torch

Op = Literal["gemv_bitmap_cpu", "gemv_bitmap_triton", "gemv_idx8_triton", "spmm_bitmap_triton", "dense"]
Format = Literal["bmp128", "idx8"]

# Rows of x up to which an op pays. Beyond, arithmetic and not bytes set the pace, and the matrix is unpacked for the
# call.
MAX_ROWS_CPU = 16  # README.md, "Measured"
MAX_ROWS_SPMM = 32  # two tiles of 16, the narrowest that tensor cores multiply
MAX_ROWS_GEMV = 4  # for float32, which they would round: the GEMV for each row, only the first from memory. A guess.
# A pass serves 4 rows, and each costs about as much as unpacking: for 4096 x 4096 at 60 % on an H200 two passes took 55
# microseconds, unpacking and a dense product 39 (docs/results.md).
MAX_ROWS_IDX8 = 4

# Bytes per clock and SM above which IDX8-64 is held instead of BMP128. A model value. At half density and
# 2-byte values IDX8 takes 1.55 bytes and 6.6 instructions per weight, BMP128 1.16 and 11.4. With 128 instructions per
# clock they cost the same at 17 bytes per clock; 8 supposes that half of the issue slots are filled. By data sheets:
# RTX 4090 3, RTX 3090 7, A100 10 to 13, H100 13, B200 27.
IDX8_BYTES_PER_CLOCK = 8.0

_CPU_DTYPES = (torch.float32, torch.bfloat16)


def choose_op(
    device_type: str,
    rows: int,
    dtype: torch.dtype,
    *,
    matrix_format: Format = "bmp128",
    native: bool = True,
    differentiable: bool = False,
) -> Op:
    """Name of the op for ``rows`` rows of x, [rows, K], on a device of this type ("cpu", "cuda").

    matrix_format: how the matrix is held. native: whether the C++ library can be had. differentiable: whether x wants
    a gradient, which only "dense", unpacking for the call, gives. "dense" is also what is left for prefill, for large
    batches, and for dtypes without a kernel.
    """
    if differentiable or rows < 1:
        return "dense"
    if device_type == "cpu":
        packed = native and matrix_format == "bmp128" and dtype in _CPU_DTYPES and rows <= MAX_ROWS_CPU
        return "gemv_bitmap_cpu" if packed else "dense"
    if device_type != "cuda":
        return "dense"
    if matrix_format == "idx8":
        return "gemv_idx8_triton" if rows <= MAX_ROWS_IDX8 else "dense"
    if rows == 1 or (dtype == torch.float32 and rows <= MAX_ROWS_GEMV):
        return "gemv_bitmap_triton"
    return "spmm_bitmap_triton" if dtype != torch.float32 and rows <= MAX_ROWS_SPMM else "dense"


def choose_format(bytes_per_clock: float, itemsize: int, columns: int) -> Format:
    """How to hold a matrix on a GPU that reads ``bytes_per_clock`` bytes per clock and SM, for decoding at batch 1.

    itemsize: bytes of a value. Matrices that IDX8-64's 16-bit column bases cannot address stay BMP128.
    """
    fits = itemsize == 2 and columns <= 2**16
    return "idx8" if fits and bytes_per_clock > IDX8_BYTES_PER_CLOCK else "bmp128"


class GpuProperties(Protocol):
    """What is asked of a GPU's properties, as ``torch.cuda.get_device_properties`` gives them."""

    clock_rate: int
    """kHz, as the memory's."""
    memory_clock_rate: int
    memory_bus_width: int
    """Bits."""
    multi_processor_count: int


def bytes_per_clock(gpu: GpuProperties) -> float:
    """Memory bandwidth of a GPU per clock and SM, from the clocks and the bus width that its driver reports."""
    bandwidth = 2 * gpu.memory_clock_rate * gpu.memory_bus_width / 8  # kB/s; memory transfers on both clock edges
    return bandwidth / (gpu.multi_processor_count * gpu.clock_rate)


@functools.cache
def _bytes_per_clock(device: torch.device) -> float:
    return bytes_per_clock(torch.cuda.get_device_properties(device))


def format_for(device: torch.device, dtype: torch.dtype, columns: int) -> Format:
    """How to hold a matrix [N, columns] on a device for decoding: see :func:`choose_format`. CPUs read BMP128."""
    return choose_format(_bytes_per_clock(device), dtype.itemsize, columns) if device.type == "cuda" else "bmp128"
