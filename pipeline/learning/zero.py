"""A masked model under DeepSpeed ZeRO-3: frozen weights and trainable logits, both partitioned over the workers.

DeepSpeed partitions, gathers and releases. The optimiser is ours and works on the partitions themselves, during the
backward pass: as soon as a layer's gradient exists it is averaged over the workers, each of which takes its slice and
moves its part of the logits. DeepSpeed's own ZeRO-3 optimiser would keep an fp32 copy of every trainable parameter and
every gradient until the end of the step, 8 bytes a logit on top of what :mod:`leap.optimisers` names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig

from leap.engine import MaskedWeights
from leap.gates import Gate, Matrix
from leap.hidden import with_hidden_states
from leap.masked_linear import install_masks, logit_tensors, provide_logits
from leap.optimisers import Updater
from leap.surgery import decoder_blocks
from pipeline.artifacts.logit_checkpoint import Checkpoint, bounds
from pipeline.config import LearnConfig, ModelConfig
from pipeline.model import loading

#: Gives the first logits of a tensor by its number, its name and the matrices that read it.
InitialLogits = Callable[[int, str, Sequence[Matrix]], Tensor]
#: Gives the weights [out, in] that a layer's mask is learned over, by name and dense weights.
NewWeight = Callable[[str, Tensor], Tensor]


def deepspeed_config(learn: LearnConfig, model: ModelConfig) -> dict[str, Any]:
    """The DeepSpeed configuration of a run."""
    settings = learn.settings
    microbatches = settings.batch_rows // settings.microbatch_rows
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": settings.microbatch_rows,
        "gradient_accumulation_steps": microbatches // learn.workers,
        "zero_optimization": {
            "stage": 3,
            # By default, layers that are used again within 10⁹ parameters stay whole: all of a small model.
            "stage3_max_reuse_distance": 0,
            # Nor may small ones: the whole copy would not see what the optimiser does to the partition.
            "stage3_param_persistence_threshold": 0,
        },
    }
    if not learn.gpu:
        # Prefetching hides transfer behind compute on a GPU; on a CPU the two share the same cores.
        config["zero_optimization"]["stage3_prefetch_bucket_size"] = 0
        config["zero_force_ds_cpu_optimizer"] = False
    if model.dtype != "float32":
        config["bf16" if model.dtype == "bfloat16" else "fp16"] = {"enabled": True}
    return config


class ZeroModel:
    """The partitioned model of one worker: a :class:`leap.engine.Engine`.

    Args:
        initial: first logits; called on rank 0 for every tensor.
        new_weight: what masks are learned over; called on rank 0 for every layer. None for the dense weights.
    """

    def __init__(
        self,
        model: ModelConfig,
        learn: LearnConfig,
        gate: Gate,
        initial: InitialLogits,
        new_weight: NewWeight | None = None,
    ) -> None:
        self.rank, self.world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        config = deepspeed_config(learn, model)
        checkpoint = loading.checkpoint(model)  # what is missing is found only while nothing is partitioned
        # Referenced for as long as the model lives: while it exists, from_pretrained partitions what it reads.
        self._partitioning = HfDeepSpeedConfig(config)
        self.module = loading.load(checkpoint, model)
        self.state, self.layers = install_masks(self.module, gate)
        self._updater = Updater(learn.settings, _total)
        self.weights = self._add_parameters(config, initial, new_weight)
        if learn.activation_checkpointing:
            _checkpoint_activations(self.module)
            for block in decoder_blocks(self.module)[1]:
                block.training = True  # the block alone: dropout modules inside it stay off,
                for name in [n for n, v in vars(block).items() if "dropout" in n and isinstance(v, float)]:
                    setattr(block, name, 0.0)  # and so do those that it applies itself (OPT)
        # Without the number type, on which DeepSpeed would insist for the logits, too.
        config = {key: value for key, value in config.items() if key not in ("bf16", "fp16")}
        self.engine, *_ = deepspeed.initialize(model=self.module, config=config)
        for number, parameter in enumerate(self.logits.values()):
            parameter.register_post_accumulate_grad_hook(partial(self._take, number))

    @property
    def logits(self) -> dict[str, nn.Parameter]:
        """The logit tensors by name, in the order of the layout, each partitioned."""
        return logit_tensors(self.layers)

    def forward(self, rows: Tensor) -> Tensor:
        """See :meth:`leap.engine.Engine.forward`."""
        # Not through the engine, whose hooks refuse a backward pass without an optimiser of its own.
        return self.module(input_ids=rows.to(self.engine.device), use_cache=False).logits

    def hidden_forward(self, rows: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See :meth:`leap.engine.Engine.hidden_forward`."""
        return with_hidden_states(self.module, rows.to(self.engine.device))

    def backward(self, loss: Tensor, step: int, rate: float, microbatch: int, microbatches: int) -> None:
        """See :meth:`leap.engine.Engine.backward`."""
        self._updater.begin(step, rate, microbatch, microbatches)
        (loss / microbatches).backward()
        # The first layer's input has no gradient, so no hook of DeepSpeed's tells that the layer is through.
        self.engine.optimizer.partition_all_parameters()
        self._updater.end()

    def _take(self, number: int, parameter: Tensor) -> None:
        grad, parameter.grad = parameter.grad, None
        assert grad is not None
        first, last = bounds(grad.numel(), self.rank, self.world)
        flat = grad.view(-1)
        if self.world > 1:
            part = bounds(grad.numel(), 0, self.world)[1]
            mine = flat.new_empty(part)
            _reduce_scatter(mine, F.pad(flat, (0, part * self.world - len(flat))))
            flat = mine[: last - first].div_(self.world)
        self._updater.take(number, self._local(_partitioned(parameter)), flat, first)

    def shapes(self) -> dict[str, list[int]]:
        """Shape of each logit tensor."""
        return {name: list(shape) for name, shape in self.state.layout.shapes.items()}

    def local_logits(self) -> Iterable[tuple[str, Tensor]]:
        """This worker's slice [n] of each flattened logit tensor."""
        return ((name, self._local(_partitioned(parameter))) for name, parameter in self.logits.items())

    def reduce(self, values: Tensor) -> Tensor:
        """See :meth:`leap.engine.Engine.reduce`."""
        return _total(values.to(self.engine.device)).cpu()

    def shard(self) -> dict[str, Tensor]:
        """This worker's logits and optimiser state themselves, {tensor}.{part} → flat slice."""
        parts = {}
        for number, (name, logits) in enumerate(self.local_logits()):
            for part, tensor in {"logits": logits, **self._updater.state(number, logits)}.items():
                parts[f"{name}.{part}"] = tensor
        return parts

    def facts(self) -> dict[str, Any]:
        """What of the optimiser's state is no slice of anything, as JSON; the same on every worker."""
        return {
            "shared_moments": [[layer, *map(float, values)] for layer, values in self._updater.shared.moments.items()]
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Set the optimiser's state; the logits were given to the constructor."""
        self._updater.shared.moments = {layer: (m, v) for layer, m, v in checkpoint.facts["shared_moments"]}
        for number, (name, logits) in enumerate(self.local_logits()):
            for part, tensor in self._updater.state(number, logits).items():
                tensor.copy_(checkpoint.shard(name, part, self.rank, self.world))

    def _local(self, parameter: Any) -> Tensor:
        """This worker's slice of a flattened parameter, without DeepSpeed's padding."""
        first, last = bounds(parameter.ds_numel, self.rank, self.world)
        return parameter.ds_tensor.detach().view(-1)[: last - first]

    def _add_parameters(
        self, config: dict[str, Any], initial: InitialLogits, new_weight: NewWeight | None
    ) -> MaskedWeights:
        numel, norm = 0, 0.0
        new_weights = {}
        for name, layer in self.layers.items():
            if new_weight is not None:
                with deepspeed.zero.GatheredParameters([layer.weight]):
                    values = partial(new_weight, name, layer.weight)
                    over = _partition(layer.weight.shape, layer.weight.dtype, config, values)
                over.requires_grad_(False)
                new_weights[name] = over
            masked = new_weights.get(name, layer.weight)
            with deepspeed.zero.GatheredParameters([masked]):
                norm += float(torch.linalg.vector_norm(masked.detach().float()))
                numel += masked.numel()
        layout, dtype = self.state.layout, self._updater.optimiser.dtype
        logits = {}
        for number, (name, shape) in enumerate(layout.shapes.items()):
            logits[name] = _partition(shape, dtype, config, partial(initial, number, name, layout.readers[name]))
        provide_logits(self.layers, logits, new_weights)
        return MaskedWeights(numel, norm)


#: Under the name of newer versions of torch, where it is not deprecated.
_reduce_scatter = getattr(torch.distributed, "reduce_scatter_single", None) or torch.distributed.reduce_scatter_tensor


def _checkpoint_activations(model: PreTrainedModel) -> None:
    """Let each block keep its input alone for the backward pass, under the name that this transformers has for it."""
    kwargs = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)


def _total(value: Tensor) -> Tensor:
    torch.distributed.all_reduce(value)
    return value


def _partition(
    shape: torch.Size, dtype: torch.dtype, config: dict[str, Any], values: Callable[[], Tensor]
) -> nn.Parameter:
    """Collective: a new partitioned parameter; ``values`` is called on rank 0."""
    holder = _Holder(shape, dtype)
    # As a context, Init of DeepSpeed 0.19 makes bfloat16 of everything on a CPU, whatever dtype it is given.
    deepspeed.zero.Init(module=holder, config_dict_or_path=config)
    with deepspeed.zero.GatheredParameters([holder.parameter], modifier_rank=0):
        if torch.distributed.get_rank() == 0:
            holder.parameter.data.copy_(values())
    return holder.parameter


def _partitioned(parameter: Tensor) -> Any:
    """The parameter with the attributes ``ds_…`` that DeepSpeed gave it."""
    return parameter


class _Holder(nn.Module):
    """What ``zero.Init`` takes: a module with the parameter to partition."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype) -> None:
        super().__init__()
        self.parameter = nn.Parameter(torch.empty(shape, dtype=dtype))
