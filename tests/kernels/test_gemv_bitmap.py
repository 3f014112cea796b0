"""Sparse linear layers: each instruction set of the CPU kernel against float64, and the choice between paths."""

import pytest
import torch
from leap_kernels import bmp128, gemv_bitmap_cpu, pack, sparse_linear
from leap_kernels.dispatch import MAX_ROWS_CPU
from leap_kernels.sparse_linear import sparse_linear_reference

LIBRARY = gemv_bitmap_cpu.native_library()
AVAILABLE = gemv_bitmap_cpu.ISAS[: LIBRARY.leap_best_isa() + 1] if LIBRARY else ()
# Float32 sums of a few hundred products; bfloat16 adds the rounding of the result.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8}

needs_library = pytest.mark.skipif(LIBRARY is None, reason="no C++ compiler")


def make(rows, columns, batch, density=0.5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows + columns + batch)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    mask = torch.rand(rows, columns, generator=generator) < density
    x = torch.randn(batch, columns, generator=generator).to(dtype)
    return pack(weight, mask), x


def assert_exact(y, x, packed):
    scale = x.double().abs() @ packed.unpack().double().abs().T  # what the rounding of the sum is relative to
    error = (y.double() - sparse_linear_reference(x, packed)).abs()
    assert (error <= TOLERANCE[x.dtype] * scale + 1e-30).all()


@pytest.fixture(params=gemv_bitmap_cpu.ISAS)
def isa(request, monkeypatch):
    if request.param not in AVAILABLE:
        pytest.skip(f"{request.param} is not available here")
    monkeypatch.setenv("LEAP_CPU_ISA", request.param)
    return request.param


@pytest.mark.parametrize("dtype", gemv_bitmap_cpu.DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 31), (3, 128), (17, 129), (33, 500)])
def test_matches_float64(isa, rows, columns, dtype):
    for density in (0.0, 0.03, 0.5, 1.0):
        packed, x = make(rows, columns, 1, density, dtype)
        assert_exact(sparse_linear(x, packed), x, packed)


@pytest.mark.parametrize("dtype", gemv_bitmap_cpu.DTYPES)
def test_every_batch(isa, dtype):
    """The blocks of 8, 4, 2 and 1 rows of x, with an odd number of weight rows."""
    for batch in range(1, MAX_ROWS_CPU + 1):
        packed, x = make(19, 300, batch, 0.5, dtype)
        assert_exact(sparse_linear(x, packed), x, packed)


@pytest.mark.parametrize("dtype", gemv_bitmap_cpu.DTYPES)
def test_columns_in_several_stretches(isa, dtype):
    """Wide enough that x does not fit into the first-level cache at once."""
    packed, x = make(35, 3500, 14, 0.4, dtype)
    assert_exact(sparse_linear(x, packed), x, packed)


def test_values_outside_the_mask_never_enter(isa):
    """Neighbouring values are loaded with the wanted ones; infinities among them must not become NaN."""
    weight = torch.ones(4, 256)
    weight[1] = torch.inf
    weight[2, ::2] = torch.nan
    mask = torch.rand(4, 256, generator=torch.Generator().manual_seed(0)) < 0.5
    y = sparse_linear(torch.ones(1, 256), pack(weight, mask))[0]
    assert y[0] == mask[0].sum()
    assert y[1] == torch.inf
    assert y[2].isnan()
    assert y[3] == mask[3].sum()


def test_row_base(isa, monkeypatch):
    monkeypatch.setattr(bmp128, "_OFFSET_LIMIT", 100)
    packed, x = make(9, 300, 3)
    assert packed.row_base is not None
    assert_exact(sparse_linear(x, packed), x, packed)


@needs_library
def test_threads_and_shapes():
    packed, x = make(333, 256, 6)
    bias = torch.randn(333)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(sparse_linear(x.view(2, 3, 256), packed, bias))
    finally:
        torch.set_num_threads(threads)
    assert results[0].shape == (2, 3, 333)
    assert all(torch.equal(results[0], other) for other in results)
    assert_exact(results[0].view(6, 333) - bias, x, packed)
    strided = x.repeat_interleave(2, dim=1)[:, ::2]
    assert torch.equal(sparse_linear(strided, packed), sparse_linear(x, packed))


@pytest.mark.parametrize("batch", [0, MAX_ROWS_CPU + 1])
def test_unpacks_for_other_batches(batch, monkeypatch):
    monkeypatch.setattr(gemv_bitmap_cpu, "gemv_bitmap_cpu", None)
    packed, x = make(10, 130, batch)
    assert_exact(sparse_linear(x, packed), x, packed)


def test_unpacks_where_a_gradient_is_wanted():
    packed, x = make(10, 130, 2)
    x.requires_grad_()
    sparse_linear(x, packed).sum().backward()
    torch.testing.assert_close(x.grad, packed.unpack().sum(0).expand(2, -1))


def test_float16_and_no_compiler_unpack(monkeypatch):
    packed, x = make(10, 130, 2, dtype=torch.float16)
    assert torch.equal(sparse_linear(x, packed), torch.nn.functional.linear(x, packed.unpack()))
    monkeypatch.setattr(gemv_bitmap_cpu, "native_library", lambda: None)
    packed, x = make(10, 130, 2)
    assert_exact(sparse_linear(x, packed), x, packed)


@needs_library
def test_bad_arguments_name_themselves(monkeypatch):
    packed, x = make(10, 130, 2)
    with pytest.raises(ValueError, match="weight"):
        sparse_linear(x[:, :-1], packed)
    with pytest.raises(ValueError, match="bfloat16"):
        sparse_linear(x.bfloat16(), packed)
    monkeypatch.setenv("LEAP_CPU_ISA", "mmx")
    with pytest.raises(ValueError, match="LEAP_CPU_ISA=mmx"):
        sparse_linear(x, packed)
