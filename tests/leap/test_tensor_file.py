"""Files written tensor by tensor, read back by the library whose format they have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from leap.tensor_file import _NAMES, spec, write_tensors

TENSORS = st.dictionaries(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8).filter(
        lambda name: name != "__metadata__"
    ),
    st.tuples(st.sampled_from(sorted(_NAMES, key=str)), st.lists(st.integers(0, 5), max_size=3)),
    max_size=5,
)


def some(dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
    """A tensor of random bytes 0 and 1, which are values of every dtype."""
    octets = torch.randint(0, 2, (shape.numel() * dtype.itemsize,), dtype=torch.uint8)
    return octets.view(dtype).view(shape)


@settings(max_examples=40, deadline=None)
@given(shapes=TENSORS)
def test_the_library_reads_what_was_written(shapes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("file") / "tensors"
    tensors = {name: some(dtype, torch.Size(shape)) for name, (dtype, shape) in shapes.items()}
    order: list[str] = []

    def read(name: str) -> torch.Tensor:
        order.append(name)
        return tensors[name]

    write_tensors(path, {name: spec(tensor) for name, tensor in tensors.items()}, read, {"format": "pt"})
    found = load_file(path)
    assert sorted(order) == sorted(tensors)
    assert {name: spec(tensor) for name, tensor in found.items()} == {n: spec(t) for n, t in tensors.items()}
    for name, tensor in tensors.items():
        assert found[name].reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_views_and_transposed_tensors_are_written_as_they_look(tmp_path: Path) -> None:
    whole = torch.arange(24.0).view(4, 6)
    tensors = {"part": whole[1:3], "transposed": whole.T, "column": whole[:, 2]}
    write_tensors(tmp_path / "a", {n: spec(t) for n, t in tensors.items()}, tensors.__getitem__)
    save_file({n: t.clone().contiguous() for n, t in tensors.items()}, tmp_path / "b")
    expected = load_file(tmp_path / "b")
    assert all(tensor.equal(expected[name]) for name, tensor in load_file(tmp_path / "a").items())


@pytest.mark.parametrize("given", [torch.ones(2, 3), torch.ones(3, dtype=torch.float64)])
def test_a_tensor_other_than_announced_is_refused(given: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"w: .* announced"):
        write_tensors(tmp_path / "a", {"w": spec(torch.ones(3))}, lambda _: given)


def test_a_dtype_that_the_format_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="complex64"):
        write_tensors(tmp_path / "a", {"w": spec(torch.ones(1, dtype=torch.complex64))}, lambda _: torch.ones(1))
