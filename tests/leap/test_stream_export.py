"""Exports written tensor by tensor: what the export of a loaded model writes, in bounded memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from test_sparse_checkpoint import FAMILIES
from transformers import AutoModelForCausalLM, MixtralConfig

from leap.checkpoint import Checkpoint
from leap.export import export, zeros
from leap.packed import MaskFile
from leap.stream_export import StreamExport, stored_zeros
from leap.surgery import prunable_linears


def save(family: str, directory: Path, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(FAMILIES[family], dtype=dtype).save_pretrained(directory)
    return directory


def masks(number: int, shape: torch.Size) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(number)) < 0.6


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    held = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            held |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    return held


@pytest.mark.parametrize("family", ["llama tied", "llama", "qwen2", "gemma3", "opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_writes_what_the_loaded_model_exports(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    checkpoint = Checkpoint(save(family, tmp_path / "dense"))
    model = checkpoint.load(dtype=dtype)
    dense = {name: linear.weight.clone() for name, linear in prunable_linears(model).items()}

    def pruned(number: int, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        shape = dense[name].shape
        return masks(number, shape), torch.full(shape, 0.5) if number == 1 else None

    with StreamExport(checkpoint, dtype, shard_bytes=10_000) as streamed:
        assert streamed.possible
        assert list(streamed.layers) == list(dense)
        assert all(streamed.layers[name].weight.equal(weight) for name, weight in dense.items())
        sparsity = streamed.write(None, pruned, tmp_path / "streamed", {"method": "test"})
    assert export(model, None, pruned, tmp_path / "loaded", {"method": "test"}) == sparsity
    expected, written = tensors(tmp_path / "loaded"), tensors(tmp_path / "streamed")
    assert expected.keys() == written.keys()
    assert all(tensor.dtype == written[name].dtype and tensor.equal(written[name]) for name, tensor in expected.items())
    assert len(list((tmp_path / "streamed").glob("*.safetensors"))) > 1
    for file in ("config.json", "generation_config.json"):
        one, other = (json.loads((tmp_path / way / file).read_text()) for way in ("loaded", "streamed"))
        assert one == other
    for name, mask in MaskFile(tmp_path / "loaded").items():
        assert mask.equal(MaskFile(tmp_path / "streamed")[name])
    reloaded = Checkpoint(tmp_path / "streamed")
    assert stored_zeros(reloaded) == zeros(reloaded.load(dtype=dtype)) == zeros(model)


def test_tensors_are_read_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from leap import checkpoint as module

    alive: list[int] = []
    read = module.StoredTensors.get

    def watch(self: module.StoredTensors, name: str) -> torch.Tensor:
        import weakref

        tensor = read(self, name).clone()
        alive.append(1)
        weakref.finalize(tensor, alive.pop)
        assert len(alive) <= 2, "the one before may live until this one is bound"
        return tensor

    monkeypatch.setattr(module.StoredTensors, "get", watch)
    streamed = StreamExport(Checkpoint(save("llama", tmp_path / "dense")), torch.float32)
    shapes = [layer.weight.shape for layer in streamed.layers.values()]
    streamed.write(None, lambda number, _: (masks(number, shapes[number]), None), tmp_path / "out", {})


@pytest.mark.parametrize("family", ["gpt_neox"])
def test_files_with_other_names_are_left_to_the_loaded_model(family: str, tmp_path: Path) -> None:
    assert not StreamExport(Checkpoint(save(family, tmp_path / "dense")), torch.float32).possible


def test_experts_that_are_put_together_are_left_to_the_loaded_model(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=67, hidden_size=36, intermediate_size=50, num_hidden_layers=1, num_attention_heads=3,
        num_key_value_heads=1, num_local_experts=2, head_dim=12,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert not StreamExport(Checkpoint(tmp_path), torch.float32).possible


def test_a_mask_of_another_shape_is_refused(tmp_path: Path) -> None:
    streamed = StreamExport(Checkpoint(save("llama", tmp_path / "dense")), torch.float32)
    with pytest.raises(ValueError, match="mask"):
        streamed.write(None, lambda *_: (torch.ones(2, 2, dtype=torch.bool), None), tmp_path / "out", {})
