"""The products as operators of PyTorch, so that ``torch.compile`` traces through them without a break.

A traced product is one operator that calls :mod:`leap_kernels.product`, which chooses by the rows of x when it runs.
Calls outside of a trace go there directly: an operator takes longer to call than a small matrix to multiply.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from leap_kernels.bmp128 import BMP128
from leap_kernels.idx8 import IDX8
from leap_kernels.product import dense, product

_BMP128 = "Tensor bits, Tensor off, Tensor vals, Tensor? row_base, int rows, int columns"
_IDX8 = "Tensor start, Tensor base, Tensor index, Tensor vals, int rows, int columns"
_library = torch.library.Library("leap_kernels", "DEF")
for _name, _matrix in (("bmp128", _BMP128), ("idx8", _IDX8)):
    for _schema in (f"linear_{_name}(Tensor x, Tensor? bias, {_matrix})", f"unpack_{_name}({_matrix})"):
        _library.define(f"{_schema} -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def _bmp128(bits: Tensor, off: Tensor, vals: Tensor, row_base: Tensor | None, rows: int, columns: int) -> BMP128:
    return BMP128((rows, columns), bits, off, vals, row_base)


def _idx8(start: Tensor, base: Tensor, index: Tensor, vals: Tensor, rows: int, columns: int) -> IDX8:
    return IDX8((rows, columns), start, base, index, vals)


_MATRICES: dict[str, Callable[..., BMP128 | IDX8]] = {"bmp128": _bmp128, "idx8": _idx8}


def _register(name: str) -> None:
    matrix = _MATRICES[name]

    def linear_op(x: Tensor, bias: Tensor | None, *parts: Any) -> Tensor:
        return product(x, matrix(*parts), bias)

    def linear_fake(x: Tensor, _bias: Tensor | None, *parts: Any) -> Tensor:
        return x.new_empty(*x.shape[:-1], matrix(*parts).shape[0])

    def unpack_op(*parts: Any) -> Tensor:
        return dense(matrix(*parts))

    def unpack_fake(*parts: Any) -> Tensor:
        weight = matrix(*parts)
        return weight.vals.new_empty(weight.shape)

    _library.impl(f"linear_{name}", linear_op, "CompositeExplicitAutograd")
    _library.impl(f"unpack_{name}", unpack_op, "CompositeExplicitAutograd")
    torch.library.register_fake(f"leap_kernels::linear_{name}", linear_fake, lib=_library)
    torch.library.register_fake(f"leap_kernels::unpack_{name}", unpack_fake, lib=_library)


for _name in _MATRICES:
    _register(_name)


def traced_product(x: Tensor, weight: BMP128 | IDX8, bias: Tensor | None) -> Tensor:
    """``x @ W.T + bias`` by operators, for a trace; differentiable with respect to x."""
    operators = torch.ops.leap_kernels
    rows, columns = weight.shape
    gradient = torch.is_grad_enabled() and x.requires_grad
    y: Tensor
    if isinstance(weight, IDX8):
        parts = (weight.start, weight.base, weight.index, weight.vals, rows, columns)
        y = linear(x, operators.unpack_idx8(*parts), bias) if gradient else operators.linear_idx8(x, bias, *parts)
        return y
    tensors = (weight.bits, weight.off, weight.vals, weight.row_base, rows, columns)
    y = linear(x, operators.unpack_bmp128(*tensors), bias) if gradient else operators.linear_bmp128(x, bias, *tensors)
    return y
