"""A linear layer whose frozen weight is multiplied by a learned mask.

Shapes: x [..., in], weight W [out, in], bias [out]; the logits have what shapes their gate gives them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from leap.gates import Draw, Gate, GateState, Layout, Matrix
from leap.surgery import prunable_linears, shared_linears


class _MaskedMatmul(torch.autograd.Function):
    """y = x (M⊙W)ᵀ + b and the three sums over the mask, saving for backward only x and the parameters.

    The mask is drawn again in backward. Under ZeRO-3 the parameters are released after the forward pass and gathered
    before the backward pass; what was derived from them must not outlive either.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gate: Gate,
        matrix: Matrix,
        draw: Draw,
        *logits: Tensor,
    ) -> tuple[Tensor, Tensor]:
        masked = torch.empty_like(weight)
        stats = gate.apply(weight, logits, matrix, draw, out=masked)
        ctx.save_for_backward(x, weight, *logits)
        ctx.gate, ctx.matrix, ctx.draw = gate, matrix, draw
        return F.linear(x, masked, bias), stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_stats: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *logits = ctx.saved_tensors
        grad_y2 = grad_y.reshape(-1, grad_y.shape[-1])
        scratch = torch.empty_like(weight)  # first M⊙W, then dL/d(M⊙W)
        grad_x = None
        if ctx.needs_input_grad[0]:
            ctx.gate.apply(weight, logits, ctx.matrix, ctx.draw, out=scratch)
            grad_x = (grad_y2 @ scratch).view(x.shape)
        torch.mm(grad_y2.t(), x.reshape(-1, x.shape[-1]), out=scratch)
        grads = ctx.gate.backward(scratch, weight, logits, grad_stats, ctx.matrix, ctx.draw)
        return grad_x, None, None, None, None, None, *grads


class MaskedLinear(nn.Linear):
    """``nn.Linear`` with frozen weight and bias and trainable mask logits.

    It takes over the parameters of the layer it replaces, under the same names, and adds the logits (fp32 or bf16,
    ``logits_0``, …), which whoever installs it provides; and where masks are learned over other weights than the dense
    ones, ``new_weight`` (frozen, like ``weight``), which the mask then multiplies in every mode but ``dense``.

    Layers that share one weight share its mask: ``sharers`` are the others of the first of them, which alone counts.
    """

    new_weight: nn.Parameter | None

    def __init__(self, linear: nn.Linear, matrix: Matrix, state: GateState) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which would allocate a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        self.register_parameter("new_weight", None)
        self.matrix, self.state = matrix, state
        self.sharers: list[MaskedLinear] = []
        self.counts = True
        self.train(linear.training)

    @property
    def masked_weight(self) -> Tensor:
        """What the mask multiplies, [out, in]."""
        return self.weight if self.new_weight is None else self.new_weight

    @property
    def logits(self) -> tuple[nn.Parameter, ...]:
        """The tensors that the mask is made of, in the order of the layout."""
        count = len(self.state.layout.reads[self.matrix.name])
        return tuple(getattr(self, f"logits_{number}") for number in range(count))

    def provide(self, logits: Sequence[nn.Parameter], new_weight: nn.Parameter | None = None) -> None:
        """Set what is learned, and what over, in this layer and those that share its weight."""
        for layer in (self, *self.sharers):
            for number, tensor in enumerate(logits):
                layer.register_parameter(f"logits_{number}", tensor)
            layer.new_weight = new_weight

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
            mask = state.harden.mask(self.matrix, self.logits)
            return F.linear(x, weight * mask.to(weight.dtype), self.bias)
        if state.draw is None:
            raise RuntimeError(f"set GateState.draw before a forward pass in the mode {state.mode}")
        if state.mode == "mean":
            return F.linear(x, state.gate.mean(weight, self.logits, self.matrix, state.draw), self.bias)
        y, stats = _MaskedMatmul.apply(x, weight, self.bias, state.gate, self.matrix, state.draw, *self.logits)
        if state.collecting and self.counts:
            state.stats.append(stats)
        return y


def layout_of(linears: Mapping[str, nn.Linear], gate: Gate) -> Layout:
    """Which logits the masks of layers, by dotted name and in model order, would be made of under ``gate``.

    Raises:
        ValueError: the gate has no mask for one of them.
    """
    # From the numbers of features: under ZeRO-3 a weight is an empty placeholder.
    return Layout.of(
        gate,
        (
            Matrix(number, name, torch.Size([linear.out_features, linear.in_features]))
            for number, (name, linear) in enumerate(linears.items())
        ),
    )


def install_masks(model: nn.Module, gate: Gate) -> tuple[GateState, dict[str, MaskedLinear]]:
    """Freeze ``model`` and replace every prunable linear layer by a :class:`MaskedLinear` without logits yet.

    Returns the shared state, in the mode ``dense``, and the new layers by dotted name, in module order; a layer's
    number in that order is part of the counter of its noise. Of layers that share a weight it is the first.

    Raises:
        ValueError: ``model`` has no decoder blocks with linear layers, or one that the gate has no mask for; it is as
            it was then.
    """
    linears, shared = prunable_linears(model), shared_linears(model)
    state = GateState(gate, layout_of(linears, gate))
    model.requires_grad_(False)
    layers = {}
    for matrix in state.layout.matrices:
        layers[matrix.name] = MaskedLinear(linears[matrix.name], matrix, state)
        model.set_submodule(matrix.name, layers[matrix.name])
    for name, first in shared.items():
        sharer = MaskedLinear(model.get_submodule(name), layers[first].matrix, state)  # type: ignore[arg-type]
        sharer.counts = False
        layers[first].sharers.append(sharer)
        model.set_submodule(name, sharer)
    return state, layers


def provide_logits(
    layers: Mapping[str, MaskedLinear],
    logits: Mapping[str, nn.Parameter],
    new_weights: Mapping[str, nn.Parameter] | None = None,
) -> None:
    """Give all layers the logit tensors that they read, by the tensors' names, and new weights, by their own."""
    for name, layer in layers.items():
        tensors = [logits[tensor] for tensor in layer.state.layout.reads[name]]
        layer.provide(tensors, (new_weights or {}).get(name))


def logit_tensors(layers: Mapping[str, MaskedLinear]) -> dict[str, nn.Parameter]:
    """The logit tensors of all layers, each once, by name, in the order of the layout."""
    return {
        tensor: parameter
        for name, layer in layers.items()
        for tensor, parameter in zip(layer.state.layout.reads[name], layer.logits, strict=True)
    }


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
