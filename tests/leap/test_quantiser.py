"""Sparse checkpoints through ``from_pretrained``, and what loads models by it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from leap_kernels import SparseLinear, sparse_linear
from leap_kernels.idx8 import from_bmp128
from test_sparse_checkpoint import FAMILIES, GROUPED, TOLERANCE, make
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PretrainedConfig, pipeline

import leap
from leap import sparse_model
from leap.export import apply_masks
from leap.surgery import prunable_linears

ROOT = Path(__file__).resolve().parents[2]
EMBEDDED = ROOT / "pipeline" / "nano" / "model"
NO_PROBLEM = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}


def pack(config: PretrainedConfig, directory: Path, dtype: torch.dtype = torch.float32) -> tuple[Path, Path]:
    """A pruned random model: dense with zeros, and packed."""
    source = make(config, directory / "dense", dtype)
    leap.write_sparse(source, directory / "packed")
    return source, directory / "packed"


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    return pack(FAMILIES["llama tied"], tmp_path)[1]


def packed_nano(directory: Path) -> Path:
    """The embedded model, half of each weight matrix pruned by magnitude, packed beside its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED)
    linears = prunable_linears(model)

    def larger_half(_: int, name: str) -> tuple[torch.Tensor, None]:
        size = linears[name].weight.abs()
        return size > size.median(), None

    apply_masks(model, larger_half)
    model.save_pretrained(directory / "pruned")
    AutoTokenizer.from_pretrained(EMBEDDED).save_pretrained(directory / "pruned")
    leap.write_sparse(directory / "pruned", directory / "packed")
    return directory / "packed"


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed_nano(tmp_path_factory.mktemp("nano"))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_that_of_the_export_and_stays_packed(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source, target = pack(FAMILIES[family], tmp_path, dtype)
    dense = AutoModelForCausalLM.from_pretrained(source)
    model, info = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    assert {kind: info[kind] for kind in NO_PROBLEM} == NO_PROBLEM
    assert model.dtype == dtype
    assert model.get_input_embeddings().weight.dtype == dtype
    for name, linear in prunable_linears(dense).items():
        layer = model.get_submodule(name)
        assert isinstance(layer, SparseLinear)
        assert torch.equal(layer.weight.unpack(), linear.weight)
    assert not any(tensor.requires_grad or tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    ids = torch.randint(3, 67, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = dense(ids).logits
        assert (model(ids).logits - expected).norm() <= TOLERANCE[dtype] * expected.norm()
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied is bool(FAMILIES[family].tie_word_embeddings)


def test_in_another_dtype_and_placed_by_accelerate(packed: Path) -> None:
    expected = AutoModelForCausalLM.from_pretrained(packed)
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.bfloat16, device_map="auto")
    for name, layer in model.named_modules():
        if isinstance(layer, SparseLinear):
            assert layer.weight.vals.dtype == torch.bfloat16
            assert torch.equal(layer.weight.unpack(), expected.get_submodule(name).weight.unpack().bfloat16())


def test_saved_again_it_loads_again(packed: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_dequantised_it_is_the_dense_export(tmp_path: Path) -> None:
    source, target = pack(FAMILIES["opt"], tmp_path)
    model = AutoModelForCausalLM.from_pretrained(target).dequantize()
    expected = AutoModelForCausalLM.from_pretrained(source).state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    model.save_pretrained(tmp_path / "dense again")
    assert "quantization_config" not in json.loads((tmp_path / "dense again" / "config.json").read_text())


def test_held_as_the_dispatch_says(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU with much bandwidth."""
    plain = AutoModelForCausalLM.from_pretrained(packed)
    monkeypatch.setattr(sparse_model, "format_for", lambda *_: "idx8")
    model = AutoModelForCausalLM.from_pretrained(packed)
    name = "model.layers.1.mlp.up_proj"
    layer, expected = model.get_submodule(name), plain.get_submodule(name)
    assert layer.matrix_format == "idx8"
    assert layer._buffers.keys() == {"start", "base", "index", "vals", "bias"}, "not both formats at once"
    x = torch.randn(1, layer.in_features)
    torch.testing.assert_close(layer(x), sparse_linear(x, from_bmp128(expected.weight)))


def test_a_damaged_matrix_is_refused_by_name(packed: Path) -> None:
    from safetensors.torch import load_file, save_file

    (shard,) = packed.glob("sparse-*.safetensors")
    tensors = load_file(shard)
    tensors["model.layers.1.mlp.up_proj.off"][3] += 1
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj: BMP128 off does not follow from bits"):
        AutoModelForCausalLM.from_pretrained(packed)
    del tensors["model.layers.1.mlp.up_proj.bits"]
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj does not fit"):
        AutoModelForCausalLM.from_pretrained(packed)


def test_a_checkpoint_of_a_later_version_is_refused(packed: Path) -> None:
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["version"] = 3
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="leap-sparse 3; this version of leap reads leap-sparse 2"):
        AutoModelForCausalLM.from_pretrained(packed)


def test_a_dense_model_is_not_packed_in_loading(tmp_path: Path) -> None:
    from leap.quantiser import PackedConfig

    source = make(LlamaConfig(**GROUPED), tmp_path / "dense")
    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(source, quantization_config=PackedConfig())


@pytest.mark.parametrize("order", ["import leap, transformers", "import transformers.quantizers.auto, leap"])
def test_import_leap_is_enough_and_imports_no_torch(order: str, packed: Path) -> None:
    code = f"""
import sys
import leap
assert "torch" not in sys.modules and "transformers" not in sys.modules or {order.startswith("import transformers")}
{order}
from transformers import AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_pretrained({str(packed)!r}).model.layers[0].mlp.up_proj).__name__)
"""
    if order.startswith("import transformers"):
        code = f"{order}\n{code}"
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.stdout.split() == ["SparseLinear"], run.stderr


def test_pipelines_generate_with_packed_weights(nano: Path) -> None:
    dense = AutoModelForCausalLM.from_pretrained(nano.with_name("pruned"))
    tokenizer = AutoTokenizer.from_pretrained(nano)
    prompt = tokenizer("The function returns", return_tensors="pt")
    expected = tokenizer.decode(dense.generate(**prompt, max_new_tokens=12, do_sample=False)[0])
    pipe = pipeline("text-generation", model=str(nano))
    assert any(isinstance(module, SparseLinear) for module in pipe.model.modules())
    (answer,) = pipe("The function returns", max_new_tokens=12, do_sample=False)
    assert answer["generated_text"] == expected


def test_lm_eval_measures_packed_weights(nano: Path) -> None:
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    packed, dense = (
        huggingface.HFLM(pretrained=str(path), device="cpu", batch_size=2) for path in (nano, nano.with_name("pruned"))
    )
    assert any(isinstance(module, SparseLinear) for module in packed.model.modules())
    requests = [
        Instance("loglikelihood", {}, (context, continuation), number)
        for number, (context, continuation) in enumerate([("The function", " returns"), ("A list of", " names and")])
    ]
    got, expected = packed.loglikelihood(requests), dense.loglikelihood(requests)
    for (a, a_greedy), (b, b_greedy) in zip(got, expected, strict=True):
        assert a == pytest.approx(b, abs=1e-4)
        assert a_greedy is b_greedy
