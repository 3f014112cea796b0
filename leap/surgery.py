"""Finding, without a list of model families, the linear layers that pruning applies to."""

from __future__ import annotations

from torch import nn


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The stack of decoder blocks and its dotted name in ``model``.

    It is the ``ModuleList`` of equal modules that holds the most parameters in ``nn.Linear`` layers; lists nested in a
    block (experts) hold fewer than the stack around them.

    Raises:
        ValueError: ``model`` has no such list (GPT-2, say, keeps its weights in ``Conv1D``).
    """
    best: tuple[int, str, nn.ModuleList] | None = None
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len({type(m) for m in module}) != 1:
            continue
        size = sum(_numel(m) for m in module.modules() if isinstance(m, nn.Linear))
        if size and (best is None or size > best[0]):
            best = (size, name, module)
    if best is None:
        raise ValueError(f"{type(model).__name__} has no stack of decoder blocks with nn.Linear layers to prune")
    return best[1], best[2]


def prunable_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every ``nn.Linear`` inside the decoder blocks by dotted name, in module order.

    Embeddings and the output head lie outside the blocks and stay dense, tied or not.
    """
    prefix, blocks = decoder_blocks(model)
    return {f"{prefix}.{name}": m for name, m in blocks.named_modules() if isinstance(m, nn.Linear)}


def _numel(linear: nn.Linear) -> int:
    # Under ZeRO-3 a weight is an empty placeholder that carries its true size in ds_numel.
    return getattr(linear.weight, "ds_numel", linear.weight.numel())
