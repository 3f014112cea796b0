"""Finding, without a list of model families, the linear layers that pruning applies to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

#: Share of the decoder blocks' weights that has to lie in prunable layers, unless the user says otherwise.
LEAST_SHARE = 0.9


class NotRunError(ValueError):
    """A layer that no mask can be learned for, as a forward pass does not call it once."""


@dataclass(frozen=True)
class BlockWeights:
    """Weights of the decoder blocks: all parameters of two and more dimensions, so no norms and no biases."""

    prunable: int
    """Of the ``nn.Linear`` layers, each Parameter once."""
    total: int
    dense: tuple[str, ...]
    """Names of the others, the largest first, with * for the number of the block."""

    @property
    def share(self) -> float:
        """Of the weights that can be pruned."""
        return self.prunable / self.total

    def __str__(self) -> str:
        """How many weights are prunable and which share that is."""
        return f"{self.prunable:,} prunable, {100 * self.share:.1f} % of the decoder blocks' weights"

    def refusal(self) -> str | None:
        """Why the model should not be pruned without the user's word; none where nearly all of it is prunable."""
        if self.share >= LEAST_SHARE:
            return None
        return (
            f"only {100 * self.share:.1f} % of the decoder blocks' weights lie in nn.Linear layers, which are what is "
            f"pruned; the others stay dense: {', '.join(self.dense[:3])}{', …' if len(self.dense) > 3 else ''}"
        )


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The stack of decoder blocks and its dotted name in ``model``.

    It is the ``ModuleList`` that holds the most parameters in ``nn.Linear`` layers; lists nested in a block (experts)
    hold fewer than the stack around them. Of a model that says what its decoder is, only that counts: the vision tower
    of a multimodal model may be larger than its language model.

    Raises:
        ValueError: ``model`` has no such list (GPT-2, say, keeps its weights in ``Conv1D``), or an adapter is attached
            to it.
    """
    check_no_adapter(model)
    decoder = model.get_decoder() if isinstance(model, PreTrainedModel) else None
    for inside in (decoder, model):
        members = set(inside.modules()) if inside is not None else set()
        stacks = [
            (sum(_numel(m) for m in module.modules() if isinstance(m, nn.Linear)), name, module)
            for name, module in model.named_modules()
            if module in members and isinstance(module, nn.ModuleList)
        ]
        if stacks and (best := max(stacks, key=lambda stack: stack[0]))[0]:
            return best[1], best[2]
    raise ValueError(f"{type(model).__name__} has no stack of decoder blocks with nn.Linear layers to prune")


def prunable_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every ``nn.Linear`` inside the decoder blocks by dotted name, in module order.

    Of several layers that share one Parameter the first stands for all. Embeddings and the output head lie outside the
    blocks and stay dense, tied or not.
    """
    return {name: linear for name, linear, first in _linears(model) if first == name}


def linears_by_block(model: nn.Module) -> list[dict[str, nn.Linear]]:
    """:func:`prunable_linears` of each block."""
    prefix, blocks = decoder_blocks(model)
    by_block: list[dict[str, nn.Linear]] = [{} for _ in blocks]
    for name, linear in prunable_linears(model).items():
        by_block[int(name.removeprefix(f"{prefix}.").partition(".")[0])][name] = linear
    return by_block


def shared_linears(model: nn.Module) -> dict[str, str]:
    """The layers that share their weight with an earlier one, each with the name of the one that stands for it."""
    return {name: first for name, _, first in _linears(model) if first != name}


def block_weights(model: nn.Module) -> BlockWeights:
    """How much of the decoder blocks is prunable."""
    masked = {id(linear.weight) for linear in prunable_linears(model).values()}
    prefix, blocks = decoder_blocks(model)
    prunable, dense = 0, Counter[str]()
    for name, parameter in blocks.named_parameters():
        if id(parameter) in masked:
            prunable += parameter.numel()
        elif parameter.ndim >= 2:
            dense[f"{prefix}.*.{name.partition('.')[2]}"] += parameter.numel()
    return BlockWeights(prunable, prunable + dense.total(), tuple(name for name, _ in dense.most_common()))


@torch.no_grad()
def check_runs(model: nn.Module, rows: Tensor) -> None:
    """Check that every prunable layer is called once in a forward pass over rows [R, S].

    Raises:
        NotRunError: one is not. Mamba, say, reads the weight of its ``dt_proj`` itself; an expert waits for tokens.
    """
    calls: Counter[str] = Counter()
    linears = prunable_linears(model)
    with ExitStack() as hooks:
        for name, linear in linears.items():
            hook = linear.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
            hooks.callback(hook.remove)
        model(input_ids=rows, use_cache=False)
    wrong = [name for name in linears if calls[name] != 1]
    if wrong:
        if calls[wrong[0]]:
            reason = "the model calls it again"
        elif _takes_part(model, linears[wrong[0]], rows):
            reason = "the model reads its weight without calling it"
        else:
            reason = "it takes no part; the model may route none of these tokens there"
        raise NotRunError(
            f"no mask can be learned for {wrong[0]}{f' and {len(wrong) - 1} more' if wrong[1:] else ''}, which ran "
            f"{calls[wrong[0]]} times in a forward pass over {len(rows)} × {rows.shape[1]} tokens: {reason}"
        )


def _takes_part(model: nn.Module, linear: nn.Linear, rows: Tensor) -> bool:
    """Whether the output of a model over rows [R, S] depends on the weight of a layer."""
    weight, had_gradient = linear.weight, linear.weight.requires_grad
    try:
        with torch.enable_grad():
            weight.requires_grad_(True)
            output = model(input_ids=rows, use_cache=False).logits.float().sum()
            return output.requires_grad and torch.autograd.grad(output, weight, allow_unused=True)[0] is not None
    finally:
        weight.requires_grad_(had_gradient)


def undo_rescaling(model: nn.Module) -> None:
    """Give a model the weights of its files again, where it divided some in place when it first ran, as RWKV does."""
    for module in model.modules():
        if getattr(module, "layers_are_rescaled", False):
            was_training, module.training = module.training, True
            module._rescale_layers()  # type: ignore[operator]
            module.training = was_training


def check_finite(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Check tensors, each with its name, for NaN and infinity.

    Raises:
        ValueError: there are some; it names the tensor.
    """
    for name, tensor in tensors:
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds NaN or Inf")


def check_no_adapter(model: nn.Module) -> None:
    """Check that no adapter of the package peft is attached: masks would fall on it, and an export would lose the base.

    Raises:
        ValueError: there is one.
    """
    for module in model.modules():
        if any(parent.__module__.partition(".")[0] == "peft" for parent in type(module).__mro__):
            raise ValueError(
                f"an adapter is attached to the model ({type(module).__name__}): merge the adapter first "
                "(model.merge_and_unload())"
            )


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear, str]]:
    """Name and layer of every ``nn.Linear`` in the blocks, and the name of the first one with the same Parameter."""
    prefix, blocks = decoder_blocks(model)
    first: dict[int, str] = {}
    for name, module in blocks.named_modules(prefix=prefix):
        if isinstance(module, nn.Linear):
            yield name, module, first.setdefault(id(module.weight), name)


def _numel(linear: nn.Linear) -> int:
    # Under ZeRO-3 a weight is an empty placeholder that carries its true size in ds_numel.
    return getattr(linear.weight, "ds_numel", linear.weight.numel())
