"""A linear layer whose frozen weight is multiplied by a learned mask.

Shapes: x [..., in], weight W and logits P [out, in], bias [out].
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from leap.gates import Draw, Gate, GateState
from leap.surgery import prunable_linears, shared_linears


class _MaskedMatmul(torch.autograd.Function):
    """y = x (M⊙W)ᵀ + b and the three sums over the mask, saving for backward only x and the two parameters.

    The mask is drawn again in backward. Under ZeRO-3 the parameters are released after the forward pass and gathered
    before the backward pass; what was derived from them must not outlive either.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, logits: Tensor, gate: Gate, layer: int, draw: Draw
    ) -> tuple[Tensor, Tensor]:
        masked = torch.empty_like(weight)
        stats = gate.apply(weight, logits, layer, draw, out=masked)
        ctx.save_for_backward(x, weight, logits)
        ctx.gate, ctx.layer, ctx.draw = gate, layer, draw
        return F.linear(x, masked, bias), stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_stats: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, logits = ctx.saved_tensors
        grad_y2 = grad_y.reshape(-1, grad_y.shape[-1])
        scratch = torch.empty_like(weight)  # first M⊙W, then dL/d(M⊙W)
        grad_x = None
        if ctx.needs_input_grad[0]:
            ctx.gate.apply(weight, logits, ctx.layer, ctx.draw, out=scratch)
            grad_x = (grad_y2 @ scratch).view(x.shape)
        torch.mm(grad_y2.t(), x.reshape(-1, x.shape[-1]), out=scratch)
        grad_logits = ctx.gate.backward(scratch, weight, logits, grad_stats, ctx.layer, ctx.draw)
        return grad_x, None, None, grad_logits, None, None, None


class MaskedLinear(nn.Linear):
    """``nn.Linear`` with frozen weight and bias and trainable mask logits.

    It takes over the parameters of the layer it replaces, under the same names, and adds ``logits`` (fp32 or bf16,
    [out, in]), which whoever installs it provides; and where masks are learned over other weights than the dense ones,
    ``new_weight`` (frozen, like ``weight``), which the mask then multiplies in every mode but ``dense``.

    Layers that share one weight share its mask: ``sharers`` are the others of the first of them, which alone counts.
    """

    logits: nn.Parameter
    new_weight: nn.Parameter | None

    def __init__(self, linear: nn.Linear, layer: int, gate: Gate, state: GateState) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which would allocate a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        self.register_parameter("new_weight", None)
        self.layer, self.gate, self.state = layer, gate, state
        self.sharers: list[MaskedLinear] = []
        self.counts = True
        self.train(linear.training)

    @property
    def masked_weight(self) -> Tensor:
        """What the mask multiplies, [out, in]."""
        return self.weight if self.new_weight is None else self.new_weight

    def provide(self, logits: nn.Parameter, new_weight: nn.Parameter | None = None) -> None:
        """Set what is learned, and what over, in this layer and those that share its weight."""
        for layer in (self, *self.sharers):
            layer.logits, layer.new_weight = logits, new_weight

    def forward(self, x: Tensor) -> Tensor:
        """y [..., out] with the mask that the shared state's mode asks for.

        Raises:
            RuntimeError: the state lacks what its mode needs.
        """
        state = self.state
        if state.mode == "dense":
            return F.linear(x, self.weight, self.bias)
        weight = self.masked_weight
        if state.mode == "hard":
            if state.harden is None:
                raise RuntimeError("set GateState.harden before a forward pass in the mode hard")
            mask = state.harden.mask(self.layer, self.logits)
            return F.linear(x, weight * mask.to(weight.dtype), self.bias)
        if state.draw is None:
            raise RuntimeError(f"set GateState.draw before a forward pass in the mode {state.mode}")
        if state.mode == "mean":
            return F.linear(x, self.gate.mean(weight, self.logits, state.draw), self.bias)
        y, stats = _MaskedMatmul.apply(x, weight, self.bias, self.logits, self.gate, self.layer, state.draw)
        if state.collecting and self.counts:
            state.stats.append(stats)
        return y


def install_masks(model: nn.Module, gate: Gate) -> tuple[GateState, dict[str, MaskedLinear]]:
    """Freeze ``model`` and replace every prunable linear layer by a :class:`MaskedLinear` without logits yet.

    Returns the shared state, in the mode ``dense``, and the new layers by dotted name, in module order; a layer's
    number in that order is part of the counter of its noise. Of layers that share a weight it is the first.

    Raises:
        ValueError: ``model`` has no decoder blocks with linear layers.
    """
    linears, shared = prunable_linears(model), shared_linears(model)
    model.requires_grad_(False)
    state = GateState(layers=len(linears))
    layers = {}
    for number, (name, linear) in enumerate(linears.items()):
        layers[name] = MaskedLinear(linear, number, gate, state)
        model.set_submodule(name, layers[name])
    for name, first in shared.items():
        sharer = MaskedLinear(model.get_submodule(name), layers[first].layer, gate, state)  # type: ignore[arg-type]
        sharer.counts = False
        layers[first].sharers.append(sharer)
        model.set_submodule(name, sharer)
    return state, layers


@contextmanager
def masks_installed(model: nn.Module, gate: Gate) -> Iterator[tuple[GateState, dict[str, MaskedLinear]]]:
    """:func:`install_masks` for the duration of the context.

    However it ends, the model gets its own linear layers and ``requires_grad`` flags back.
    """
    linears: dict[str, nn.Module] = {**prunable_linears(model)}
    linears |= {name: model.get_submodule(name) for name in shared_linears(model)}
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        yield install_masks(model, gate)
    finally:
        for name, linear in linears.items():
            model.set_submodule(name, linear)
        for parameter in trainable:
            parameter.requires_grad_(True)
