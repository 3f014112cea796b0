"""Native unpacking: the same bits as the reference, whatever the values are."""

import pytest
import torch
from leap_kernels import SparseLinear, bmp128, pack
from leap_kernels.unpack_bitmap_cpu import native_library, unpack_bitmap_cpu

INTEGER = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}

pytestmark = pytest.mark.skipif(native_library() is None, reason="no C++ compiler")


@pytest.mark.parametrize("dtype", bmp128.DTYPES)
@pytest.mark.parametrize("limit", [1 << 31, 50])
@pytest.mark.parametrize(("rows", "columns"), [(0, 128), (1, 1), (5, 127), (4, 129), (19, 576)])
def test_same_bits_as_the_reference(rows, columns, limit, dtype, monkeypatch):
    monkeypatch.setattr(bmp128, "_OFFSET_LIMIT", limit)
    generator = torch.Generator().manual_seed(columns)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    weight.view(-1)[::5], weight.view(-1)[1::7] = torch.nan, -0.0
    for density in (0.0, 0.4, 1.0):
        packed = pack(weight, torch.rand(rows, columns, generator=generator) < density)
        unpacked = unpack_bitmap_cpu(packed)
        assert unpacked.dtype == dtype
        assert torch.equal(unpacked.view(INTEGER[dtype]), packed.unpack().view(INTEGER[dtype]))


@pytest.mark.parametrize("bias", [True, False])
def test_module_is_the_dense_layer(bias):
    torch.manual_seed(0)
    dense = torch.nn.Linear(130, 9, bias=bias)
    with torch.no_grad():
        dense.weight[torch.rand(9, 130) < 0.5] = 0
        sparse = SparseLinear(pack(dense.weight), dense.bias)
        for shape in ((130,), (1, 130), (2, 3, 130), (50, 130)):
            x = torch.randn(shape)
            torch.testing.assert_close(sparse(x), dense(x))
        half = sparse.bfloat16()
        assert half(x.bfloat16()).dtype == torch.bfloat16
        assert half.bits.dtype == torch.uint32
