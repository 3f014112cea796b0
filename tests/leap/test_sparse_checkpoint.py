"""Sparse checkpoints of tiny random models of several families: same logits, ties, generation, and refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from leap_kernels import SparseLinear
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
    RwkvConfig,
)

import leap
from leap import sparse_checkpoint, sparse_model
from leap.export import export
from leap.packed import MaskFile
from leap.surgery import prunable_linears

SMALL = {"vocab_size": 67, "num_hidden_layers": 2, "num_attention_heads": 3, "max_position_embeddings": 64}
GROUPED = {**SMALL, "hidden_size": 36, "intermediate_size": 50, "num_key_value_heads": 1, "head_dim": 12}
FAMILIES: dict[str, PretrainedConfig] = {
    "llama tied": LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "llama": LlamaConfig(**GROUPED, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**GROUPED),
    "gemma3": Gemma3TextConfig(**GROUPED, layer_types=["sliding_attention", "full_attention"], sliding_window=8),
    "opt": OPTConfig(**SMALL, hidden_size=36, ffn_dim=131, word_embed_proj_dim=36),
    "gpt_neox": GPTNeoXConfig(**SMALL, hidden_size=36, intermediate_size=131, tie_word_embeddings=False),
}
#: Against the dense model with zeros: other orders of summation, and in bfloat16 roundings of whole layers.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def make(config: PretrainedConfig, directory: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A pruned random model with biases that differ from 0, exported."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    shapes = [linear.weight.shape for linear in prunable_linears(model).values()]
    masks = [torch.rand(shape) < 0.5 for shape in shapes]
    export(model, None, lambda number, _: (masks[number], None), directory, {})
    return directory


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return make(FAMILIES["llama tied"], tmp_path / "dense")


@pytest.fixture
def sparse(dense: Path, tmp_path: Path) -> Path:
    leap.write_sparse(dense, tmp_path / "sparse")
    return tmp_path / "sparse"


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("family", FAMILIES)
def test_same_logits_and_text_as_the_dense_export(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = make(FAMILIES[family], tmp_path / "dense", dtype)
    leap.write_sparse(source, tmp_path / "sparse")
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval()
    # The directory stands alone.
    source.rename(tmp_path / "moved")
    model = leap.load_sparse(tmp_path / "sparse")
    assert all(isinstance(model.get_submodule(name), SparseLinear) for name in prunable_linears(dense))
    assert model.dtype == dtype
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for batch, length in ((1, 1), (2, 5), (3, 20)):  # the native kernel for few rows, unpacking for many
            ids = torch.randint(3, 67, (batch, length), generator=generator)
            expected, got = dense(ids).logits, model(ids).logits
            assert got.dtype == dtype
            assert (got - expected).norm() <= TOLERANCE[dtype] * expected.norm()
    tied = FAMILIES[family].tie_word_embeddings
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) is bool(tied)
    prompt = torch.randint(3, 67, (1, 4), generator=generator)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    text = model.generate(prompt, **options)
    assert text.shape[1] > 4
    if dtype == torch.float32:
        assert torch.equal(text, dense.generate(prompt, **options))


def test_the_weights_are_those_of_the_export_bit_for_bit(dense: Path, sparse: Path) -> None:
    expected, model = AutoModelForCausalLM.from_pretrained(dense), leap.load_sparse(sparse)
    for name, linear in prunable_linears(expected).items():
        assert torch.equal(model.get_submodule(name).weight.unpack(), linear.weight)
        assert torch.equal(model.get_submodule(name).weight.mask(), MaskFile(dense)[name])


def test_from_a_dense_model_and_masks(dense: Path, sparse: Path, tmp_path: Path) -> None:
    """Masks decide over dense weights, and what they keep stays although it is zero."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(dense)
    with torch.no_grad():
        for linear in prunable_linears(model).values():
            linear.weight[linear.weight == 0] = 7.0
            linear.weight[0] = 0.0
    model.save_pretrained(tmp_path / "full")
    leap.write_sparse(tmp_path / "full", tmp_path / "masked", MaskFile(dense))
    loaded = leap.load_sparse(tmp_path / "masked")
    for name, linear in prunable_linears(model).items():
        mask, weight = MaskFile(dense)[name], loaded.get_submodule(name).weight
        assert torch.equal(weight.mask(), mask)
        assert torch.equal(weight.unpack(), linear.weight * mask)


def test_state_dict_round_trips_into_other_masks(sparse: Path, dense: Path, tmp_path: Path) -> None:
    model = leap.load_sparse(sparse)
    pruned = AutoModelForCausalLM.from_pretrained(dense)
    with torch.no_grad():
        for linear in prunable_linears(pruned).values():
            linear.weight[:, ::2] = 0
    pruned.save_pretrained(tmp_path / "other")
    leap.write_sparse(tmp_path / "other", tmp_path / "other sparse")
    other = leap.load_sparse(tmp_path / "other sparse")
    ids = torch.arange(5)[None]
    with torch.no_grad():
        assert not torch.equal(other(ids).logits, model(ids).logits)
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(ids).logits, model(ids).logits)
    broken = {k: v + 1 if k.endswith("q_proj.off") else v for k, v in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"q_proj: BMP128 off does not follow from bits"):
        other.load_state_dict(broken)


def test_idx8_is_held_where_the_dispatch_says_so_and_saved_as_bmp128(
    sparse: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU with much bandwidth; on a CPU its product is that of the unpacked matrix."""
    plain = leap.load_sparse(sparse)
    asked = []
    monkeypatch.setattr(sparse_model, "format_for", lambda *arguments: asked.append(arguments) or "idx8")
    model = leap.load_sparse(sparse)
    layers = [module for module in model.modules() if isinstance(module, SparseLinear)]
    assert {layer.matrix_format for layer in layers} == {"idx8"}
    assert {arguments[:2] for arguments in asked} == {(torch.device("cpu"), torch.float32)}
    assert {columns for _, _, columns in asked} == {layer.in_features for layer in layers}
    assert not any("bits" in name for name, _ in model.named_buffers()), "not both formats at once"
    ids = torch.arange(5)[None]
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, plain(ids).logits, atol=1e-5)
    state, expected = model.state_dict(), plain.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
    q_proj = layers[0]
    q_proj.vals.zero_()
    model.load_state_dict(expected)
    assert q_proj.matrix_format == "idx8"
    assert torch.equal(q_proj.weight.unpack(), plain.get_submodule("model.layers.0.self_attn.q_proj").weight.unpack())


def test_every_tensor_is_stored_once_and_the_others_as_they_are(dense: Path, sparse: Path) -> None:
    index = json.loads((sparse / "sparse.json").read_text())
    assert index["tied"] == {"lm_head.weight": "model.embed_tokens.weight"}
    with safe_open(dense / "model.safetensors", "pt") as file:
        for name in set(file.keys()) & set(index["tensors"]):
            stored = index["tensors"][name]
            with safe_open(sparse / stored["file"], "pt") as shard:
                assert torch.equal(shard.get_tensor(name), file.get_tensor(name))
    assert not any(name.endswith("q_proj.weight") for name in index["tensors"])


def test_shards(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_checkpoint, "SHARD_BYTES", 4000)
    written = leap.write_sparse(dense, tmp_path / "sparse")
    shards = sorted((tmp_path / "sparse").glob("*.safetensors"))
    assert len(shards) > 3
    assert written["bytes"] <= sum(shard.stat().st_size for shard in shards)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(dense)(ids).logits
        torch.testing.assert_close(leap.load_sparse(tmp_path / "sparse")(ids).logits, expected)
    with pytest.raises(FileExistsError):
        leap.write_sparse(dense, tmp_path / "sparse")


def test_a_changed_byte_is_refused_with_the_tensor(sparse: Path) -> None:
    name = "model.layers.1.mlp.up_proj.vals"
    shard = sparse / json.loads((sparse / "sparse.json").read_text())["tensors"][name]["file"]
    data = bytearray(shard.read_bytes())
    header = int.from_bytes(data[:8], "little")
    first, last = json.loads(data[8 : 8 + header])[name]["data_offsets"]
    data[8 + header + (first + last) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(leap.SparseCheckpointError, match=name):
        leap.load_sparse(sparse)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.99])
def test_a_truncated_shard_is_refused_with_the_first_lost_tensor(sparse: Path, share: float) -> None:
    (shard,) = sparse.glob("sparse-*.safetensors")
    data = shard.read_bytes()
    kept = int(share * len(data))
    header = int.from_bytes(data[:8], "little")
    offsets = {k: v["data_offsets"] for k, v in json.loads(data[8 : 8 + header]).items() if k != "__metadata__"}
    lost = {name for name, (_, end) in offsets.items() if 8 + header + end > kept}
    shard.write_bytes(data[:kept])
    with pytest.raises(leap.SparseCheckpointError, match="cut off") as caught:
        leap.load_sparse(sparse)
    assert str(caught.value).split(":")[0] in lost


def test_other_damage_is_named(sparse: Path, dense: Path, tmp_path: Path) -> None:
    index = json.loads((sparse / "sparse.json").read_text())
    layer = next(iter(index["packed"]))
    for change, message in (
        ({"version": 3}, "leap-sparse 3"),
        ({"format": "other"}, "other 2"),
        ({"packed": index["packed"] | {layer: "2:4"}}, f"{layer} is packed as 2:4"),
    ):
        copy = tmp_path / message
        shutil.copytree(sparse, copy)
        (copy / "sparse.json").write_text(json.dumps(index | change))
        with pytest.raises(leap.SparseCheckpointError, match=message):
            leap.load_sparse(copy)
    with pytest.raises(leap.SparseCheckpointError, match="no sparse checkpoint"):
        leap.load_sparse(dense)
    (sparse / "sparse-00001.safetensors").unlink()
    with pytest.raises(leap.SparseCheckpointError, match="cut off or altered"):
        leap.load_sparse(sparse)


def test_what_version_1_wrote_is_read(sparse: Path) -> None:
    expected, ids = leap.load_sparse(sparse), torch.arange(9)[None]
    index = json.loads((sparse / "sparse.json").read_text())
    assert set(index["packed"].values()) == {"BMP128"}
    (sparse / "sparse.json").write_text(json.dumps(index | {"version": 1, "packed": list(index["packed"])}))
    with torch.no_grad():
        assert torch.equal(leap.load_sparse(sparse)(ids).logits, expected(ids).logits)


def test_masks_of_another_model_are_refused(dense: Path, tmp_path: Path) -> None:
    other = make(FAMILIES["opt"], tmp_path / "opt")
    with pytest.raises(ValueError, match="no prunable layer"):
        leap.write_sparse(dense, tmp_path / "sparse", MaskFile(other))


def test_a_model_that_divides_its_weights_in_place_keeps_those_of_its_files(tmp_path: Path) -> None:
    """RWKV does so when it first runs in evaluation mode, and would do it again to what was exported after that."""
    torch.manual_seed(0)
    config = RwkvConfig(
        vocab_size=67, hidden_size=32, num_hidden_layers=4, intermediate_size=48, context_length=64, rescale_every=1
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    rows = torch.randint(67, (4, 12))
    settings = leap.LearnSettings(steps=2, batch_rows=4, microbatch_rows=4, prior="wanda")
    result = leap.prune(model, rows, sparsity=0.5, settings=settings, allow_dense=True)
    with torch.no_grad():
        expected = model(input_ids=rows, use_cache=False).logits
    result.export(tmp_path / "dense")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    leap.write_sparse(tmp_path / "dense", tmp_path / "sparse")
    packed, in_place = leap.load_sparse(tmp_path / "sparse"), reloaded
    with torch.no_grad():
        assert torch.equal(reloaded(input_ids=rows, use_cache=False).logits, expected)
        sparse_model.sparsify(in_place)
        for model in (packed, in_place):
            for _ in range(2):
                found = model(input_ids=rows, use_cache=False).logits
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [lambda name: "embed" in name, lambda name: "norm" in name, lambda name: "layers.0.mlp.up_proj" in name],
    ids=["embeddings", "norms", "a layer"],
)
def test_tensors_of_other_number_types_than_the_rest(change, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """from_pretrained takes the type that config.json names; so does what is packed."""
    dense = make(FAMILIES["llama"], tmp_path / "dense", torch.bfloat16)
    tensors = load_file(dense / "model.safetensors")
    tensors = {name: tensor.float() if change(name) else tensor for name, tensor in tensors.items()}
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    leap.write_sparse(dense, tmp_path / "sparse")
    rows = torch.randint(67, (2, 12))
    expected = AutoModelForCausalLM.from_pretrained(dense).eval()
    packed = leap.load_sparse(tmp_path / "sparse")
    with torch.no_grad():
        found, wanted = (model(input_ids=rows).logits for model in (packed, expected))
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found, wanted, rtol=3e-2, atol=3e-2)


def test_a_weight_that_is_not_contiguous_is_packed(dense: Path, sparse: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(dense).eval()
    for linear in prunable_linears(model).values():
        linear.weight = torch.nn.Parameter(linear.weight.detach().t().contiguous().t(), requires_grad=False)
    sparse_model.sparsify(model)
    rows = torch.randint(67, (2, 12))
    with torch.no_grad():
        assert torch.equal(model(input_ids=rows).logits, leap.load_sparse(sparse)(input_ids=rows).logits)


def test_a_newer_format_is_told_from_damage(sparse: Path) -> None:
    index = json.loads((sparse / sparse_checkpoint.INDEX).read_text())
    for version, says in ((3, "a newer version of this package reads it"), ("x", "is leap-sparse x; this reads")):
        (sparse / sparse_checkpoint.INDEX).write_text(json.dumps(index | {"version": version}))
        with pytest.raises(ValueError, match=says):
            leap.load_sparse(sparse)
