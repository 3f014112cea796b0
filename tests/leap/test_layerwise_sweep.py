"""The sweep over whole models, on tiny random ones of seven families."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
)

from leap.layerwise import METHODS, InputStatistics, Target, reconstruct, reconstruct_sweep, sweep
from leap.layerwise.selection import prune_count
from leap.surgery import decoder_blocks, prunable_linears

SIZES = {"vocab_size": 97, "num_hidden_layers": 2, "max_position_embeddings": 32}
GROUPED = {**SIZES, "hidden_size": 32, "intermediate_size": 43, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS = {
    "llama": LlamaConfig(**GROUPED),
    "qwen2": Qwen2Config(**GROUPED),
    "qwen3": Qwen3Config(**GROUPED, head_dim=6),
    "gemma3": Gemma3TextConfig(
        **GROUPED, head_dim=6, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
    ),
    "mistral": MistralConfig(**GROUPED, sliding_window=4),
    "opt": OPTConfig(**SIZES, hidden_size=32, ffn_dim=43, num_attention_heads=4, word_embed_proj_dim=32),
    "gpt_neox": GPTNeoXConfig(**SIZES, hidden_size=32, intermediate_size=43, num_attention_heads=4),
}
ROWS = torch.randint(97, (5, 9), generator=torch.Generator().manual_seed(1))
HALF = Target(0.5)


@pytest.fixture(params=CONFIGS)
def model(request):
    return build(request.param)


@pytest.fixture
def llama():
    return build("llama")


def build(family: str) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]).eval()
    # Far from the small initial values, attention and its masks matter to the activations.
    for linear in prunable_linears(model).values():
        nn.init.normal_(linear.weight, std=0.3)
    return model


@torch.no_grad()
def inputs_by_full_forwards(model: nn.Module, batch_rows: int) -> dict[str, InputStatistics]:
    """Statistics of every linear's inputs, from forwards of the whole model as anyone would run it."""
    statistics = {n: InputStatistics(m.in_features, "gram") for n, m in prunable_linears(model).items()}
    handles = [
        linear.register_forward_pre_hook(lambda _, args, name=name: statistics[name].update(args[0]))
        for name, linear in prunable_linears(model).items()
    ]
    for batch in ROWS.split(batch_rows):
        model(input_ids=batch)
    for handle in handles:
        handle.remove()
    return statistics


def of_block(model: nn.Module, index: int) -> dict[str, nn.Linear]:
    prefix, _ = decoder_blocks(model)
    return {n: m for n, m in prunable_linears(model).items() if n.startswith(f"{prefix}.{index}.")}


def test_each_block_sees_the_pruned_blocks_before_it(model):
    reference = copy.deepcopy(model)
    results = dict(sweep(model, ROWS, "wanda", HALF, batch_rows=2))
    assert list(results) == list(prunable_linears(model))
    for index in range(2):
        statistics = inputs_by_full_forwards(reference, batch_rows=2)
        for name, linear in of_block(reference, index).items():
            expected = METHODS["wanda"](linear.weight, statistics[name], HALF)
            torch.testing.assert_close(results[name].score, expected.score, rtol=1e-5, atol=1e-6)
            assert torch.equal(results[name].mask, expected.mask), name
            with torch.no_grad():
                linear.weight.mul_(expected.mask)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, reference.get_parameter(name)), name


def test_new_weights_are_installed_and_seen_by_the_next_block(model):
    reference = copy.deepcopy(model)
    results = dict(sweep(model, ROWS, "admm", HALF, batch_rows=2))
    for index in range(2):
        statistics = inputs_by_full_forwards(reference, batch_rows=2)
        for name, linear in of_block(reference, index).items():
            expected = METHODS["admm"](linear.weight, statistics[name], HALF)
            # fp32 sums in another order: a near tie may fall the other way.
            assert (results[name].mask != expected.mask).float().mean() < 0.01
            torch.testing.assert_close(results[name].weight, expected.weight, rtol=0.02, atol=0.02)
            with torch.no_grad():
                linear.weight.copy_(results[name].weight)
    for name, linear in prunable_linears(model).items():
        assert results[name].weight.data_ptr() == linear.weight.data_ptr()
        assert not linear.weight[~results[name].mask].any()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_sweeps_to_exact_sparsity(llama, method):
    for _, result in sweep(llama, ROWS, method, HALF):
        pruned = (~result.mask).sum(1)
        assert pruned.sum() == prune_count(0.5, result.mask.numel())
        assert pruned.max() - pruned.min() <= result.mask.shape[1] % 2  # half of an odd number of columns


def test_batch_size_and_spilling_change_nothing_but_rounding(llama, tmp_path):
    spill = tmp_path / "spill"
    other = copy.deepcopy(llama)
    results = dict(sweep(llama, ROWS, "wanda", HALF, batch_rows=8))
    for name, result in sweep(other, ROWS, "wanda", HALF, batch_rows=3, spill_dir=spill, device="cpu"):
        torch.testing.assert_close(result.score, results[name].score)
    assert spill.is_dir()
    assert not list(spill.iterdir())


def test_a_bf16_model_stays_bf16(llama, tmp_path):
    llama.bfloat16()
    for _, result in sweep(llama, ROWS, "admm", HALF, spill_dir=tmp_path):
        assert result.weight.dtype == torch.bfloat16
        assert result.score.dtype == torch.float32


def test_magnitude_needs_no_rows(model):
    dense = copy.deepcopy(model)
    for name, result in sweep(model, None, "magnitude", HALF):
        weight = prunable_linears(dense)[name].weight
        assert torch.equal(result.mask, METHODS["magnitude"](weight, None, HALF).mask)
        assert torch.equal(prunable_linears(model)[name].weight, weight * result.mask)


def test_progress_counts_layers_and_modes_come_back(llama):
    seen: list[tuple[int, int]] = []
    llama.train()
    for _ in sweep(llama, ROWS, "wanda", HALF, progress=lambda done, total: seen.append((done, total))):
        assert torch.is_grad_enabled()
        assert not llama.training
    assert seen == [(i, 14) for i in range(1, 15)]
    assert llama.training
    assert all(p.requires_grad for p in llama.parameters())
    assert not any("forward" in vars(block) for block in decoder_blocks(llama)[1])
    assert not any(m._forward_pre_hooks for m in llama.modules())


def test_a_sweep_broken_off_leaves_whole_blocks(llama):
    iterator = sweep(llama, ROWS, "wanda", HALF)
    next(iterator)
    iterator.close()
    assert all((m.weight == 0).any() for m in of_block(llama, 0).values())
    assert all((m.weight != 0).all() for m in of_block(llama, 1).values())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"method": "lottery"}, "magnitude, wanda"),
        ({"rows": None}, "needs calibration rows"),
        ({"rows": ROWS[0]}, r"\[rows, seq\]"),
        ({"rows": ROWS[:0]}, "at least one"),
        ({"batch_rows": 0}, "batch_rows"),
        ({"options": {"rho": 1}}, "no option 'rho'; it has none"),
        ({"method": "admm", "options": {"roh": 1}}, "'roh'; it has schedule, iterations"),
        ({"target": Target.n_m(2, 4)}, "mlp.down_proj: 43 columns"),
    ],
)
def test_mistakes_are_named_at_the_call(llama, arguments, words):
    with pytest.raises(ValueError, match=words):
        sweep(llama, **{"rows": ROWS, "method": "wanda", "target": HALF, **arguments})


def test_a_failure_names_the_layer(llama):
    with torch.no_grad():
        of_block(llama, 0)["model.layers.0.self_attn.k_proj"].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.self_attn\.k_proj, magnitude: .*NaN"):
        list(sweep(llama, ROWS, "magnitude", HALF))


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.needs != "none"])
def test_inputs_beyond_all_numbers_are_told_with_their_layer(llama, method):
    """Finite weights, as large as float32 allows, whose products are not."""
    with torch.no_grad():
        of_block(llama, 0)["model.layers.0.mlp.up_proj"].weight.mul_(1e30)
    with pytest.raises(ValueError, match=rf"^model\.layers\.\d\.\S+, {method}: "):
        list(sweep(llama, ROWS, method, HALF))


def test_what_nobody_foresaw_keeps_its_kind_and_names_the_layer(llama, monkeypatch):
    def fails(*_, **__):
        raise KeyError("x")

    monkeypatch.setattr(type(METHODS["magnitude"]), "__call__", fails)
    with pytest.raises(KeyError) as caught:
        list(sweep(llama, ROWS, "magnitude", HALF))
    assert caught.value.__notes__ == ["while pruning model.layers.0.self_attn.q_proj with magnitude"]


class TupleBlock(nn.Module):
    """A decoder block in the older style: hidden states by keyword, a tuple back."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, *, hidden_states, scale):
        return hidden_states + scale * self.linear(hidden_states), "cache"


class TupleModel(nn.Module):
    """A causal LM without any of the library's conventions except its call."""

    def __init__(self, blocks_run: int, scale_by_token: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(97, 8)
        self.layers = nn.ModuleList(TupleBlock() for _ in range(3))
        self.blocks_run = blocks_run
        self.scale_by_token = scale_by_token

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, use_cache=None):  # noqa: ARG002
        hidden = self.embed(input_ids)
        scale = input_ids[..., None].float() if self.scale_by_token else torch.tensor(0.5)
        for layer in self.layers[: self.blocks_run]:
            hidden, _ = layer(hidden_states=hidden, scale=scale)
        return hidden


def test_blocks_that_return_tuples():
    torch.manual_seed(0)
    model = TupleModel(3)
    reference = copy.deepcopy(model)
    results = dict(sweep(model, ROWS, "wanda", HALF, batch_rows=2))
    for name, linear in prunable_linears(reference).items():
        expected = METHODS["wanda"](linear.weight, inputs_by_full_forwards(reference, 2)[name], HALF)
        assert torch.equal(results[name].mask, expected.mask)
        with torch.no_grad():
            linear.weight.mul_(expected.mask)


def test_models_whose_blocks_cannot_run_one_by_one_are_refused():
    with pytest.raises(ValueError, match="called 2 of its 3 decoder blocks"):
        list(sweep(TupleModel(2), ROWS, "wanda", HALF))
    with pytest.raises(ValueError, match="depend on the tokens"):
        list(sweep(TupleModel(3, scale_by_token=True), ROWS, "wanda", HALF, batch_rows=1))


@torch.no_grad()
def test_new_weights_are_fitted_block_after_block(model):
    dense = copy.deepcopy(model)
    masks = {n: m.weight.abs() > m.weight.abs().median() for n, m in prunable_linears(model).items()}
    results = dict(reconstruct_sweep(model, ROWS, masks.__getitem__, damping=0.1, batch_rows=2))
    assert results.keys() == masks.keys()
    # What each block saw: the model as it is now before it, and itself dense.
    for index in range(2):
        seen = copy.deepcopy(model)
        for name in of_block(seen, index):
            seen.get_submodule(name).weight.copy_(dense.get_submodule(name).weight)
        statistics = inputs_by_full_forwards(seen, batch_rows=2)
        for name, linear in of_block(model, index).items():
            expected = reconstruct(
                dense.get_submodule(name).weight, masks[name], statistics[name].gram, damping=0.1, precision="float64"
            )
            torch.testing.assert_close(linear.weight, expected, rtol=2e-3, atol=2e-3)
            assert not linear.weight[~masks[name]].any()
            assert torch.equal(results[name].mask, masks[name])


def test_a_mask_of_another_shape_is_refused_with_its_layer(llama):
    with pytest.raises(
        ValueError, match=r"^model\.layers\.0\.self_attn\.q_proj, reconstruction: .*do not fit together"
    ):
        next(reconstruct_sweep(llama, ROWS, lambda _: torch.ones(2, 2, dtype=torch.bool)))
