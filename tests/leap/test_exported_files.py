"""Which files of an export engines take for weights: each has to end up with the model's tensors and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from test_sparse_checkpoint import GROUPED
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

import leap
from leap.export import export
from leap.packed import MaskFile
from leap.surgery import prunable_linears

INDEX = "model.safetensors.index.json"


def with_index(directory: Path) -> list[Path]:
    """vLLM's default loader, and SGLang's: all safetensors, less those that the index, if there is one, does not name.

    Only without any it looks for other formats.
    """
    files = sorted(directory.glob("*.safetensors"))
    if files and (directory / INDEX).exists():
        named = set(json.loads((directory / INDEX).read_text())["weight_map"].values())
        files = [file for file in files if file.name in named]
    return files or [file for pattern in ("*.bin", "*.pt", "*.pth") for file in sorted(directory.glob(pattern))]


def globbing(directory: Path) -> list[Path]:
    """Loaders that know no index: every safetensors file."""
    return sorted(directory.glob("*.safetensors"))


def of_any_kind(directory: Path) -> list[Path]:
    """Whatever has a suffix that some loader takes for weights."""
    suffixes = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".ckpt", ".msgpack", ".h5", ".onnx", ".npz")
    return sorted(file for file in directory.iterdir() if file.suffix in suffixes)


def exported(directory: Path, shard_size: str = "5GB") -> nn.Module:
    """A pruned model, exported to ``directory`` in files of at most ``shard_size``."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**GROUPED, tie_word_embeddings=False))
    masks = [torch.rand(linear.weight.shape) < 0.5 for linear in prunable_linears(model).values()]
    model.save_pretrained = partial(model.save_pretrained, max_shard_size=shard_size)
    export(model, None, lambda number, _: (masks[number], None), directory, {})
    return model


def stored(files: list[Path]) -> list[str]:
    """Names of the tensors in safetensors files."""
    names: list[str] = []
    for path in files:
        with safe_open(path, framework="pt") as file:
            names += file.keys()
    return sorted(names)


COLLECTORS = [with_index, globbing, of_any_kind]


@pytest.mark.parametrize("collect", COLLECTORS)
@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
def test_loaders_find_the_weights_and_nothing_else(
    collect: Callable[[Path], list[Path]], shard_size: str, tmp_path: Path
) -> None:
    model = exported(tmp_path, shard_size)
    files = collect(tmp_path)
    assert (len(files) > 1) is (shard_size == "20KB")
    assert stored(files) == sorted(model.state_dict())
    index = json.loads((tmp_path / INDEX).read_text())
    assert sorted(index["weight_map"]) == stored(files)
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("collect", COLLECTORS)
def test_a_new_export_leaves_nothing_of_an_older_one(collect: Callable[[Path], list[Path]], tmp_path: Path) -> None:
    exported(tmp_path, "20KB")
    (tmp_path / "masks.leap").rename(tmp_path / "masks.safetensors")  # as version 0.1.0 wrote it
    model = exported(tmp_path)
    assert stored(collect(tmp_path)) == sorted(model.state_dict())


def test_an_export_of_the_version_before_is_still_read(tmp_path: Path) -> None:
    exported(tmp_path / "dense")
    leap.write_sparse(tmp_path / "dense", tmp_path / "expected")
    (tmp_path / "dense" / "masks.leap").rename(tmp_path / "dense" / "masks.safetensors")
    assert len(MaskFile(tmp_path / "dense")) == 14
    leap.write_sparse(tmp_path / "dense", tmp_path / "packed")
    assert (tmp_path / "packed" / "sparse.json").read_bytes() == (tmp_path / "expected" / "sparse.json").read_bytes()


@pytest.mark.parametrize("collect", COLLECTORS)
def test_a_sparse_checkpoint_names_its_files_and_its_quantiser(
    collect: Callable[[Path], list[Path]], tmp_path: Path
) -> None:
    """Engines that do not know the quantiser refuse the directory by its name, before they read a tensor."""
    exported(tmp_path / "dense")
    leap.write_sparse(tmp_path / "dense", tmp_path / "packed")
    listed = json.loads((tmp_path / "packed" / "sparse.json").read_text())["tensors"]
    assert stored(collect(tmp_path / "packed")) == sorted(listed)
    assert (
        json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]["quant_method"] == "leap"
    )
