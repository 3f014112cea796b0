"""Sparse checkpoints through transformers' own ``from_pretrained``, as a quantiser named ``leap``.

    import leap
    model = AutoModelForCausalLM.from_pretrained("packed/")

So whatever loads models by ``from_pretrained`` computes with packed weights: pipelines, ``transformers serve``, the
``hf`` model of lm-eval. Unlike :func:`leap.load_sparse` this path does not compare the hashes of the tensors; it does
check that the tensors of a matrix agree with each other.

transformers imports this module while it is being imported itself, see :mod:`leap.registration`: what needs its models
is imported at first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from leap.sparse_format import FORMAT, METHOD, VERSION

if TYPE_CHECKING:
    from leap_kernels import BMP128, SparseLinear
    from transformers import PreTrainedModel


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):
    """The entry ``quantization_config`` in the config.json of a sparse checkpoint.

    Raises:
        ValueError: the checkpoint is of another format or version.
    """

    def __init__(self, format: str = FORMAT, version: int = VERSION, quant_method: str = METHOD) -> None:
        if (format, version) != (FORMAT, VERSION):
            raise ValueError(f"the checkpoint is {format} {version}; this version of leap reads {FORMAT} {VERSION}")
        self.quant_method = quant_method  # type: ignore[assignment]
        self.format = format
        self.version = version


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):
    """Loads sparse checkpoints; a model from it computes with :class:`leap_kernels.SparseLinear`."""

    requires_calibration = True  # a dense model is not packed in loading: leap.write_sparse does that

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, *, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        """Put packed layers without values where the files hold packed matrices."""
        from pathlib import Path

        from leap_kernels import SparseLinear

        from leap.checkpoint import headers
        from leap.surgery import prunable_linears

        if checkpoint_files is None:
            raise ValueError("a sparse checkpoint is loaded from its directory, not from a state dict")
        stored = headers(Path(file) for file in checkpoint_files)
        linears = prunable_linears(model)
        packed = {name.removesuffix(".bits") for name in stored if name.endswith(".bits")}
        if packed != set(linears):
            raise ValueError(
                f"{checkpoint_files[0]}: {min(packed ^ set(linears))} does not fit the model's config.json"
            )
        for name, linear in linears.items():
            matrix = _without_values(stored, name, linear.weight)
            layer = SparseLinear(matrix, linear.bias)
            layer.register_buffer("shape", torch.empty(2, dtype=torch.int64, device="meta"))  # stored, too
            model.set_submodule(name, layer)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        """Check the matrices, and hold each in the format that suits the device where it lies."""
        from leap_kernels import BMP128

        from leap.sparse_model import fastest_format

        for name, layer in _packed(model).items():
            matrix: Any = layer.weight
            shape = layer.get_buffer("shape")
            del layer.shape
            try:
                matrix = BMP128.from_tensors({**matrix.tensors(), "shape": shape})
                if matrix.shape != (layer.out_features, layer.in_features):
                    raise ValueError(f"{list(matrix.shape)} does not fit the model's config.json")
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            layer.hold(fastest_format(matrix))
        return model.requires_grad_(False)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Dense linear layers with zeros in place of the packed ones."""
        for name, layer in _packed(model).items():
            weight = layer.weight.unpack().to(dtype)
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None, device="meta")
            linear.weight = nn.Parameter(weight)
            if layer.bias is not None:
                linear.bias = nn.Parameter(layer.bias.to(dtype))
            model.set_submodule(name, linear)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _packed(model: PreTrainedModel) -> dict[str, SparseLinear]:
    from leap_kernels import SparseLinear

    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}


def _without_values(stored: dict[str, Tensor], layer: str, weight: Tensor) -> BMP128:
    """A matrix in place of ``weight`` on the device meta whose tensors have the shapes that the files say."""
    from leap_kernels import BMP128

    dtypes = {"bits": torch.uint32, "off": torch.int32, "vals": weight.dtype, "row_base": torch.int64}
    parts = {
        part: torch.empty_like(stored[f"{layer}.{part}"], dtype=of_part, device="meta")
        for part, of_part in dtypes.items()
        if f"{layer}.{part}" in stored
    }
    if missing := {"bits", "off", "vals"} - parts.keys():
        raise ValueError(f"{layer}.{min(missing)}: missing from the checkpoint")
    rows, columns = weight.shape
    return BMP128((rows, columns), **parts)
