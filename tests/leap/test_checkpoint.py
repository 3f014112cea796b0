"""Checkpoints that are not whole, or not those of their config.json, end in one line; whole ones load as ever."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, MixtralConfig, PretrainedConfig

import leap
from leap.checkpoint import Checkpoint, CheckpointError

SIZES = {"vocab_size": 67, "hidden_size": 36, "intermediate_size": 50, "num_hidden_layers": 2}
LLAMA = {**SIZES, "num_attention_heads": 3, "num_key_value_heads": 1, "max_position_embeddings": 64}
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**LLAMA, tie_word_embeddings=True),
    # Experts are stored one by one and become one tensor. The grouped product wants rows of multiples of 16 bytes.
    "mixtral": MixtralConfig(
        **LLAMA | {"intermediate_size": 48}, num_local_experts=3, num_experts_per_tok=2, head_dim=12
    ),
    # Its head is stored under an older name.
    "gpt_neox": GPTNeoXConfig(**SIZES, num_attention_heads=3, max_position_embeddings=64),
}
IDS = torch.arange(12)[None]


def make(family: str, directory: Path, **options: object) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(FAMILIES[family]).save_pretrained(directory, **options)
    return directory


@pytest.fixture(params=FAMILIES)
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return make(request.param, tmp_path / "model")


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return make("llama", tmp_path / "model")


def tensors_of(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "model.safetensors")


def store(directory: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def configure(directory: Path, **fields: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def refusal(directory: Path) -> str:
    """The same line, whoever reads the directory."""
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(directory)
    with pytest.raises(CheckpointError) as packing:
        leap.write_sparse(directory, directory.with_name("packed"))
    assert str(packing.value) == str(caught.value)
    assert not directory.with_name("packed").exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_whole_checkpoint_loads_as_transformers_loads_it(directory: Path) -> None:
    model = Checkpoint(directory).load(dtype=torch.float32)
    assert not model.training
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(directory).eval()))


def test_every_tensor_is_missed(directory: Path) -> None:
    tensors = tensors_of(directory)
    for name in tensors:
        store(directory, {key: tensor for key, tensor in tensors.items() if key != name})
        with pytest.raises(CheckpointError) as caught:
            Checkpoint(directory)
        in_model = name.replace("embed_out", "lm_head").replace("block_sparse_moe", "mlp")
        expected = [name, in_model, f"shape {in_model.split('.experts')[0]}.experts"]
        assert any(text in str(caught.value) for text in expected[: 3 if "experts" in name else 2]), name
    store(directory, tensors)
    Checkpoint(directory)


def test_a_tensor_too_many_and_one_of_another_shape_are_named(directory: Path) -> None:
    tensors = tensors_of(directory)
    store(directory, tensors | {"model.layers.0.other.weight": torch.zeros(3)})
    assert "it has besides model.layers.0.other.weight" in refusal(directory)
    name = next(key for key in tensors if "layernorm" in key and key.endswith("weight"))
    store(directory, tensors | {name: torch.zeros(35)})
    assert f"it has in another shape {name} [35] instead of [36]" in refusal(directory)


def test_a_checkpoint_of_another_model_is_refused(llama: Path) -> None:
    configure(llama, num_hidden_layers=3)
    message = refusal(llama)
    assert "it lacks model.layers.2.input_layernorm.weight" in message
    assert "and 6 more" in message
    configure(llama, num_hidden_layers=1)
    assert "it has besides model.layers.1.input_layernorm.weight" in refusal(llama)
    configure(llama, num_hidden_layers=2, model_type="qwen3")
    assert "it lacks model.layers.0.self_attn.k_norm.weight" in refusal(llama)


def test_what_older_versions_stored_besides_does_no_harm(llama: Path) -> None:
    tensors = tensors_of(llama)
    expected = logits(Checkpoint(llama).load())
    strays = ("layers.0.self_attn.rotary_emb.inv_freq", "layers.1.self_attn.bias", "layers.1.self_attn.masked_bias")
    store(llama, tensors | {f"model.{name}": torch.zeros(6) for name in strays})
    assert torch.equal(logits(Checkpoint(llama).load()), expected)


def test_only_the_files_that_the_index_names_are_read(tmp_path: Path) -> None:
    directory = make("llama", tmp_path / "model", max_shard_size="20KB")
    shards = sorted(directory.glob("*.safetensors"))
    assert len(shards) > 3
    expected = logits(Checkpoint(directory).load())
    for number in (0, 9):  # before the others in the order of names, and behind them
        strange = {name: tensor + 1 for name, tensor in load_file(shards[1]).items()}
        save_file(strange, directory / f"model-0000{number}-of-00002.safetensors")
    assert torch.equal(logits(Checkpoint(directory).load()), expected)
    leap.write_sparse(directory, tmp_path / "packed")
    torch.testing.assert_close(logits(leap.load_sparse(tmp_path / "packed")), expected)
    shards[1].unlink()
    assert (
        refusal_of_index(directory) == f"{directory} lacks {shards[1].name}, which model.safetensors.index.json names"
    )
    (directory / "model.safetensors.index.json").write_text("[]")
    assert "maps no tensors to files" in refusal_of_index(directory)
    (directory / "model.safetensors.index.json").unlink()
    assert "neither model.safetensors nor" in refusal_of_index(directory)


def refusal_of_index(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(directory)
    return str(caught.value)


def test_files_that_are_not_whole_are_named(llama: Path) -> None:
    path = llama / "model.safetensors"
    data = path.read_bytes()
    for kept in (0, 7, 8, 300, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:kept])
        assert f"{path} is cut off or no safetensors file" in refusal(llama)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4976698672\n")
    assert "git-LFS pointer" in refusal(llama)


@pytest.mark.parametrize("differ", [False, True])
def test_a_tied_head_that_the_files_hold_too(differ: bool, llama: Path, tmp_path: Path) -> None:
    """Where it is another tensor, transformers computes with it whatever config.json says; so does everything here."""
    tensors = tensors_of(llama)
    head = tensors["model.embed_tokens.weight"].clone()
    if differ:
        head[-1, -1] += 1
    store(llama, tensors | {"lm_head.weight": head})
    expected = logits(AutoModelForCausalLM.from_pretrained(llama).eval())
    checkpoint = Checkpoint(llama)
    assert (checkpoint.untied, checkpoint.config.tie_word_embeddings) == (differ, not differ)
    model = checkpoint.load()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is not differ
    assert torch.equal(logits(model), expected)
    leap.write_sparse(llama, tmp_path / "packed")
    torch.testing.assert_close(logits(leap.load_sparse(tmp_path / "packed")), expected)
    # Whoever goes by config.json alone has to come to the same.
    settings = leap.LearnSettings(steps=1, batch_rows=1)
    model = AutoModelForCausalLM.from_pretrained(llama)
    leap.prune(model, IDS, sparsity=0.5, settings=settings).export(tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is not differ


def _code(directory: Path, text: str) -> None:
    (directory / "own.py").write_text(text)
    configure(directory, model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: configure(d, quantization_config={"quant_method": "gptq", "bits": 4}), "quantised .gptq."),
        (lambda d: configure(d, quantization_config={"quant_method": "awq", "bits": 4}), "quantised .awq."),
        (lambda d: configure(d, num_attention_heads="three"), "cannot load .*num_attention_heads"),
        (lambda d: configure(d, hidden_size=-1), "cannot load"),
        (lambda d: configure(d, model_type="no_such_type"), "no_such_type"),
        (lambda d: configure(d, model_type="t5"), "T5Config"),
        (lambda d: (d / "config.json").write_text("{"), "not a valid JSON"),
        (lambda d: (d / "adapter_config.json").write_text("{}"), "merge the adapter first"),
        (lambda d: _code(d, "import a_package_that_nobody_has\n"), "a_package_that_nobody_has"),
        (lambda d: _code(d, "1 / 0\n"), "division by zero"),
    ],
)
def test_whatever_reading_raises_ends_in_one_line(
    spoil: Callable[[Path], object], message: str, llama: Path, tmp_path: Path
) -> None:
    spoil(llama)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint(llama, trust_remote_code=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layers", [1, 3])
def test_a_packed_checkpoint_of_another_model_is_refused(layers: int, llama: Path, tmp_path: Path) -> None:
    leap.write_sparse(llama, tmp_path / "packed")
    configure(tmp_path / "packed", num_hidden_layers=layers)
    with pytest.raises(CheckpointError, match=r"does not fit the model's config\.json"):
        leap.load_sparse(tmp_path / "packed")


def test_a_packed_tensor_too_many_is_refused(llama: Path, tmp_path: Path) -> None:
    tensors = tensors_of(llama)
    sizes = {"q_proj": 36, "k_proj": 12, "v_proj": 12, "o_proj": 36}
    biases = {f"model.layers.{i}.self_attn.{p}.bias": torch.ones(size) for i in (0, 1) for p, size in sizes.items()}
    store(llama, tensors | biases)
    configure(llama, attention_bias=True)
    leap.write_sparse(llama, tmp_path / "packed")
    configure(tmp_path / "packed", attention_bias=False)
    with pytest.raises(CheckpointError, match=r"_proj\.bias does not fit"):
        leap.load_sparse(tmp_path / "packed")


def test_code_travels_with_a_packed_model(llama: Path, tmp_path: Path) -> None:
    _code(
        llama,
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Config(LlamaConfig):\n    model_type = 'own'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n",
    )
    expected = logits(Checkpoint(llama, trust_remote_code=True).load())
    leap.write_sparse(llama, tmp_path / "packed", trust_remote_code=True)
    shutil.rmtree(llama)
    model = leap.load_sparse(tmp_path / "packed", trust_remote_code=True)
    torch.testing.assert_close(logits(model), expected)
