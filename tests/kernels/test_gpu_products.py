"""Products with packed matrices on a GPU, at the shapes of an 8B model: against float64, in a graph, compiled."""

import pytest
import torch
from leap_kernels import SparseLinear, pack, sparse_linear
from leap_kernels.idx8 import from_bmp128

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that CUDA sees"),
]

DEVICE = "cuda"
SHAPES = [(4096, 4096), (4096, 14336), (14336, 4096), (1024, 4096), (1023, 4095), (5, 129)]
ROWS = [1, 2, 4, 8, 12, 13, 16, 32, 33]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Relative to the sum of magnitudes: a rounding of the result, and of float32 sums.
TOLERANCE = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10, torch.float32: 1e-5}


def packed_matrix(shape, dtype, density=0.5):
    generator = torch.Generator(DEVICE).manual_seed(0)
    weight = torch.randn(shape, generator=generator, device=DEVICE).to(dtype)
    mask = torch.rand(shape, generator=generator, device=DEVICE) < density
    mask[shape[0] // 2] = False  # an empty row and a full one
    mask[-1] = True
    return pack(weight, mask)


def held(packed, matrix_format):
    return from_bmp128(packed) if matrix_format == "idx8" else packed


def poison(elements, dtype):
    """Leave NaN in the memory that the next result is likely to get."""
    del_me = [torch.full((elements,), torch.nan, dtype=dtype, device=DEVICE) for _ in range(4)]
    del del_me


def check(y, x, dense, bias):
    wide, exact_x = dense.double(), x.double()
    expected = exact_x @ wide.T + bias.double()
    scale = exact_x.abs() @ wide.abs().T + bias.double().abs()
    assert y.dtype == x.dtype
    assert y.isfinite().all()
    assert ((y.double() - expected).abs() <= TOLERANCE[x.dtype] * scale + 1e-30).all()


@pytest.fixture(autouse=True)
def _exact_dense_products():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("matrix_format", ["bmp128", "idx8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product_against_float64(shape, dtype, matrix_format):
    packed = packed_matrix(shape, dtype)
    weight, dense = held(packed, matrix_format), packed.unpack()
    bias = torch.randn(shape[0], device=DEVICE).to(dtype)
    for rows in ROWS:
        x = torch.randn(rows, shape[1], device=DEVICE).to(dtype)
        for given in (x, x.repeat(1, 2)[:, 1 : shape[1] + 1]):  # contiguous, and unaligned slices of rows
            poison(rows * shape[0], dtype)
            check(sparse_linear(given, weight, bias), given, dense, bias)
    x = torch.randn(shape[1] + 1, device=DEVICE).to(dtype)[1:]  # contiguous and unaligned
    check(sparse_linear(x[None], weight, bias), x[None], dense, bias)


@pytest.mark.parametrize("matrix_format", ["bmp128", "idx8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unpacking_bit_for_bit(shape, dtype, matrix_format):
    from leap_kernels.product import dense

    packed = packed_matrix(shape, dtype)
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    expected = packed.unpack().view(integer)
    weight = held(packed, matrix_format)
    for _ in range(3):
        poison(shape[0] * shape[1], dtype)
        assert torch.equal(dense(weight).view(integer), expected)


@pytest.mark.parametrize("shape", [(1024, 4096), (1023, 4095)], ids=str)
def test_every_configuration(shape):
    from leap_kernels import gemv_bitmap_triton, gemv_idx8_triton, spmm_bitmap_triton

    packed = packed_matrix(shape, torch.bfloat16)
    weight, dense = from_bmp128(packed), packed.unpack()
    bias = torch.randn(shape[0], device=DEVICE).bfloat16()
    for rows, module, product, matrix in (
        (1, gemv_idx8_triton, gemv_idx8_triton.gemv_idx8_triton, weight),
        (8, gemv_idx8_triton, gemv_idx8_triton.gemv_idx8_triton, weight),
        (1, gemv_bitmap_triton, gemv_bitmap_triton.gemv_bitmap_triton, packed),
        (16, spmm_bitmap_triton, spmm_bitmap_triton.spmm_bitmap_triton, packed),
    ):
        x = torch.randn(rows, shape[1], device=DEVICE).bfloat16()
        for config in module.candidates():
            poison(rows * shape[0], x.dtype)
            check(product(x, matrix, bias, config), x, dense, bias)


@pytest.mark.parametrize("rows", [1, 8, 33])
@pytest.mark.parametrize("matrix_format", ["bmp128", "idx8"])
def test_capture_in_a_graph_and_no_synchronisation(matrix_format, rows):
    packed = packed_matrix((1024, 4096), torch.bfloat16)
    layer = SparseLinear(held(packed, matrix_format))
    x = torch.randn(rows, 4096, device=DEVICE).bfloat16()
    with torch.no_grad():
        layer(x)  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            layer(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        x.copy_(torch.randn(rows, 4096, device=DEVICE))
        y.fill_(torch.nan)
        graph.replay()
    check(y, x, packed.unpack(), torch.zeros(1024, device=DEVICE))


@pytest.mark.parametrize("matrix_format", ["bmp128", "idx8"])
def test_compiled_without_a_break(matrix_format):
    packed = packed_matrix((1024, 4096), torch.bfloat16)
    layer = SparseLinear(held(packed, matrix_format), torch.randn(1024, device=DEVICE).bfloat16())
    compiled = torch.compile(layer, fullgraph=True)
    with torch.no_grad():
        for rows in (1, 8, 33):
            x = torch.randn(rows, 4096, device=DEVICE).bfloat16()
            assert torch.equal(compiled(x), layer(x))


def test_autocast_gives_the_dtype_of_a_dense_layer():
    packed = packed_matrix((1024, 4096), torch.bfloat16)
    x = torch.randn(1, 4096, device=DEVICE)
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        y = sparse_linear(x, from_bmp128(packed))
        assert torch.nn.functional.linear(x, packed.unpack()).dtype == y.dtype
    check(y, x.bfloat16(), packed.unpack(), torch.zeros(1024, device=DEVICE))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_another_device_than_the_current_one():
    packed = packed_matrix((1024, 4096), torch.bfloat16)
    x = torch.randn(1, 4096, device=DEVICE).bfloat16()
    for matrix_format in ("bmp128", "idx8"):
        weight = held(packed, matrix_format)
        expected = sparse_linear(x, weight)
        for _ in range(2):
            assert torch.equal(sparse_linear(x.to("cuda:1"), weight.to("cuda:1")).to(DEVICE), expected)
