"""Runs the Triton bitmap GEMV on CPU tensors, under TRITON_INTERPRET=1, and compares it with float64.

A script rather than a test because Triton reads the variable when it is imported; test_gemv_triton.py starts it.
"""

import torch
from leap_kernels import bmp128, pack
from leap_kernels.gemv_bitmap_triton import gemv_bitmap_triton
from leap_kernels.sparse_linear import sparse_linear_reference

# Relative to the sum of magnitudes; the interpreter truncates to bfloat16 where hardware rounds.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def check(rows: int, columns: int, batch: int, density: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    packed = pack(weight, torch.rand(rows, columns, generator=generator) < density)
    x = torch.randn(batch, columns, generator=generator).to(dtype)
    error = (gemv_bitmap_triton(x, packed).double() - sparse_linear_reference(x, packed)).abs()
    scale = x.double().abs() @ packed.unpack().double().abs().T
    assert (error <= TOLERANCE[dtype] * scale + 1e-30).all(), error.max()


check(9, 300, 2, 0.5, torch.float32)
check(4, 128, 1, 1.0, torch.bfloat16)
check(5, 513, 1, 0.1, torch.float16)
check(1, 1, 1, 0.0, torch.float32)
bmp128._OFFSET_LIMIT = 100  # so that row_base is used
check(6, 200, 1, 0.5, torch.float32)
print("interpreted kernel agrees")
