"""BMP128: bit-exact round trips, the exact size, a hand-made example, and refusal of contradictory files."""

from pathlib import Path

import pytest
import torch
from leap_kernels import bmp128
from leap_kernels.bmp128 import BMP128, PADDING, byte_limit, pack

INTEGER = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(INTEGER[a.dtype]), b.view(INTEGER[b.dtype]))


def make(rows, columns, density, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    return weight, torch.rand(rows, columns, generator=generator) < density


@pytest.mark.parametrize("dtype", bmp128.DTYPES)
@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("rows", "columns"), [(0, 128), (1, 1), (3, 127), (5, 128), (4, 129), (7, 576)])
def test_round_trip(rows, columns, density, dtype):
    weight, mask = make(rows, columns, density, dtype)
    packed = pack(weight, mask)
    assert torch.equal(packed.mask(), mask)
    assert same_bits(packed.unpack(), torch.where(mask, weight, torch.zeros((), dtype=dtype)))
    groups = (columns + 127) // 128
    nnz = int(mask.sum())
    assert packed.nnz == nnz
    assert packed.nbytes == rows * groups * (16 + 4) + (nnz + PADDING) * weight.element_size()
    restored = BMP128.from_tensors(packed.tensors())
    assert restored.shape == packed.shape
    assert all(torch.equal(restored.tensors()[name], tensor) for name, tensor in packed.tensors().items())


def test_kept_values_survive_whatever_they_are():
    special = torch.tensor([[0.0, -0.0, torch.nan, torch.inf, 1e-45, 1.0]])
    special = torch.cat(
        [special, torch.tensor([[-0x12345]], dtype=torch.int32).view(torch.float32)], dim=1
    )  # a NaN with payload
    assert same_bits(pack(special, torch.ones(1, 7, dtype=torch.bool)).unpack(), special)
    assert pack(special).mask().tolist() == [[False, False, True, True, True, True, True]]


def test_layout_of_an_example():
    """Two rows of 130 columns, kept: (0, 0), (0, 33), (0, 129), (1, 127)."""
    weight = torch.zeros(2, 130)
    weight[0, 0], weight[0, 33], weight[0, 129], weight[1, 127] = 1, 2, 3, 4
    packed = pack(weight)
    bits = packed.bits.view(torch.int32)
    assert bits.tolist() == [[[1, 2, 0, 0], [2, 0, 0, 0]], [[0, 0, 0, -(1 << 31)], [0, 0, 0, 0]]]
    assert packed.off.tolist() == [[0, 2], [3, 4]]
    assert packed.vals.tolist() == [1, 2, 3, 4] + [0] * 64
    assert packed.row_base is None


def test_row_base_for_huge_matrices(monkeypatch):
    """The 2**31 values that call for it do not fit here, so the limit is lowered."""
    monkeypatch.setattr(bmp128, "_OFFSET_LIMIT", 100)
    weight, mask = make(5, 300, 0.5)
    packed = pack(weight, mask)
    assert packed.row_base is not None
    assert packed.row_base.tolist() == [0, *mask.sum(1).cumsum(0)[:-1].tolist()]
    assert packed.off[:, 0].tolist() == [0] * 5
    assert same_bits(BMP128.from_tensors(packed.tensors()).unpack(), torch.where(mask, weight, 0.0))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("bits", lambda t: t[:1], "bits"),
        ("bits", lambda t: t.view(torch.int32), "bits"),
        ("off", lambda t: t + 1, "off"),
        ("vals", lambda t: t[:-1], "vals"),
        ("vals", lambda t: t.double(), "vals"),
        ("shape", lambda t: t - torch.tensor([0, 1]), "beyond"),
        ("shape", lambda t: t[:1], "shape"),
    ],
)
def test_contradictory_tensors_are_refused(name, change, message):
    stored = pack(*make(4, 256, 1.0)).tensors()
    stored[name] = change(stored[name])
    with pytest.raises(ValueError, match=message):
        BMP128.from_tensors(stored)


def test_missing_tensors_and_bad_inputs_are_named():
    with pytest.raises(ValueError, match="without off, vals"):
        BMP128.from_tensors({"shape": torch.tensor([1, 1]), "bits": torch.zeros(1)})
    with pytest.raises(ValueError, match="weight"):
        pack(torch.zeros(4))
    with pytest.raises(ValueError, match="mask"):
        pack(torch.zeros(4, 4), torch.zeros(4, 4))


@pytest.mark.parametrize("limit", [1 << 31, 100])
def test_reader_in_the_specification(monkeypatch, limit):
    """kernels/README.md holds a complete reader; it has to read what we write."""
    monkeypatch.setattr(bmp128, "_OFFSET_LIMIT", limit)
    readme = (Path(bmp128.__file__).parents[1] / "README.md").read_text()
    namespace: dict = {}
    exec(readme.split("```python\n")[1].split("```")[0], namespace)
    weight, mask = make(6, 300, 0.5)
    mask[2] = False
    stored = {name: tensor.numpy() for name, tensor in pack(weight, mask).tensors().items()}
    dense = namespace["read_bmp128"](**stored)
    assert same_bits(torch.from_numpy(dense), torch.where(mask, weight, 0.0))


def test_the_byte_limit_is_that_of_a_large_matrix():
    packed = pack(torch.randn(512, 4096).bfloat16(), torch.rand(512, 4096) >= 0.6)
    sparsity = 1 - packed.nnz / (512 * 4096)
    assert byte_limit(sparsity, 2) == pytest.approx(2 * 512 * 4096 / packed.nbytes, rel=1e-3)
    assert byte_limit(0.5, 2) == pytest.approx(1.73, abs=0.005)
