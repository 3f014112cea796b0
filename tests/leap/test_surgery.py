"""What of a model is prunable, and what is refused before any work."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import new_class

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config, PreTrainedModel

import leap
from leap.export import export, zeros
from leap.layerwise import Target
from leap.surgery import block_weights, check_runs, decoder_blocks, prunable_linears, shared_linears

SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 32}
MOE = {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
ATTENTION = 2 * 32 * 32 + 2 * 32 * 16
ROWS = torch.randint(61, (4, 12), generator=torch.Generator().manual_seed(1))
SHORT = leap.LearnSettings(steps=1, batch_rows=2, microbatch_rows=2)


def build(kind: str, **fields: object) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields)).eval()


@pytest.mark.parametrize(
    ("kind", "fields", "dense"),
    [
        ("llama", GROUPED, 0),
        ("mixtral", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}, 4 * 3 * 32 * 48 + 4 * 32),
        ("qwen3_moe", {**MOE, "decoder_sparse_step": 1}, 4 * 3 * 32 * 24 + 4 * 32),
        # Biases of the experts lie in matrices, one row an expert.
        (
            "gpt_oss",
            {**GROUPED, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
            4 * 3 * 32 * 48 + 4 * (2 * 48 + 32) + 4 * 32,
        ),
    ],
)
def test_the_prunable_share_counts_fused_experts(kind: str, fields: dict[str, object], dense: int) -> None:
    weights = block_weights(build(kind, **fields))
    prunable = ATTENTION + (3 * 32 * 48 if kind == "llama" else 0)
    assert (weights.prunable, weights.total) == (2 * prunable, 2 * (prunable + dense))
    if kind == "llama":
        assert weights.share == 1
        assert weights.refusal() is None
    else:
        assert weights.share < 0.3
        assert f"only {100 * weights.share:.1f} % of the decoder blocks' weights" in weights.refusal()
        assert "model.layers.*.mlp.experts.gate_up_proj" in weights.refusal()


def test_a_model_whose_experts_stay_dense_is_pruned_only_when_the_user_says_so() -> None:
    model = build("mixtral", **GROUPED, num_local_experts=4, num_experts_per_tok=2)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"MixtralForCausalLM: only 14\.\d % .* allow_dense=True"):
        leap.prune(model, ROWS, sparsity=0.5, settings=SHORT)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    result = leap.prune(model, ROWS, sparsity=0.5, settings=SHORT, allow_dense=True)
    zero, numel = zeros(model)
    assert (zero, numel) == (result.blocks.prunable // 2, result.blocks.prunable)
    assert result.block_sparsity == zero / result.blocks.total == pytest.approx(0.5 * result.blocks.share)


def test_blocks_of_several_kinds_are_one_stack() -> None:
    model = build(
        "jamba",
        **GROUPED,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=1,
        mamba_d_state=4,
        use_mamba_kernels=False,
    )
    prefix, blocks = decoder_blocks(model)
    assert prefix == "model.layers"
    assert len({type(block) for block in blocks}) == 2
    assert {name.split(".")[2] for name in prunable_linears(model)} == {"0", "1"}


def test_of_a_multimodal_model_the_language_model_is_pruned_however_large_the_tower() -> None:
    text = {**GROUPED, "head_dim": 8}
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = Gemma3Config(
        text_config=text, vision_config={**vision, "image_size": 16, "patch_size": 8}, mm_tokens_per_image=4
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert decoder_blocks(model)[0] == "model.language_model.layers"


def test_a_weight_that_two_layers_share_is_masked_and_counted_once() -> None:
    model = build("llama", **GROUPED)
    first, second = (model.model.layers[i].mlp for i in (0, 1))
    second.up_proj.weight = first.up_proj.weight
    dense = copy.deepcopy(model)
    name = "model.layers.1.mlp.up_proj"
    assert shared_linears(model) == {name: "model.layers.0.mlp.up_proj"}
    assert name not in prunable_linears(model)
    numel = 2 * (ATTENTION + 3 * 32 * 48) - 32 * 48
    assert block_weights(model).prunable == block_weights(model).total == numel
    result = leap.prune(model, ROWS, sparsity=0.5, settings=leap.LearnSettings(steps=3, batch_rows=2, prior="admm"))
    assert zeros(model) == (numel // 2, numel)
    assert second.up_proj.weight is first.up_proj.weight
    assert type(second.up_proj) is nn.Linear
    mask = result.mask("model.layers.0.mlp.up_proj")
    assert torch.equal(second.up_proj.weight, dense.model.layers[1].mlp.up_proj.weight * mask)
    assert [name for name, _ in leap.sweep(dense, ROWS, "wanda", Target(0.5))] == list(prunable_linears(dense))


def test_a_layer_that_does_not_run_once_is_named_before_any_work() -> None:
    model = build("llama", **GROUPED)
    check_runs(model, ROWS)
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
    with pytest.raises(ValueError, match=r"for model\.layers\.0\.mlp\.up_proj, which ran 2 times"):
        leap.prune(model, ROWS, sparsity=0.5, settings=SHORT)
    mamba = build("mamba", vocab_size=61, hidden_size=32, num_hidden_layers=2, state_size=4)
    with pytest.raises(ValueError, match=r"dt_proj and 1 more, which ran 0 times .*: the model reads its weight"):
        leap.prune(mamba, ROWS, sparsity=0.5, settings=SHORT)
    requested = {name: parameter.requires_grad for name, parameter in mamba.named_parameters()}
    assert all(requested.values())


@pytest.mark.parametrize("frozen", [False, True])
def test_a_layer_that_no_token_is_routed_to_is_told_from_one_that_is_read(frozen: bool) -> None:
    model = build("llama", **GROUPED).requires_grad_(not frozen)
    mlp = model.model.layers[1].mlp
    mlp.expert = nn.Linear(32, 32)  # of a router that sends everything elsewhere
    with pytest.raises(ValueError, match=r"mlp\.expert, which ran 0 times .*: it takes no part; the model"):
        check_runs(model, ROWS)
    assert mlp.expert.weight.requires_grad


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight"]
)
def test_weights_that_are_not_finite_are_named(name: str, value: float) -> None:
    model = build("llama", **GROUPED)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[7] = value
    with pytest.raises(ValueError, match=f"{name} holds NaN or Inf"):
        leap.prune(model, ROWS, sparsity=0.5, settings=SHORT)


def _attach(model: nn.Module) -> nn.Module:
    """As the package peft does: a layer of its own classes around the dense one."""

    class LoraLayer:
        __module__ = "peft.tuners.lora.layer"

    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora_A(x)

    adapter = new_class("Linear", (nn.Module, LoraLayer), exec_body=lambda body: body.update(forward=forward))()
    adapter.base_layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    adapter.lora_A = nn.Linear(32, 32, bias=False)
    model.set_submodule("model.layers.0.self_attn.q_proj", adapter)
    return model


@pytest.mark.parametrize(
    "use",
    [
        lambda model, _: leap.prune(model, ROWS, sparsity=0.5, settings=SHORT),
        lambda model, _: next(leap.sweep(model, ROWS, "wanda", Target(0.5))),
        lambda model, path: export(model, None, lambda *_: None, path, {}),
    ],
)
def test_an_attached_adapter_is_refused(use: Callable[..., object], tmp_path) -> None:
    with pytest.raises(ValueError, match=r"merge the adapter first \(model\.merge_and_unload\(\)\)"):
        use(_attach(build("llama", **GROUPED)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_result_is_not_exported_with_an_adapter_and_is_after_it_was_merged(tmp_path) -> None:
    model = build("llama", **GROUPED)
    result = leap.prune(model, ROWS, sparsity=0.5, settings=SHORT)
    plain = model.get_submodule("model.layers.0.self_attn.q_proj")
    _attach(model)
    with pytest.raises(ValueError, match="merge the adapter first"):
        result.export(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    model.set_submodule("model.layers.0.self_attn.q_proj", plain)
    result.export(tmp_path / "out")
