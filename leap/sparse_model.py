"""Models whose pruned linear layers are :class:`leap_kernels.SparseLinear`, for decoding."""

from __future__ import annotations

from pathlib import Path

import torch
from leap_kernels import BMP128, SparseLinear, pack
from leap_kernels.dispatch import format_for
from leap_kernels.idx8 import IDX8, from_bmp128
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from leap.checkpoint import attempt
from leap.packed import MaskFile
from leap.sparse_checkpoint import SparseCheckpoint, SparseCheckpointError, skeleton
from leap.surgery import prunable_linears, undo_rescaling


@torch.no_grad()
def sparsify(model: nn.Module, masks: MaskFile | None = None) -> None:
    """Replace the prunable layers of ``model`` by packed ones, in place, keeping what ``masks`` or not being 0 says."""
    undo_rescaling(model)
    for name, linear in prunable_linears(model).items():
        weight = pack(linear.weight.detach(), None if masks is None else masks[name].to(linear.weight.device))
        model.set_submodule(name, packed_linear(weight, linear.bias))


def packed_linear(weight: BMP128, bias: Tensor | None) -> SparseLinear:
    """A layer that holds ``weight`` in the format that decodes fastest on the device it lies on."""
    return SparseLinear(fastest_format(weight), bias)


def fastest_format(weight: BMP128) -> BMP128 | IDX8:
    """``weight`` in the format that decodes fastest on the device it lies on."""
    matrix_format = format_for(weight.vals.device, weight.vals.dtype, weight.shape[1])
    return from_bmp128(weight) if matrix_format == "idx8" else weight


def load_sparse(
    directory: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model of a sparse checkpoint (:func:`leap.write_sparse`), in evaluation mode.

    Its pruned layers stay packed in memory: as they are stored, or, on GPUs whose instructions would not keep up with
    their memory, as IDX8-64 (:mod:`leap_kernels.dispatch` decides). ``generate`` and everything else that runs the
    model works; training does not, packed weights have no gradient.

    Args:
        dtype: of weights and activations; none: as stored, or, of several types, that of config.json.

    Raises:
        SparseCheckpointError: a tensor is missing, cut off or altered, or one that the model has no place for (it is
            named), or there is no such checkpoint.
        CheckpointError: no model can be built from its config.json.
    """
    directory = Path(directory)
    checkpoint = SparseCheckpoint(directory)
    packed = set(checkpoint.packed)
    config = attempt(str(directory), lambda: AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code))
    if dtype is None and len(checkpoint.float_types) > 1:
        dtype = config.dtype or torch.float32
    parts: dict[str, dict[str, Tensor]] = {layer: {} for layer in packed}
    plain: dict[str, Tensor] = {}
    # Meta parameters take no memory; each is replaced by what the file holds, and no dense copy of a layer ever exists.
    for name, stored in checkpoint.tensors():
        layer, _, part = name.rpartition(".")
        tensor = stored.to(device, dtype if stored.is_floating_point() else None)
        if layer in packed and part != "bias":
            parts[layer][part] = tensor
        else:
            plain[name] = tensor
    dtype = next(tensor.dtype for tensor in plain.values() if tensor.is_floating_point())
    model = attempt(str(directory), lambda: skeleton(config, dtype, trust_remote_code))
    linears = prunable_linears(model)
    if packed != set(linears):
        raise SparseCheckpointError(f"{directory}: {min(packed ^ set(linears))} does not fit the model's config.json")
    for layer, linear in linears.items():
        matrix = checkpoint.matrix(layer, parts.pop(layer))
        if matrix.shape != tuple(linear.weight.shape):
            raise SparseCheckpointError(f"{layer}: {list(matrix.shape)} does not fit the model's config.json")
        bias = None if linear.bias is None else plain.pop(f"{layer}.bias")
        model.set_submodule(layer, packed_linear(matrix, bias))
    _fill(model, plain | {alias: plain[name] for alias, name in checkpoint.tied.items()}, directory)
    if (directory / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    return model.to(device).eval().requires_grad_(False)


def _fill(model: nn.Module, stored: dict[str, Tensor], directory: Path) -> None:
    """Give the model's own parameters and buffers the stored values; tied ones become one tensor again."""
    parameters = {id(tensor): nn.Parameter(tensor, requires_grad=False) for tensor in stored.values()}
    expected = model.state_dict(keep_vars=True)
    if strange := stored.keys() - expected.keys():
        raise SparseCheckpointError(f"{min(strange)} does not fit the model's config.json")
    for name, current in expected.items():
        if name not in stored:
            if isinstance(model.get_submodule(name.rpartition(".")[0]), SparseLinear):
                continue
            raise SparseCheckpointError(f"{name}: missing from {directory}")
        if stored[name].shape != current.shape:
            raise SparseCheckpointError(f"{name}: {list(stored[name].shape)} does not fit the model's config.json")
        module, _, key = name.rpartition(".")
        is_parameter = isinstance(current, nn.Parameter)
        setattr(model.get_submodule(module), key, parameters[id(stored[name])] if is_parameter else stored[name])
