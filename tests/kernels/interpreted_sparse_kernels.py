"""Runs the Triton kernels for sparse matrices on CPU tensors, under TRITON_INTERPRET=1; test_triton_interpreted.py
starts it. Products are compared with float64, unpacked matrices bit for bit."""

import torch
from leap_kernels import bmp128, pack
from leap_kernels.gemv_bitmap_triton import gemv_bitmap_triton
from leap_kernels.gemv_idx8_triton import gemv_idx8_reference, gemv_idx8_triton
from leap_kernels.idx8 import from_bmp128
from leap_kernels.sparse_linear import sparse_linear_reference
from leap_kernels.spmm_bitmap_triton import spmm_bitmap_triton
from leap_kernels.unpack_bitmap_triton import unpack_bitmap_triton

# Relative to the sum of magnitudes; the interpreter truncates to bfloat16 where hardware rounds.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
INTEGER = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def matrix(rows: int, columns: int, dtype: torch.dtype, kind: str) -> bmp128.BMP128:
    generator = torch.Generator().manual_seed(rows + columns)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    uniform = torch.rand(rows, columns, generator=generator)
    mask = uniform < 0.5
    if kind == "edges":  # a full row, an empty one, the rest with one value each
        mask = uniform == uniform.amax(dim=1, keepdim=True)
        mask[0], mask[1] = True, False
    return pack(weight, mask)


def rows_of_x(batch: int, packed: bmp128.BMP128) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, packed.shape[1], generator=generator).to(packed.vals.dtype)


def check(name: str, y: torch.Tensor, x: torch.Tensor, packed: bmp128.BMP128) -> None:
    error = (y.double() - sparse_linear_reference(x, packed)).abs()
    scale = x.double().abs() @ packed.unpack().double().abs().T
    assert y.dtype == x.dtype
    assert y.shape == error.shape
    assert (error <= TOLERANCE[x.dtype] * scale + 1e-30).all(), (name, packed.shape, x.shape, x.dtype, error.max())


def check_unpacked(packed: bmp128.BMP128) -> None:
    integer = INTEGER[packed.vals.dtype]
    assert torch.equal(unpack_bitmap_triton(packed).view(integer), packed.unpack().view(integer))


def check_idx8(batch: int, packed: bmp128.BMP128) -> None:
    x, weight = rows_of_x(batch, packed), from_bmp128(packed)
    torch.testing.assert_close(gemv_idx8_reference(x, weight), sparse_linear_reference(x, packed))
    check("idx8", gemv_idx8_triton(x, weight), x, packed)


for dtype in bmp128.DTYPES:
    for kind, rows, columns in (("half", 6, 300), ("edges", 5, 129)):
        packed = matrix(rows, columns, dtype, kind)
        check("gemv", gemv_bitmap_triton(rows_of_x(1, packed), packed), rows_of_x(1, packed), packed)
        check_idx8(1, packed)
        check_unpacked(packed)
        if dtype != torch.float32:
            x = rows_of_x(3, packed)
            check("spmm", spmm_bitmap_triton(x, packed), x, packed)

packed = matrix(9, 700, torch.bfloat16, "half")
for batch in (2, 3, 5):  # one pass for two rows, one for four, two passes
    check_idx8(batch, packed)
x = rows_of_x(2, packed)
check("gemv", gemv_bitmap_triton(x, packed), x, packed)
packed = matrix(17, 1200, torch.float16, "half")  # more groups than splits, two tiles of rows
x = rows_of_x(32, packed)
check("spmm", spmm_bitmap_triton(x, packed), x, packed)

for packed in (pack(torch.zeros(1, 1)), pack(torch.ones(1, 128))):
    check("gemv", gemv_bitmap_triton(rows_of_x(1, packed), packed), rows_of_x(1, packed), packed)
    check_idx8(1, packed)

special = torch.tensor([[0.0, -0.0, torch.nan, -torch.nan, torch.inf, 1e-45]])
check_unpacked(pack(special, torch.ones(1, 6, dtype=torch.bool)))
# What stands beside a wanted value must not enter: row 0 keeps ones, among the values of rows of infinity and NaN.
weight = torch.ones(3, 256, dtype=torch.bfloat16)
weight[1], weight[2] = torch.inf, torch.nan
packed = pack(weight, torch.rand(3, 256, generator=torch.Generator().manual_seed(0)) < 0.5)
ones = torch.ones(2, 256, dtype=torch.bfloat16)
for y in (
    gemv_bitmap_triton(ones, packed),
    spmm_bitmap_triton(ones, packed),
    gemv_idx8_triton(ones, from_bmp128(packed)),
):
    assert (y[:, 0] == packed.mask()[0].sum().bfloat16()).all()
    assert y[:, 1].isposinf().all()
    assert y[:, 2].isnan().all()

bmp128._OFFSET_LIMIT = 100  # so that row_base is used
packed = matrix(6, 200, torch.float16, "half")
assert packed.row_base is not None
x = rows_of_x(2, packed)
check("gemv", gemv_bitmap_triton(x, packed), x, packed)
check("spmm", spmm_bitmap_triton(x, packed), x, packed)
check_unpacked(packed)
print("interpreted kernels agree")
