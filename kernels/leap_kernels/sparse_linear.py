"""Linear layers whose weight is a packed matrix."""

from typing import Any

import torch
from torch import Tensor, nn

from leap_kernels import ops
from leap_kernels.bmp128 import BMP128
from leap_kernels.dispatch import Format
from leap_kernels.idx8 import IDX8, from_bmp128
from leap_kernels.product import product


def sparse_linear_reference(x: Tensor, weight: BMP128 | IDX8) -> Tensor:
    """``x @ W.T`` in float64 through the dense matrix: what the kernels are tested against."""
    return x.double() @ weight.unpack().double().T


def sparse_linear(x: Tensor, weight: BMP128 | IDX8, bias: Tensor | None = None) -> Tensor:
    """``x @ W.T + bias``.

    x: [..., K], dtype and device those of weight. bias: [N] of that dtype. Returns [..., N].

    For few rows of x, as in decoding, a kernel reads the packed bytes: native code on a CPU, Triton on a GPU; which one
    and up to how many rows says :mod:`leap_kernels.dispatch`. Sums are float32 and do not depend on the number of
    threads. In all other cases, and where x wants a gradient, the matrix is unpacked for the call. Not differentiable
    with respect to weight. Under autocast x, weight and bias take its dtype, as they do in ``F.linear``. Nothing waits
    for a GPU. Raises ValueError for arguments that do not fit.
    """
    if torch.is_autocast_enabled(x.device.type):
        x, weight, bias = _as_autocast(x, weight, bias)
    if torch.compiler.is_compiling():
        return ops.traced_product(x, weight, bias)
    return product(x, weight, bias)


def _as_autocast(x: Tensor, weight: BMP128 | IDX8, bias: Tensor | None) -> tuple[Tensor, BMP128 | IDX8, Tensor | None]:
    """The arguments in autocast's dtype. It leaves float64 alone."""
    dtype = torch.get_autocast_dtype(x.device.type)
    if x.dtype == torch.float64:
        return x, weight, bias
    if weight.vals.dtype != dtype:
        weight = weight.with_vals(weight.vals.to(dtype))
    return x.to(dtype), weight, None if bias is None else bias.to(dtype)


class SparseLinear(nn.Module):
    """``nn.Linear`` with a packed weight, for inference: see :func:`sparse_linear`.

    Its buffers are the tensors of the matrix in the format it is held in, and ``bias`` [out] where there is one. Its
    state dict is BMP128 in any case, what :meth:`BMP128.tensors` names. Loading one replaces the matrix, so that one
    with another number of kept weights fits, and keeps the format.
    """

    bias: Tensor | None

    def __init__(self, weight: BMP128 | IDX8, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.hold(weight)
        self.register_buffer("bias", None if bias is None else bias.detach())

    def hold(self, weight: BMP128 | IDX8) -> None:
        """Take another matrix of the same shape, in either format."""
        for name in ("bits", "off", "row_base", "start", "base", "index"):
            self._buffers.pop(name, None)
        self._matrix = weight
        self.matrix_format: Format = "idx8" if isinstance(weight, IDX8) else "bmp128"
        for name, tensor in weight.tensors().items():
            self.register_buffer(name, tensor)
        if isinstance(weight, BMP128):
            self.register_buffer("row_base", weight.row_base)

    @property
    def weight(self) -> BMP128 | IDX8:
        """The packed matrix."""
        # Read from the dict: look-ups through nn.Module.__getattr__ take as long as a small matrix.
        buffers: Any = self._buffers
        if torch.compiler.is_compiling():  # a trace takes the buffers, and changes nothing
            return self._of_buffers(buffers)
        if self._matrix.vals is not buffers["vals"]:  # moved, copied or loaded since
            self._matrix = self._of_buffers(buffers)
        return self._matrix

    def _of_buffers(self, buffers: Any) -> BMP128 | IDX8:
        size = (self.out_features, self.in_features)
        if self.matrix_format == "idx8":
            return IDX8(size, buffers["start"], buffers["base"], buffers["index"], buffers["vals"])
        return BMP128(size, buffers["bits"], buffers["off"], buffers["vals"], buffers["row_base"])

    def forward(self, x: Tensor) -> Tensor:
        return sparse_linear(x, self.weight, self._buffers["bias"])

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, nnz={self.weight.nnz}, bias={bias}, "
            f"format={self.matrix_format}"
        )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        weight = self.weight
        stored = (weight.to_bmp128() if isinstance(weight, IDX8) else weight).tensors()
        if self.bias is not None:
            stored = {**stored, "bias": self.bias if keep_vars else self.bias.detach()}
        destination.update({prefix + name: tensor for name, tensor in stored.items()})

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        _metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        known = ("shape", "bits", "off", "vals", "row_base", *(["bias"] if self.bias is not None else []))
        found = {name: state_dict[prefix + name] for name in known if prefix + name in state_dict}
        bias = found.pop("bias", None)
        try:
            matrix = BMP128.from_tensors(found)
            if matrix.shape != (self.out_features, self.in_features):
                raise ValueError(f"BMP128 shape is {matrix.shape}, expected {(self.out_features, self.in_features)}")
        except ValueError as error:
            error_msgs.append(f"{prefix.removesuffix('.')}: {error}")
            return
        self.hold(from_bmp128(matrix) if self.matrix_format == "idx8" else matrix)
        if bias is not None:
            self.register_buffer("bias", bias)
        elif self.bias is not None:
            missing_keys.append(prefix + "bias")
        expected = {prefix + name for name in known}
        unexpected_keys += [key for key in state_dict if strict and key.startswith(prefix) and key not in expected]
