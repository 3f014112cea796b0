"""One of two processes that fine-tune a pruned model together: ``torchrun … sparse_training_worker.py KIND``."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig

import leap
from leap.surgery import prunable_linears

STEPS = 3


def pruned_model() -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 36, "intermediate_size": 50, "num_attention_heads": 3, "num_key_value_heads": 1}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, vocab_size=67, num_hidden_layers=2))
    masks = {name: torch.rand(linear.weight.shape) < 0.5 for name, linear in prunable_linears(model).items()}
    with torch.no_grad():
        for name, linear in prunable_linears(model).items():
            linear.weight.masked_fill_(~masks[name], 0)
    return model, masks


def loss_of(model: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
    ids = torch.randint(67, (2, 8), generator=generator)
    return model(input_ids=ids, labels=ids).loss


def by_torch(wrapped: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    for step in range(STEPS):
        optimiser.zero_grad()
        loss_of(wrapped, step).backward()
        optimiser.step()


def ddp(model: nn.Module) -> None:
    wrapped = nn.parallel.DistributedDataParallel(model)
    by_torch(wrapped, torch.optim.AdamW(wrapped.parameters(), lr=0.01))


def fsdp2(model: nn.Module) -> None:
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    by_torch(model, torch.optim.AdamW(model.parameters(), lr=0.01))


def zero(stage: int, model: nn.Module) -> None:
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__ = {}
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
    }
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.01)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimiser, config=config)
    for step in range(STEPS):
        engine.backward(loss_of(engine, step))
        engine.step()


def whole(weight: Any) -> Tensor:
    """A copy of a weight that may be sharded."""
    if isinstance(weight, DTensor):
        return weight.full_tensor()
    if hasattr(weight, "ds_tensor"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight]):
            return weight.detach().clone()
    return weight.detach().clone()


def own_part(weight: Any) -> Tensor:
    """What this process holds of a weight."""
    if isinstance(weight, DTensor):
        return weight.to_local()
    return getattr(weight, "ds_tensor", weight)


def main(kind: str) -> None:
    dist.init_process_group("gloo")
    model, masks = pruned_model()
    before = {name: linear.weight.detach().clone() for name, linear in prunable_linears(model).items()}
    keeper = leap.keep_sparse(model)
    {"ddp": ddp, "fsdp2": fsdp2, "zero2": lambda m: zero(2, m), "zero3": lambda m: zero(3, m)}[kind](model)
    for name, linear in prunable_linears(model).items():
        weight = whole(linear.weight)
        assert not weight[~masks[name]].any(), f"{name}: {int(weight[~masks[name]].count_nonzero())} came back"
        changed = (weight != before[name].to(weight.dtype))[masks[name]].float().mean()
        assert changed > 0.9, f"{name}: {changed} of the kept weights moved"
        with torch.no_grad():  # as by an optimiser that moves weights without gradients
            own_part(linear.weight).add_(1)
    keeper.apply()
    for name, linear in prunable_linears(model).items():
        weight = whole(linear.weight)
        assert torch.equal(weight != 0, masks[name]), name
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
