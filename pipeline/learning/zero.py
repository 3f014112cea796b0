"""A masked model under DeepSpeed ZeRO-3: frozen weights and trainable logits, both partitioned over the workers.

The logits that a forward pass gathers are bfloat16, whatever the model's dtype; the optimiser moves an fp32 master of
them, in which no update gets lost. What starts, continues or ends a run is always the master.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state
from torch import Tensor, nn
from transformers.integrations import HfDeepSpeedConfig

from leap.gates import Gate
from leap.learner import MaskedWeights
from leap.masked_linear import MaskedLinear, install_masks
from leap.surgery import decoder_blocks
from pipeline import models
from pipeline.config import LearnConfig, ModelConfig
from pipeline.learning.checkpoint import Checkpoint, bounds

#: Gives the first logits [out, in] of a layer by number and name.
InitialLogits = Callable[[int, str], Tensor]


def deepspeed_config(learn: LearnConfig, model: ModelConfig) -> dict[str, Any]:
    """The DeepSpeed configuration of a run."""
    settings = learn.settings
    microbatches = settings.batch_rows // settings.microbatch_rows
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": settings.microbatch_rows,
        "gradient_accumulation_steps": microbatches // learn.workers,
        "zero_optimization": {"stage": 3},
    }
    if not learn.gpu:
        # Prefetching hides transfer behind compute on a GPU; on a CPU the two share the same cores.
        config["zero_optimization"]["stage3_prefetch_bucket_size"] = 0
        config["zero_force_ds_cpu_optimizer"] = False
    if model.dtype != "float32":
        config["bf16" if model.dtype == "bfloat16" else "fp16"] = {"enabled": True}
    return config


class ZeroModel:
    """The partitioned model of one worker.

    Args:
        initial: first logits; called on every rank for every layer, used on rank 0.
    """

    def __init__(self, model: ModelConfig, learn: LearnConfig, gate: Gate, initial: InitialLogits) -> None:
        config = deepspeed_config(learn, model)
        # Referenced for as long as the model lives: while it exists, from_pretrained partitions what it reads.
        self._partitioning = HfDeepSpeedConfig(config)
        self.module = models.load_model(model)
        self.state, self.layers = install_masks(self.module, gate)
        self.weights, masters = self._add_logits(config, initial)
        if learn.activation_checkpointing:
            self.module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            for block in decoder_blocks(self.module)[1]:
                block.training = True  # the block alone: dropout modules inside it stay off,
                for name in [n for n, v in vars(block).items() if "dropout" in n and isinstance(v, float)]:
                    setattr(block, name, 0.0)  # and so do those that it applies itself (OPT)
        settings = learn.settings
        self.optimiser = torch.optim.AdamW(
            self.logits, lr=settings.learning_rate, betas=settings.betas, weight_decay=0.0
        )
        self.engine, *_ = deepspeed.initialize(
            model=self.module, optimizer=self.optimiser, config=config, model_parameters=self.logits
        )
        with torch.no_grad():
            for name, master in masters.items():  # deepspeed made its own from the rounded logits
                self.local_logits(name).copy_(master)

    @property
    def logits(self) -> list[nn.Parameter]:
        """The logit parameters in layer order, each partitioned."""
        return [layer.logits for layer in self.layers.values()]

    def forward(self, rows: Tensor) -> Tensor:
        """Logits [R, S, V] of rows [R, S]."""
        return self.engine(input_ids=rows.to(self.engine.device), use_cache=False).logits

    def set_learning_rate(self, rate: float) -> None:
        """Learning rate of the next step."""
        for group in self.optimiser.param_groups:
            group["lr"] = rate

    def shapes(self) -> dict[str, list[int]]:
        """Shape [out, in] of the logits of each layer."""
        return {name: list(_partitioned(layer.logits).ds_shape) for name, layer in self.layers.items()}

    def local_logits(self, layer: str) -> Tensor:
        """This worker's slice of the flattened fp32 logits of a layer, without DeepSpeed's padding."""
        return self._local(layer, safe_get_local_fp32_param(self.layers[layer].logits))

    def shard(self) -> dict[str, Tensor]:
        """This worker's logits and moments, {layer}.{part} → flat slice."""
        parts = {}
        for name, layer in self.layers.items():
            parts[f"{name}.logits"] = self.local_logits(name).clone()
            for part in ("exp_avg", "exp_avg_sq"):
                state = safe_get_local_optimizer_state(layer.logits, part)
                parts[f"{name}.{part}"] = self._local(name, state).clone()
        return parts

    def restore(self, checkpoint: Checkpoint) -> None:
        """Set the optimiser's state; the logits were given to the constructor."""
        for flat in self.engine.optimizer.fp32_partitioned_groups_flat:
            self.optimiser.state[flat] = {
                "step": torch.tensor(float(checkpoint.step)),
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
            }
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        for name, layer in self.layers.items():
            for part in ("exp_avg", "exp_avg_sq"):
                view = safe_get_local_optimizer_state(layer.logits, part)
                self._local(name, view).copy_(checkpoint.shard(name, part, rank, world))

    def _local(self, layer: str, padded: Tensor) -> Tensor:
        first, last = self._bounds(self.layers[layer])
        return padded.view(-1)[: last - first]

    @staticmethod
    def _bounds(layer: MaskedLinear) -> tuple[int, int]:
        numel = _partitioned(layer.logits).ds_numel
        return bounds(numel, torch.distributed.get_rank(), torch.distributed.get_world_size())

    def _add_logits(self, config: dict[str, Any], initial: InitialLogits) -> tuple[MaskedWeights, dict[str, Tensor]]:
        """Totals of the weights, and this worker's slice of the exact first logits of each layer."""
        numel, norm, masters = 0, 0.0, {}
        for number, (name, layer) in enumerate(self.layers.items()):
            with deepspeed.zero.GatheredParameters([layer.weight]):
                norm += float(torch.linalg.vector_norm(layer.weight.detach().float()))
                numel += layer.weight.numel()
                shape = layer.weight.shape
            with deepspeed.zero.Init(config_dict_or_path=config, dtype=torch.bfloat16):
                layer.logits = _Holder(shape).logits
            first = initial(number, name)
            with deepspeed.zero.GatheredParameters([layer.logits], modifier_rank=0):
                if torch.distributed.get_rank() == 0:
                    layer.logits.data.copy_(first)
            masters[name] = first.view(-1)[slice(*self._bounds(layer))].clone()
        return MaskedWeights(numel, norm), masters


def _partitioned(parameter: nn.Parameter) -> Any:
    """The parameter with the attributes ``ds_…`` that DeepSpeed gave it."""
    return parameter


class _Holder(nn.Module):
    """``zero.Init`` partitions the parameters of a module when its constructor ends."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.empty(shape, dtype=torch.bfloat16))
