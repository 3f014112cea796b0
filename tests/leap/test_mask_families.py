"""Masking, learning and exporting models of seven families, tiny and random."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from leap.engine import LocalEngine
from leap.export import apply_masks, export, zeros
from leap.harden import ranked
from leap.hidden import with_hidden_states
from leap.learner import MaskLearner
from leap.masked_linear import install_masks, logit_tensors, masks_installed
from leap.packed import MaskFile
from leap.settings import LearnSettings
from leap.surgery import decoder_blocks, prunable_linears

SIZES = {"vocab_size": 61, "num_hidden_layers": 2, "max_position_embeddings": 32}
# Odd everywhere that heads allow it; four query heads share two keys.
GROUPED = {**SIZES, "hidden_size": 40, "intermediate_size": 43, "num_attention_heads": 4, "num_key_value_heads": 2}
ODD = {**GROUPED, "hidden_size": 33, "num_attention_heads": 3, "num_key_value_heads": 1}
SELF = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}
GATED = {*SELF, "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
#: Configuration, the blocks' name, the linear layers of a block.
FAMILIES = {
    "llama": (
        LlamaConfig(**ODD, head_dim=10, tie_word_embeddings=True),
        "model.layers",
        GATED,
    ),
    "qwen2": (Qwen2Config(**GROUPED), "model.layers", GATED),
    "qwen3": (Qwen3Config(**GROUPED, head_dim=6), "model.layers", GATED),
    "gemma3": (
        Gemma3TextConfig(**GROUPED, head_dim=6, sliding_window=4, layer_types=["sliding_attention", "full_attention"]),
        "model.layers",
        GATED,
    ),
    "mistral": (MistralConfig(**GROUPED, sliding_window=4), "model.layers", GATED),
    "opt": (
        # Its blocks call F.dropout by their own training flag, which activation checkpointing needs to be on.
        OPTConfig(**SIZES, hidden_size=40, ffn_dim=43, num_attention_heads=4, word_embed_proj_dim=40, dropout=0.0),
        "model.decoder.layers",
        {*SELF, "self_attn.out_proj", "fc1", "fc2"},
    ),
    "gpt_neox": (
        GPTNeoXConfig(**SIZES, hidden_size=40, intermediate_size=43, num_attention_heads=4),
        "gpt_neox.layers",
        {"attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
    ),
}
ROWS = torch.randint(61, (3, 12), generator=torch.Generator().manual_seed(1))
SPARSITY = 0.37


def build(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family][0]).eval()
    # Far from the small initial values, every layer matters to the output; so do biases that are not zero.
    with torch.no_grad():
        for module in decoder_blocks(model)[1].modules():
            if isinstance(module, nn.Linear):
                for parameter in module.parameters(recurse=False):
                    parameter.normal_(std=0.3)
    return model


@torch.no_grad()
def output(model: nn.Module):
    return model(input_ids=ROWS, use_cache=False).logits


def install(model: nn.Module):
    """Masks with random logits, the shared state set up for exact hard masks."""
    state, layers = install_masks(model, LearnSettings.published().family.gate())
    generator = torch.Generator().manual_seed(2)
    for layer in layers.values():
        layer.provide([nn.Parameter(torch.randn(layer.weight.shape, generator=generator) * 0.02)])
    state.harden = ranked(lambda: logit_tensors(layers).values(), SPARSITY, "global")
    return state, layers


@pytest.mark.parametrize("family", FAMILIES)
def test_the_linear_layers_of_the_blocks_are_masked_and_no_others(family):
    model = build(family)
    _, prefix, names = FAMILIES[family]
    dense = output(model)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    state, layers = install(model)
    assert set(layers) == {f"{prefix}.{block}.{name}" for block in range(2) for name in names}
    head = model.get_output_embeddings()
    assert type(head) is nn.Linear

    assert state.mode == "dense"
    assert torch.equal(output(model), dense), "to the bit"
    state.mode = "hard"
    assert not torch.allclose(output(model), dense, atol=0.1), "or the masks do nothing"
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert set(after) - set(before) == {f"{name}.logits_0" for name in layers}


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_mask_learns_with_and_without_activation_checkpointing(family, hidden):
    model = build(family)
    state, layers = install(model)
    settings = LearnSettings.published(
        steps=4, batch_rows=3, microbatch_rows=3, distillation=0.5, hidden_distillation=0.5 if hidden else 0.0
    )
    engine = LocalEngine(
        lambda rows: model(input_ids=rows, use_cache=False).logits,
        state,
        layers,
        model_hidden_forward=partial(with_hidden_states, model),
    )
    learner = MaskLearner(engine, settings, [0.5])
    grads = []
    for recompute in (False, True):
        if recompute:  # as the pipeline switches it on
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            for block in decoder_blocks(model)[1]:
                block.training = True
        learner.loss(ROWS, 1, 0).backward()
        grads.append([logits.grad for logits in logit_tensors(layers).values()])
        for logits in logit_tensors(layers).values():
            logits.grad = None
    for plain, recomputed in zip(*grads, strict=True):
        assert plain.abs().max() > 0
        assert torch.equal(plain, recomputed)
    assert all(p.grad is None for p in model.parameters())


LOAD = """
import json, sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
rows, results = torch.tensor(json.loads(sys.argv[2])), {}
for directory in json.loads(sys.argv[1]):
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    with torch.no_grad():
        results[directory] = model(input_ids=rows).logits.contiguous()
assert not any(name.split(".")[0].startswith("leap") for name in sys.modules)
save_file(results, sys.argv[3])
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory):
    """Per family: directory, its logits in a process that knows nothing of us, and the hard-masked model's logits."""
    root, expected = tmp_path_factory.mktemp("exports"), {}
    for family in FAMILIES:
        model = build(family)
        with masks_installed(model, LearnSettings.published().family.gate()):
            pass  # the model exported below has its own layers back
        masked = copy.deepcopy(model)
        state, layers = install(masked)
        state.mode = "hard"
        expected[family] = output(masked)
        masks = [state.harden.mask(layer.matrix, layer.logits) for layer in layers.values()]
        export(model, None, lambda number, _, masks=masks: (masks[number], None), root / family, {"family": family})
    directories = [str(root / family) for family in FAMILIES]
    found = root / "found.safetensors"
    arguments = [json.dumps(directories), json.dumps(ROWS.tolist()), str(found)]
    subprocess.run([sys.executable, "-c", LOAD, *arguments], check=True, cwd=root, timeout=600)
    loaded = load_file(found)
    return {family: (root / family, loaded[str(root / family)], expected[family]) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_computes_in_a_fresh_process_what_the_hard_mask_did(family, exported):
    _, loaded, expected = exported[family]
    torch.testing.assert_close(loaded, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_has_the_asked_sparsity_and_the_other_weights_untouched(family, exported):
    directory: Path = exported[family][0]
    pruned, dense = AutoModelForCausalLM.from_pretrained(directory), build(family).state_dict()
    zero, numel = zeros(pruned)
    assert zero == round(SPARSITY * numel)
    masks = MaskFile(directory)
    assert masks.about == {"family": family}
    for name, value in pruned.state_dict().items():
        layer = name.removesuffix(".weight")
        if name.endswith(".weight") and layer in masks.shapes:
            assert torch.equal(value, dense[name] * masks[layer])
        else:
            assert torch.equal(value, dense[name]), name
    assert torch.equal(pruned.get_input_embeddings().weight, dense[_key_of_embedding(pruned)])


def _key_of_embedding(model: PreTrainedModel) -> str:
    return next(n for n, m in model.named_modules() if m is model.get_input_embeddings()) + ".weight"


def test_tied_embeddings_stay_tied(exported):
    model = AutoModelForCausalLM.from_pretrained(exported["llama"][0])
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_new_weights_are_written_and_masked():
    model = build("llama")
    new = {name: torch.full_like(m.weight, 2.0) for name, m in prunable_linears(model).items()}
    sparsity = apply_masks(model, lambda _, name: (torch.eye(*new[name].shape).bool(), new[name]))
    for name, module in prunable_linears(model).items():
        assert torch.equal(module.weight, 2 * torch.eye(*module.weight.shape))
        assert sparsity[name] == 1 - min(module.weight.shape) / module.weight.numel()


@pytest.mark.parametrize(
    ("mask", "weight", "message"),
    [
        (lambda _: torch.ones(1, 2).bool(), None, "mask torch.bool .1, 2. for a weight"),
        (lambda w: torch.ones_like(w), None, "mask torch.float32"),
        (lambda w: torch.ones_like(w).bool(), lambda w: w[:1], "new weight .1, 33. for"),
        (lambda w: torch.ones_like(w).bool(), lambda w: w / 0, "NaN or Inf"),
        (lambda w: torch.ones_like(w).bool(), lambda w: w.double() * 1e200, "NaN or Inf"),
    ],
)
def test_masks_and_weights_that_do_not_fit_are_refused(mask, weight, message, tmp_path):
    model = build("llama")
    before = copy.deepcopy(model.state_dict())

    def pruned(_, name):
        dense = model.get_submodule(name).weight.detach()
        return mask(dense), None if weight is None else weight(dense)

    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj: .*" + message):
        export(model, None, pruned, tmp_path / "out", {})
    assert not (tmp_path / "out").exists()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_without_linear_layers_in_its_blocks_is_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, n_positions=8))
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no stack of decoder blocks"):
        install_masks(model, LearnSettings.published().family.gate())
    assert all(p.requires_grad for p in model.parameters())
