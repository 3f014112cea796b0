"""``leap.prune`` from end to end, on a model that has learned a pattern."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import leap
from leap.layerwise import METHODS, Target, sweep
from leap.learner import NonFiniteLossError
from leap.surgery import prunable_linears

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = leap.LearnSettings.published(steps=60, batch_rows=16, microbatch_rows=8, learning_rate=0.01)
LAGRANGIAN = leap.DensityControl(kind="lagrangian", weight=200, relaxation=0.3, of="expected")
SHORT = replace(SETTINGS, steps=2, batch_rows=2, microbatch_rows=1)
VOCABULARY = 32


def pattern_rows(count: int, seed: int, length: int = 32) -> Tensor:
    """Rows [count, length] in which x[t+1] = (table[x[t]] + x[t−1]) mod V, from random first tokens."""
    table = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(5))
    tokens = [torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))]
    previous = torch.zeros(count, dtype=torch.int64)
    for _ in range(length - 1):
        tokens.append((table[tokens[-1]] + previous) % VOCABULARY)
        previous = tokens[-2]
    return torch.stack(tokens, dim=1)


@pytest.fixture(scope="module")
def trained_pattern_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(150):
        rows = pattern_rows(16, seed=step)
        optimiser.zero_grad()
        model(input_ids=rows, labels=rows).loss.backward()
        optimiser.step()
    return model.eval()


@pytest.fixture
def pattern_model(trained_pattern_model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A copy of the trained model that a test may prune."""
    return copy.deepcopy(trained_pattern_model)


@pytest.fixture(scope="module")
def rows() -> Tensor:
    """Calibration rows, from the few that there are: the model was trained on them. int64 [32, 32]"""
    return pattern_rows(32, seed=1000)


@pytest.fixture(scope="module")
def loss_on(rows: Tensor) -> Callable[[LlamaForCausalLM], float]:
    """Cross-entropy of a model on the calibration rows, in nats."""

    @torch.no_grad()
    def loss(model: LlamaForCausalLM) -> float:
        return float(model(input_ids=rows, labels=rows).loss)

    return loss


@pytest.fixture(autouse=True)
def _no_progress_bars():
    enabled = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    yield
    if enabled:
        transformers.utils.logging.enable_progress_bar()


def test_a_learned_mask_beats_magnitude_and_the_model_is_an_ordinary_one(pattern_model, rows, loss_on, tmp_path):
    dense = copy.deepcopy(pattern_model)
    steps: list[dict[str, float]] = []
    result = leap.prune(pattern_model, rows, sparsity=0.6, settings=SETTINGS, on_step=steps.append)

    magnitude = copy.deepcopy(dense)
    for _ in leap.sweep(magnitude, None, "magnitude", Target(0.6, "layer")):
        pass
    # Measured: dense 0.06, learned 0.03, magnitude 0.76 nats.
    assert loss_on(pattern_model) < 0.2 < 0.5 < loss_on(magnitude)
    assert result.model is pattern_model

    assert steps == result.history
    assert [m["step"] for m in steps] == list(range(60))
    assert steps[-1]["lm_loss"] < steps[0]["lm_loss"]
    assert steps[-1]["mask_loss.hard"] == pytest.approx(steps[-1]["mask_loss.sampled"], abs=0.05), "no gap to close"

    linears, untouched = prunable_linears(pattern_model), dense.state_dict()
    assert leap.zeros(pattern_model) == (round(0.6 * leap.zeros(dense)[1]), leap.zeros(dense)[1])
    assert all(type(m) is nn.Linear for m in linears.values())
    assert all(p.requires_grad for p in pattern_model.parameters())
    assert list(result.layer_sparsity) == list(linears)
    for name, value in pattern_model.state_dict().items():
        layer = name.removesuffix(".weight")
        kept = untouched[name] * result.mask(layer) if layer in linears else untouched[name]
        assert torch.equal(value, kept), name

    with torch.no_grad():
        for linear in linears.values():
            linear.weight.add_(1)  # as fine-tuning might do
    result.export(tmp_path / "out")
    loaded, masks = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), leap.MaskFile(tmp_path / "out")
    assert leap.zeros(loaded) == leap.zeros(pattern_model) == (round(0.6 * leap.zeros(dense)[1]), leap.zeros(dense)[1])
    assert {"method": "leap", "sparsity": 0.6, "scope": "global"}.items() <= masks.about.items()
    assert all(torch.equal(mask, result.mask(name)) for name, mask in masks.items())


@pytest.mark.parametrize("density", [SETTINGS.density, LAGRANGIAN], ids=["penalty", "lagrangian"])
def test_density_is_held_within_a_percent_and_more_steps_do_not_hurt(density, trained_pattern_model, rows, loss_on):
    losses = []
    for steps in (30, 120):
        model = copy.deepcopy(trained_pattern_model)
        result = leap.prune(model, rows, sparsity=0.6, settings=replace(SETTINGS, steps=steps, density=density))
        last = result.history[-1]
        controlled = last["density" if density.of == "sampled" else "expected_density"]
        assert controlled == pytest.approx(0.4, abs=0.01), steps
        losses.append(loss_on(model))
    assert losses[1] < losses[0] + 0.01


@pytest.mark.parametrize("scope", ["layer", "row"])
def test_sparsity_is_exact_within_the_asked_scope(scope, pattern_model, rows):
    result = leap.prune(pattern_model, rows, sparsity=0.3, settings=SHORT.with_family(scope=scope))
    for name, linear in prunable_linears(pattern_model).items():
        mask = result.mask(name)
        units = mask if scope == "row" else mask.reshape(1, -1)
        assert ((~units).sum(1) - 0.3 * units.shape[1]).abs().max() < 1, "spread so that the layer's number is exact"
        assert (~mask).sum() == round(0.3 * mask.numel())
        assert torch.equal(linear.weight != 0, mask)


@pytest.mark.parametrize("prior", ["magnitude", "wanda", "admm"])
def test_the_first_logits_are_the_priors_and_come_from_dense_weights(prior, trained_pattern_model, rows):
    # Hardly any learning and hardly any noise: what is left is the prior's mask.
    settings = replace(SHORT, steps=1, prior=prior, learning_rate=1e-9)
    settings = settings.with_family(init_std=1e-6, strength=1e6)
    model, swept = copy.deepcopy(trained_pattern_model), copy.deepcopy(trained_pattern_model)
    options = {"iterations": 6, "mask_iterations": 4} if prior == "admm" else None
    result = leap.prune(model, rows, sparsity=0.5, settings=settings, prior_rows=8, prior_options=options)
    target = Target(0.5, "layer" if prior == "magnitude" else "row")
    dense = prunable_linears(trained_pattern_model)
    for name, pruned in leap.sweep(swept, rows[:8], prior, target, options=options):
        assert torch.equal(result.mask(name), pruned.mask)
        weight = model.get_submodule(name).weight
        assert torch.equal(weight, dense[name].weight * pruned.mask), "not the weights the method computed"
    assert METHODS["admm"].changes_weights


def test_masks_over_new_weights_keep_the_priors_values_and_learn_from_the_dense_model(trained_pattern_model, rows):
    settings = replace(SHORT, steps=8, prior="admm", weights="prior", distillation=1.0, learning_rate=0.3)
    dense = copy.deepcopy(trained_pattern_model)
    result = leap.prune(copy.deepcopy(dense), rows, sparsity=0.5, settings=settings)
    swept = copy.deepcopy(dense)
    by_admm = {name: (r.mask, r.weight.clone()) for name, r in sweep(swept, rows, "admm", Target(0.5, "row"))}
    reopened = 0
    for name, linear in prunable_linears(result.model).items():
        kept, (prior_mask, prior_weight) = result.mask(name), by_admm[name]
        expected = torch.where(prior_mask, prior_weight, dense.get_submodule(name).weight)
        assert torch.equal(linear.weight, expected * kept)
        reopened += int((kept & ~prior_mask).sum())
    assert reopened, "the masks have moved"
    # Distilled from the dense model, not from the new weights with their masks off.
    assert result.history[0]["divergence"] > 0.05


def test_new_weights_want_a_prior_that_has_some():
    with pytest.raises(ValueError, match="weights prior wants"):
        replace(SHORT, prior="wanda", weights="prior")


def test_the_same_seed_gives_the_same_masks_and_another_others(trained_pattern_model, rows):
    def masks(seed: int) -> dict[str, Tensor]:
        model = copy.deepcopy(trained_pattern_model)
        return leap.prune(model, rows, sparsity=0.5, settings=replace(SHORT, seed=seed)).packed_masks

    first, again, other = masks(0), masks(0), masks(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


class _StopError(Exception):
    pass


@pytest.mark.parametrize("when", ["prior", "step"])
def test_interrupted_it_leaves_the_model_as_it_was(when, pattern_model, rows, monkeypatch):
    pattern_model.train()
    pattern_model.lm_head.requires_grad_(False)
    before, modules = copy.deepcopy(pattern_model.state_dict()), list(pattern_model.modules())
    flags = [p.requires_grad for p in pattern_model.parameters()]

    def stop(*_):
        raise _StopError

    if when == "prior":  # in the second block, when half of its layers are pruned
        run = METHODS["wanda"].run
        calls = iter(range(14))
        failing = replace(METHODS["wanda"], run=lambda *args: stop() if next(calls) == 10 else run(*args))
        monkeypatch.setitem(METHODS, "wanda", failing)
    with pytest.raises(_StopError):
        leap.prune(pattern_model, rows, sparsity=0.5, settings=SHORT, on_step=stop)
    assert list(pattern_model.modules()) == modules
    assert [p.requires_grad for p in pattern_model.parameters()] == flags
    assert all(m.training for m in pattern_model.modules())
    after = pattern_model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_bfloat16_model_stays_one(pattern_model, rows):
    result = leap.prune(pattern_model.bfloat16(), rows, sparsity=0.5, settings=SHORT)
    assert {p.dtype for p in result.model.parameters()} == {torch.bfloat16}
    zero, numel = leap.zeros(result.model)
    assert zero == round(0.5 * numel)


def test_a_loss_that_is_not_finite_stops_the_run(pattern_model, rows):
    with torch.no_grad():
        pattern_model.lm_head.weight.fill_(3e38)  # finite, but not its products
    with pytest.raises(NonFiniteLossError, match="step 0"):
        leap.prune(pattern_model, rows, sparsity=0.5, settings=SHORT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": torch.zeros(4, dtype=torch.int64)}, r"rows must be token ids .*\[4\]"),
        ({"text": torch.zeros(4, 1, dtype=torch.int64)}, "S >= 2"),
        ({"text": torch.zeros(0, 8, dtype=torch.int64)}, "rows must be token ids"),
        ({"text": torch.zeros(4, 8)}, "torch.float32"),
        ({"sparsity": 1.0}, "sparsity must be in"),
        ({"prior_options": {"bogus": 1}}, "wanda has no option 'bogus'"),
    ],
)
def test_wrong_arguments(change, message, pattern_model, rows):
    with pytest.raises(ValueError, match=message):
        leap.prune(pattern_model, **{"text": rows, "sparsity": 0.5, "settings": SHORT, **change})


IMPORTS = """
import sys
import leap
assert "torch" not in sys.modules and "transformers" not in sys.modules, "import leap is cheap"
import leap.settings
assert "torch" not in sys.modules, "so is reading a configuration"
leap.prune, leap.sweep, leap.MaskFile, leap.Schedule, leap.zeros
for name in leap.__all__:
    getattr(leap, name)
import leap_kernels
assert not {"ray", "mlflow", "deepspeed", "lm_eval", "pipeline"} & set(sys.modules)
try:
    leap.bogus
except AttributeError as error:
    assert "bogus" in str(error)
"""


def test_import_is_cheap_and_brings_in_nothing_of_the_pipeline(tmp_path):
    # From a mere checkout, with nothing installed and no path to the kernels.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", IMPORTS], check=True, cwd=tmp_path, env=environment, timeout=600)


def test_a_common_step_moves_sparsity_to_where_it_costs_least(pattern_model, rows):
    with torch.no_grad():  # nothing of this MLP reaches the output any more
        pattern_model.model.layers[0].mlp.down_proj.weight *= 1e-4
    idle = {}
    for rate in (0.0, 0.1):
        settings = replace(SETTINGS, weight_reward=0, distillation=1, density=LAGRANGIAN, matrix_rate=rate)
        settings = settings.with_family(noise=False)
        model = copy.deepcopy(pattern_model)
        result = leap.prune(model, rows, sparsity=0.6, settings=settings)
        idle[rate] = [share for name, share in result.layer_sparsity.items() if "layers.0.mlp" in name]
        kept = sum(int(linear.weight.count_nonzero()) for linear in prunable_linears(model).values())
        numel = sum(linear.weight.numel() for linear in prunable_linears(model).values())
        assert kept == numel - round(0.6 * numel), "exact, whatever moved"
    assert min(idle[0.1]) > 0.6
    assert sum(idle[0.1]) > sum(idle[0.0])


@pytest.mark.parametrize("prior", ["wanda", "admm"])
def test_weights_that_are_not_contiguous_are_pruned_as_others(trained_pattern_model, rows, prior):
    settings = replace(SHORT, prior=prior, weights="prior" if prior == "admm" else "dense")
    expected, transposed = copy.deepcopy(trained_pattern_model), copy.deepcopy(trained_pattern_model)
    for linear in prunable_linears(transposed).values():
        linear.weight = nn.Parameter(linear.weight.detach().t().contiguous().t())
    for model in (expected, transposed):
        leap.prune(model, rows[:4], sparsity=0.5, settings=settings)
    for name, weight in expected.named_parameters():
        torch.testing.assert_close(transposed.get_parameter(name), weight, rtol=1e-4, atol=1e-5)
