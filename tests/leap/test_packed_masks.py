"""Masks at one bit per weight, in memory and in a file."""

from __future__ import annotations

import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from leap import packed
from leap.packed import MaskFile, pack, save_masks, unpack


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 9), max_size=3), st.integers(0, 2**32))
def test_round_trip(shape, seed):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    bits = pack(mask)
    assert bits.dtype == torch.uint8
    assert bits.shape == (-(-mask.numel() // 8),)
    back = unpack(bits, shape)
    assert back.dtype == torch.bool
    assert torch.equal(back, mask)


def test_the_layout_is_the_documented_one():
    mask = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]], dtype=torch.bool)
    assert pack(mask).tolist() == [0b0010_0001, 0b0000_1000]  # row-major, the lowest bit first
    assert pack(mask.t()).tolist() == pack(mask.t().contiguous()).tolist()


@pytest.mark.parametrize(
    ("bits", "shape"),
    [
        (torch.zeros(1, dtype=torch.uint8), (3, 3)),
        (torch.zeros(3, dtype=torch.uint8), (4, 4)),
        (torch.zeros(1, dtype=torch.uint8), (0, 8)),
        (torch.zeros(0, dtype=torch.uint8), ()),
        (torch.zeros(2, dtype=torch.int32), (4, 4)),
    ],
)
def test_bits_that_do_not_fit(bits, shape):
    with pytest.raises(ValueError, match="do not hold a mask of shape"):
        unpack(bits, shape)


MASKS = {"model.b.weight": torch.eye(5, 7).bool(), "model.a": torch.zeros(3, 1).bool(), "model.c": ~torch.eye(2).bool()}


def test_a_file_gives_back_masks_facts_and_order(tmp_path):
    about = {"model": "nano", "sparsity": 0.5, "revision": None, "nested": {"é": [1, 2]}}
    save_masks(tmp_path / "masks.leap", iter(MASKS.items()), about)
    for path in (tmp_path, str(tmp_path / "masks.leap")):
        file = MaskFile(path)
        assert file.about == about
        assert list(file) == list(MASKS)
        assert len(file) == 3
        assert all(torch.equal(mask, MASKS[name]) for name, mask in file.items())
        assert file.shapes["model.b.weight"] == [5, 7]
    with pytest.raises(KeyError, match="d"):
        file["model.d"]


def test_one_bit_per_weight_on_disk(tmp_path):
    save_masks(tmp_path / "m", iter({"layer": torch.rand(1000, 800) < 0.5}.items()), {})
    assert (tmp_path / "m").stat().st_size < 1000 * 800 / 8 + 1000


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        MaskFile(tmp_path)
    (tmp_path / "text").write_text("these are not masks, and no safetensors either")
    with pytest.raises(ValueError, match="text is not a mask file"):
        MaskFile(tmp_path / "text")
    save_file({"w": torch.zeros(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="not a mask file of format leap-masks"):
        MaskFile(tmp_path / "weights.safetensors")


def test_a_shape_that_does_not_fit_its_bits_is_refused(tmp_path):
    metadata = {"format": "leap-masks-1", "shapes": json.dumps({"layer": [100, 100]}), "about": "{}"}
    save_file({"layer": pack(torch.ones(4, 4).bool())}, tmp_path / "m", metadata=metadata)
    with pytest.raises(ValueError, match="do not hold a mask"):
        MaskFile(tmp_path / "m")["layer"]


ABOUT = {"model": "nano", "sparsity": 0.5, "scope": "global", "method": "leap", "pattern": "unstructured"}


def test_equal_masks_make_equal_files(tmp_path):
    """In one process safetensors already writes several keys of metadata in another order each time."""
    for number in range(8):
        save_masks(tmp_path / f"{number}", iter(MASKS.items()), ABOUT)
    assert len({(tmp_path / f"{number}").read_bytes() for number in range(8)}) == 1


def test_no_flipped_bit_goes_unnoticed(tmp_path):
    path = tmp_path / "masks.leap"
    mask = torch.rand(40, 30, generator=torch.Generator().manual_seed(0)) < 0.5
    save_masks(path, iter({"model.layers.0.q_proj": mask, "model.layers.0.k_proj": ~mask}.items()), ABOUT)
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    rng = random.Random(0)
    bits = [rng.randrange(8 * len(whole)) for _ in range(100)] + [rng.randrange(8 * (8 + header)) for _ in range(200)]
    for bit in bits:
        path.write_bytes(flipped(whole, bit))
        with pytest.raises(ValueError, match=r"masks\.leap"):
            MaskFile(path)
    for length in (0, 7, header, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"masks\.leap"):
            MaskFile(path)


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_a_file_of_the_version_before_is_read_as_it_is(tmp_path):
    metadata = {"format": "leap-masks-1", "shapes": json.dumps({"layer": [4, 4]}), "about": json.dumps(ABOUT)}
    save_file({"layer": pack(torch.eye(4).bool())}, tmp_path / "m", metadata=metadata)
    file = MaskFile(tmp_path / "m")
    assert torch.equal(file["layer"], torch.eye(4).bool())
    assert file.about == ABOUT


def test_a_newer_format_is_told_from_damage(tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "_VERSION", 3)
    save_masks(tmp_path / "m.safetensors", iter([("a", torch.ones(2, 2, dtype=torch.bool))]), {})
    monkeypatch.undo()
    with pytest.raises(ValueError, match="is of format 3, which a newer version of this package reads"):
        MaskFile(tmp_path / "m.safetensors")
