"""How large a model and its artifacts are, from the model's configuration alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from leap.families import MaskFamily
from leap.gates import Layout, Matrix
from leap.surgery import BlockWeights, block_weights, decoder_blocks, prunable_linears
from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.model import loading


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters, bytes on disk, and what memory and time follow from."""

    parameters: int
    prunable: int
    weights: BlockWeights
    """Those of the decoder blocks, prunable and not."""
    linear: int
    """Weights of all linear layers, the output head among them, tied or not: each is one multiplication a token."""
    export: int
    """A pruned model with its mask file."""
    scores: int
    """Scores and mask of one layer-wise method."""
    largest: int
    """Parameters of the largest module that ZeRO-3 brings together at once."""
    matrices: tuple[Matrix, ...]
    """What is masked."""
    wires: int
    """Σ in + out over the prunable layers: numbers a token between them."""
    blocks: int
    """Decoder blocks."""
    states: int
    """Numbers of the hidden states of a token before each block: blocks × width."""
    gram: int
    """Σ in² over the prunable layers: multiplications a token for the matrices of inputs XᵀX."""
    solve: int
    """Σ in²·out over the prunable layers: multiplications of one step of a layer-wise solver."""
    vocabulary: int
    shapes: int
    """Different shapes among the prunable layers."""
    columns: frozenset[int]
    """Numbers of inputs that prunable layers have."""

    def layout(self, family: MaskFamily) -> Layout:
        """The logits of a family's masks.

        Raises:
            ValueError: it has no mask for one of the matrices.
        """
        return Layout.of(family.gate(), self.matrices)


def measure(config: RunConfig) -> Sizes:
    """Build the model without memory for its weights and count.

    Raises:
        UserError: the model cannot be read, or is not one that can be pruned.
    """
    model = loading.meta_model(config.model)
    try:
        linears, weights = prunable_linears(model), block_weights(model)
    except ValueError as error:
        raise UserError(f"model.source: {config.model.source}: {' '.join(str(error).split())[:300]}") from error
    masked = list(linears.values())
    width = getattr(torch, config.model.dtype).itemsize
    parameters = sum(p.numel() for p in model.parameters())
    prunable = weights.prunable
    text, blocks = model.config.get_text_config(), len(decoder_blocks(model)[1])
    return Sizes(
        parameters=parameters,
        prunable=prunable,
        weights=weights,
        linear=sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear)),
        export=parameters * width + prunable // 8,
        scores=prunable * 2 + prunable // 8,
        largest=max(sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules()),
        matrices=tuple(
            Matrix(number, name, linear.weight.shape) for number, (name, linear) in enumerate(linears.items())
        ),
        wires=sum(linear.in_features + linear.out_features for linear in masked),
        blocks=blocks,
        states=blocks * text.hidden_size,
        gram=sum(linear.in_features**2 for linear in masked),
        solve=sum(linear.in_features * linear.weight.numel() for linear in masked),
        vocabulary=text.vocab_size,
        shapes=len({linear.weight.shape for linear in masked}),
        columns=frozenset(linear.in_features for linear in masked),
    )
