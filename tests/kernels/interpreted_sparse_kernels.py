"""Runs the Triton kernels for sparse matrices on CPU tensors, under TRITON_INTERPRET=1; test_triton_interpreted.py
starts it. Products are compared with float64, unpacked matrices bit for bit."""

import torch
from leap_kernels import bmp128, gemv_bitmap_triton, gemv_idx8_triton, pack, spmm_bitmap_triton
from leap_kernels.gemv_idx8_triton import gemv_idx8_reference
from leap_kernels.idx8 import PANEL, from_bmp128
from leap_kernels.sparse_linear import sparse_linear_reference
from leap_kernels.unpack_bitmap_triton import unpack_bitmap_triton
from leap_kernels.unpack_idx8_triton import unpack_idx8_triton

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


def check(product, x: torch.Tensor, packed: bmp128.BMP128, config=None, bias=None, idx8: bool = False) -> None:
    y = product(x, from_bmp128(packed) if idx8 else packed, bias, config)
    bias = torch.zeros(packed.shape[0]) if bias is None else bias
    error = (y.double() - sparse_linear_reference(x, packed) - bias.double()).abs()
    scale = x.double().abs() @ packed.unpack().double().abs().T + bias.double().abs()
    assert y.dtype == x.dtype
    assert y.shape == error.shape
    message = (product.__name__, packed.shape, x.shape, x.dtype, config, error.max())
    assert (error <= TOLERANCE[x.dtype] * scale + 1e-30).all(), message


def check_gemv(x: torch.Tensor, packed: bmp128.BMP128, config=None, bias=None) -> None:
    check(gemv_bitmap_triton.gemv_bitmap_triton, x, packed, config, bias)


def check_spmm(x: torch.Tensor, packed: bmp128.BMP128, config=None, bias=None) -> None:
    check(spmm_bitmap_triton.spmm_bitmap_triton, x, packed, config, bias)


def check_idx8(x: torch.Tensor, packed: bmp128.BMP128, config=None, bias=None) -> None:
    torch.testing.assert_close(gemv_idx8_reference(x, from_bmp128(packed)), sparse_linear_reference(x, packed))
    check(gemv_idx8_triton.gemv_idx8_triton, x, packed, config, bias, idx8=True)


def check_unpacked(packed: bmp128.BMP128) -> None:
    integer = INTEGER[packed.vals.dtype]
    for dense in (unpack_bitmap_triton(packed), unpack_idx8_triton(from_bmp128(packed))):
        assert torch.equal(dense.view(integer), packed.unpack().view(integer))


for dtype in bmp128.DTYPES:
    for kind, rows, columns in (("half", 6, 300), ("edges", 5, 129)):
        packed = matrix(rows, columns, dtype, kind)
        check_gemv(rows_of_x(1, packed), packed)
        check_idx8(rows_of_x(1, packed), packed)
        check_unpacked(packed)
        if dtype != torch.float32:
            check_spmm(rows_of_x(3, packed), packed)
    bias = torch.arange(1.0, 6.0).to(dtype)
    for batch in (1, 2):
        check_gemv(rows_of_x(batch, packed), packed, bias=bias)
        check_idx8(rows_of_x(batch, packed), packed, bias=bias)
    check_idx8(rows_of_x(8, packed), packed)  # passes side by side: two of four rows, or four of two
    strided = rows_of_x(4, packed)[::2]
    check_gemv(strided, packed)
    check_idx8(strided[1:], packed)
    if dtype != torch.float32:
        check_spmm(strided, packed, bias=bias)
        check_spmm(rows_of_x(13, packed), packed)

packed = matrix(9, 700, torch.bfloat16, "half")
for batch in (3, 5):  # one pass for four rows, two passes, each with rows that are not there
    check_idx8(rows_of_x(batch, packed), packed)
check_gemv(rows_of_x(2, packed), packed)
# Every configuration that a benchmark may choose: more warps than there is work, too.
packed = matrix(5, 300, torch.bfloat16, "half")
for config in gemv_idx8_triton.candidates():
    check_idx8(rows_of_x(1, packed), packed, config)
# More than one panel of columns: a full row, an empty one, the rest with one value in one of them.
packed = matrix(5, PANEL + 129, torch.bfloat16, "edges")
for batch, config in ((1, None), (2, gemv_idx8_triton.Config(4, 2, True)), (1, gemv_idx8_triton.Config(16, 4))):
    check_idx8(rows_of_x(batch, packed), packed, config)
check_unpacked(packed)
packed = matrix(5, 300, torch.bfloat16, "half")
for config in gemv_bitmap_triton.candidates():
    check_gemv(rows_of_x(1, packed), packed, config)
packed = matrix(17, 1200, torch.float16, "half")  # more groups than splits, two tiles of rows
check_spmm(rows_of_x(32, packed), packed)
for config in spmm_bitmap_triton.candidates()[::4]:
    check_spmm(rows_of_x(2, packed), packed, config)
check_unpacked(packed)

for packed in (pack(torch.zeros(1, 1)), pack(torch.ones(1, 128)), pack(torch.zeros(3, 5)), pack(torch.ones(1, 1))):
    check_gemv(rows_of_x(1, packed), packed)
    check_idx8(rows_of_x(1, packed), packed)
    check_unpacked(packed)

special = torch.tensor([[0.0, -0.0, torch.nan, -torch.nan, torch.inf, 1e-45]])
check_unpacked(pack(special, torch.ones(1, 6, dtype=torch.bool)))
# What stands beside a wanted value must not enter: row 0 keeps ones, among the values of rows of infinity and NaN.
weight = torch.ones(3, 256, dtype=torch.bfloat16)
weight[1], weight[2] = torch.inf, torch.nan
packed = pack(weight, torch.rand(3, 256, generator=torch.Generator().manual_seed(0)) < 0.5)
ones = torch.ones(2, 256, dtype=torch.bfloat16)
for y in (
    gemv_bitmap_triton.gemv_bitmap_triton(ones, packed),
    spmm_bitmap_triton.spmm_bitmap_triton(ones, packed),
    gemv_idx8_triton.gemv_idx8_triton(ones, from_bmp128(packed)),
):
    assert (y[:, 0] == packed.mask()[0].sum().bfloat16()).all()
    assert y[:, 1].isposinf().all()
    assert y[:, 2].isnan().all()
# A row of x must not enter another one's result, and the bits of several are loaded as one word.
x = rows_of_x(3, packed := matrix(6, 300, torch.bfloat16, "half"))
x[1] = torch.nan
for y in (
    gemv_bitmap_triton.gemv_bitmap_triton(x, packed),
    gemv_idx8_triton.gemv_idx8_triton(x, from_bmp128(packed)),
):
    assert y[1].isnan().all()
    assert y[::2].isfinite().all()

bmp128._OFFSET_LIMIT = 100  # so that row_base is used
packed = matrix(6, 200, torch.float16, "half")
assert packed.row_base is not None
check_gemv(rows_of_x(2, packed), packed)
check_spmm(rows_of_x(2, packed), packed)
check_unpacked(packed)
print("interpreted kernels agree")
