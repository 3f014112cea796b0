"""IDX8-64: exact round trips from BMP128, the layout of an example, and how much padding there can be."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from leap_kernels import bmp128, pack
from leap_kernels.idx8 import BLOCK_ROWS, CHUNK, PADDING_INDEX, PANEL, from_bmp128

INTEGER = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(INTEGER[a.dtype]), b.view(INTEGER[b.dtype]))


def random_bits(rows: int, columns: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Every bit pattern may occur: infinities, NaN with payloads, -0, subnormal numbers."""
    generator = torch.Generator().manual_seed(seed)
    integer = INTEGER[dtype]
    limits = torch.iinfo(integer)
    return torch.randint(limits.min, limits.max, (rows, columns), dtype=integer, generator=generator).view(dtype)


def masks(rows: int, columns: int, kind: str, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(rows, columns, generator=generator)
    if kind == "empty":
        return uniform < 0
    if kind == "full":
        return uniform >= 0
    if kind == "one per row":
        return uniform == uniform.amax(dim=1, keepdim=True)
    if kind == "some rows empty or full":
        level = torch.randint(0, 3, (rows, 1), generator=generator) / 2
        return uniform < level
    return uniform < float(kind)


KINDS = ["empty", "full", "one per row", "some rows empty or full", "0.5", "0.02"]


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 13),
    columns=st.integers(1, 700),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(bmp128.DTYPES),
    seed=st.integers(0, 2**31),
)
def test_round_trip_and_bound_on_padding(rows, columns, kind, dtype, seed):
    mask = masks(rows, columns, kind, seed)
    packed = pack(random_bits(rows, columns, dtype, seed), mask)
    matrix = from_bmp128(packed)
    assert torch.equal(matrix.mask(), mask)
    assert same_bits(matrix.unpack(), packed.unpack())
    assert matrix.nnz == packed.nnz

    padding = matrix.index == PADDING_INDEX
    assert not matrix.vals.view(INTEGER[dtype])[padding].any()
    # A row's chunks but its last are full or were cut after 255 columns, of which there are (K - 1) // 255 at most.
    longest = torch.nn.functional.pad(mask.sum(1), (0, -rows % BLOCK_ROWS)).view(-1, BLOCK_ROWS).amax(1)
    chunks = torch.diff(matrix.start)
    assert (chunks <= longest // CHUNK + (columns - 1) // 255 + 1).all()
    assert (chunks * CHUNK >= longest).all()


@pytest.mark.parametrize("shape", [(0, 100), (3, 0), (0, 0)])
def test_empty_matrices(shape):
    matrix = from_bmp128(pack(torch.zeros(shape)))
    assert matrix.unpack().shape == shape
    assert matrix.nnz == matrix.base.numel() == 0


def test_special_values_survive():
    special = torch.tensor([[0.0, -0.0, torch.nan, -torch.nan, torch.inf, 1e-45]])
    packed = pack(special, torch.ones(1, 6, dtype=torch.bool))
    assert same_bits(from_bmp128(packed).unpack(), special)


def test_layout_of_an_example():
    """Two rows of 600 columns, kept: (0, 3), (0, 257), (0, 258), (1, 599). A chunk's last column is its base + 254."""
    weight = torch.zeros(2, 600)
    weight[0, 3], weight[0, 257], weight[0, 258], weight[1, 599] = 1, 2, 3, 4
    matrix = from_bmp128(pack(weight))
    assert matrix.start.tolist() == [0, 2]
    assert matrix.base.tolist() == [[3, 599, 0, 0], [258, 0, 0, 0]]
    assert matrix.index[0, 0, :3].tolist() == [0, 254, 255]
    assert matrix.vals[0, 0, :3].tolist() == [1, 2, 0]
    assert (matrix.index[1, 0, 0], matrix.vals[1, 0, 0]) == (0, 3)
    assert (matrix.index[0, 1, 0], matrix.vals[0, 1, 0]) == (0, 4)
    assert matrix.nnz == 4


def test_no_chunk_crosses_a_panel():
    """Two rows of two panels, kept: the last 2 columns of the first panel and the first 2 of the second in row 1."""
    weight = torch.zeros(2, PANEL + 7)
    weight[1, PANEL - 2 : PANEL + 2] = torch.arange(1.0, 5.0)
    weight[0, PANEL + 6] = 5
    matrix = from_bmp128(pack(weight))
    assert matrix.start.tolist() == [0, 1, 2]
    assert matrix.base.tolist() == [[0, PANEL - 2, 0, 0], [PANEL + 6, PANEL, 0, 0]]
    assert matrix.index[:, 1, :3].tolist() == [[0, 1, 255], [0, 1, 255]]
    assert matrix.vals[:, :2, :2].tolist() == [[[0, 0], [1, 2]], [[5, 0], [3, 4]]]
    assert torch.equal(matrix.unpack(), weight)
    assert matrix.nnz == 5


def test_panels_of_blocks():
    """Blocks of rows with other numbers of chunks in each of three panels, the last one of a single column."""
    generator = torch.Generator().manual_seed(0)
    level = torch.rand(9, 3, generator=generator).repeat_interleave(PANEL, dim=1)[:, : 2 * PANEL + 1]
    mask = torch.rand(9, 2 * PANEL + 1, generator=generator) < level
    packed = pack(torch.rand(9, 2 * PANEL + 1, generator=generator), mask)
    matrix = from_bmp128(packed)
    assert matrix.start.numel() == 3 * 3 + 1
    assert torch.equal(matrix.mask(), mask)
    assert same_bits(matrix.unpack(), packed.unpack())
    panel = torch.repeat_interleave(torch.arange(9) % 3, torch.diff(matrix.start).long())[:, None, None]
    held = matrix.index != PADDING_INDEX
    column = matrix.base.long()[..., None] + matrix.index
    assert (column // PANEL == panel)[held].all()


@pytest.mark.parametrize(("equal_rows", "most"), [(True, 1.532), (False, 1.57)])
def test_bytes_per_weight_at_half_density(equal_rows, most):
    """Rows that keep equally many weights need hardly any padding; 1.516 is the least for full chunks."""
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(64, 4096, generator=generator)
    mask = uniform < (uniform.median(dim=1, keepdim=True).values if equal_rows else 0.5)
    matrix = from_bmp128(pack(uniform.bfloat16(), mask))
    assert 1.51 < matrix.nbytes / uniform.numel() < most


def test_too_many_columns_are_refused():
    with pytest.raises(ValueError, match="65537"):
        from_bmp128(pack(torch.zeros(1, 2**16 + 1)))
    widest = torch.zeros(1, 2**16)
    widest[0, -1] = 5
    assert torch.equal(from_bmp128(pack(widest)).unpack(), widest)
