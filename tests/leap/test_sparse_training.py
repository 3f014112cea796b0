"""Pruned models that are trained on keep their zeros; so do those that an adapter is merged into."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from sparse_training_worker import pruned_model
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import leap
from leap import sparse_training
from leap.packed import save_masks
from leap.surgery import prunable_linears

ROOT = Path(__file__).resolve().parents[2]


class WithoutGradients(torch.optim.Optimizer):
    """Adds a constant to every weight, whatever its gradient says."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self, _closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(0.1)


OPTIMISERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "without gradients": WithoutGradients,
}


def train(model: nn.Module, optimiser: torch.optim.Optimizer, steps: int = 3) -> None:
    for step in range(steps):
        ids = torch.randint(67, (2, 8), generator=torch.Generator().manual_seed(step))
        optimiser.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()


def kept(model: nn.Module) -> dict[str, Tensor]:
    return {name: linear.weight != 0 for name, linear in prunable_linears(model).items()}


def assert_masks(model: nn.Module, masks: dict[str, Tensor]) -> None:
    for name, mask in kept(model).items():
        assert torch.equal(mask, masks[name]), f"{name}: {int((mask != masks[name]).sum())} weights differ"


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_zeros_stay_and_the_others_move(optimiser: str) -> None:
    model, masks = pruned_model()
    before = copy.deepcopy(model)
    leap.keep_sparse(model)
    train(model, OPTIMISERS[optimiser](model.parameters()))
    assert_masks(model, masks)
    for name, linear in prunable_linears(model).items():
        moved = (linear.weight != before.get_submodule(name).weight)[masks[name]]
        assert moved.float().mean() > 0.95
    assert not torch.equal(model.lm_head.weight, before.lm_head.weight)


def test_pruned_weights_count_neither_in_clipping_nor_in_moments() -> None:
    model, masks = pruned_model()
    plain = copy.deepcopy(model)
    leap.keep_sparse(model)
    ids = torch.arange(9)[None]
    for each in (model, plain):
        each(input_ids=ids, labels=ids).loss.backward()
    for name, linear in prunable_linears(model).items():
        expected = plain.get_submodule(name).weight.grad * masks[name]
        assert torch.equal(linear.weight.grad, expected)


def test_with_gradient_checkpointing_and_two_backward_passes() -> None:
    model, masks = pruned_model()
    leap.keep_sparse(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(2):
        model(input_ids=torch.arange(9)[None], labels=torch.arange(9)[None]).loss.backward()
    assert not any(linear.weight.grad[~masks[name]].any() for name, linear in prunable_linears(model).items())
    optimiser.step()
    assert_masks(model, masks)


def test_masks_of_an_export_decide_over_zeros(tmp_path: Path) -> None:
    model, masks = pruned_model()
    save_masks(tmp_path / "masks.leap", iter(masks.items()), {})
    with torch.no_grad():
        for linear in prunable_linears(model).values():
            linear.weight.add_(0.5)  # as fine-tuning might have done
    leap.keep_sparse(model, tmp_path)
    train(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    assert_masks(model, masks)


def test_removed_it_lets_go() -> None:
    model, masks = pruned_model()
    with leap.keep_sparse(model) as keeper:
        assert keeper.masks.keys() == masks.keys()
    train(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    assert all(mask.all() for mask in kept(model).values())
    with leap.keep_sparse(pruned_model()[0]):
        pass  # attached anew, and not in the way of another


def test_a_copy_keeps_its_zeros_and_nothing_outlives_a_model(tmp_path: Path) -> None:
    model, masks = pruned_model()
    leap.keep_sparse(model)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), steps=1)
    torch.save(model, tmp_path / "whole")
    for again in (copy.deepcopy(model), torch.load(tmp_path / "whole", weights_only=False)):
        train(again, torch.optim.AdamW(again.parameters(), lr=0.01))
        assert_masks(again, masks)
    alive = weakref.ref(model)
    del model, again
    gc.collect()
    assert alive() is None
    assert not sparse_training._live


def test_what_cannot_be_kept_is_refused() -> None:
    model, masks = pruned_model()
    name = next(iter(masks))
    for wrong, message in (
        ({"lm_head": torch.ones(67, 36).bool()}, "lm_head, which is no prunable layer"),
        ({name: torch.ones(3, 3).bool()}, rf"{name}: mask torch.bool \[3, 3\]"),
        ({name: torch.ones_like(masks[name])}, "no pruned weights"),
    ):
        with pytest.raises(ValueError, match=message):
            leap.keep_sparse(model, wrong)
    assert not sparse_training._live


def test_with_the_trainer(tmp_path: Path) -> None:
    model, masks = pruned_model()
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(67, (8, 8))]
    arguments = TrainingArguments(
        tmp_path,
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_steps=2,
    )
    Trainer(model, arguments, train_dataset=rows, callbacks=[leap.KeepSparse()]).train()
    assert_masks(model, masks)
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before)
    assert_masks(AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2"), masks)
    assert not sparse_training._live, "the callback lets go when the training ends"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "zero2", "zero3"])
def test_in_two_processes(kind: str) -> None:
    if kind.startswith("zero"):
        pytest.importorskip("deepspeed")
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "LEAP_NATIVE": "0",
    }
    worker = str(Path(__file__).with_name("sparse_training_worker.py"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", worker, kind]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]


def with_adapter(model: nn.Module, **options: Any) -> Any:
    """``model`` with a LoRA adapter whose product is not zero."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj", "lm_head"], **options)
    )
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    return wrapped


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_lora_merges_into_what_is_kept(options: dict[str, Any]) -> None:
    model, masks = pruned_model()
    dense = with_adapter(copy.deepcopy(model), **options).merge_and_unload()
    merged = leap.merge_lora(with_adapter(model, **options))
    assert merged is model
    assert_masks(merged, masks)
    for name, linear in prunable_linears(merged).items():
        assert torch.equal(linear.weight, dense.get_submodule(name).weight * masks[name])
    assert torch.equal(merged.lm_head.weight, dense.lm_head.weight)
    assert not torch.equal(
        merged.model.layers[0].mlp.up_proj.weight, pruned_model()[0].model.layers[0].mlp.up_proj.weight
    )


def test_lora_with_masks_of_an_export(tmp_path: Path) -> None:
    model, masks = pruned_model()
    save_masks(tmp_path / "masks.leap", iter(masks.items()), {})
    wrapped = with_adapter(model)
    wrapped.merge_adapter()
    with pytest.raises(ValueError, match=r"merged into .*q_proj already"):
        leap.merge_lora(wrapped)
    assert_masks(leap.merge_lora(wrapped, tmp_path), masks)


def test_what_has_no_adapter_or_no_zeros_is_not_merged() -> None:
    model, _ = pruned_model()
    with pytest.raises(ValueError, match="has no adapters to merge"):
        leap.merge_lora(model)
    with torch.no_grad():
        for linear in prunable_linears(model).values():
            linear.weight.add_(10)
    wrapped = with_adapter(model)
    with pytest.raises(ValueError, match="no pruned weights"):
        leap.merge_lora(wrapped)
    assert any("lora_" in name for name, _ in wrapped.named_parameters()), "it is as it was"


def test_pruned_tuned_merged_and_exported_it_has_the_requested_sparsity(tmp_path: Path) -> None:
    dense = pruned_model()[0]
    with torch.no_grad():
        for linear in prunable_linears(dense).values():
            linear.weight.copy_(torch.randn_like(linear.weight))
    rows = torch.randint(67, (8, 8))
    settings = leap.LearnSettings(steps=2, batch_rows=2, microbatch_rows=1)
    result = leap.prune(dense, rows, sparsity=0.6, settings=settings)
    with leap.keep_sparse(result.model):
        train(result.model, torch.optim.AdamW(result.model.parameters(), lr=0.01))
    wrapped = with_adapter(result.model)
    train(wrapped, torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=0.01))
    merged = leap.merge_lora(wrapped)
    zero, total = leap.zeros(merged)
    assert zero == round(0.6 * total)
    result.export(tmp_path)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert leap.zeros(exported) == (zero, total)
    assert all(torch.equal(tensor, exported.state_dict()[name]) for name, tensor in merged.state_dict().items())
