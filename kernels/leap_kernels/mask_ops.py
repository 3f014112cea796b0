"""Sampled relaxed masks for training: ``M * W`` and its gradient, with noise regenerated from a counter.

Nothing is stored between forward and backward besides the logits: both derive the same noise from (seed, layer, step,
global weight index), see :mod:`leap_kernels.philox`; the formulas stand in :mod:`leap_kernels.mask_reference`.

CUDA tensors run Triton kernels, CPU tensors native C++ (:mod:`leap_kernels.native`), everything else, and CPUs without
a compiler, the PyTorch reference. The random words are the same everywhere, bit for bit; masks agree to float32
rounding. On a CPU, results do not depend on the number of threads; in native code the elements of a shard are those of
the whole matrix bit for bit, too.
"""

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from leap_kernels import native, philox
from leap_kernels.mask_reference import MaskScalars, mask_backward_reference, mask_forward_reference

_LOGITS_DTYPES = (torch.float32, torch.bfloat16)
_POINTER, _INT, _INT64, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
_STREAM: list[Any] = [ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint32]  # seed, layer, step


@functools.cache
def native_library() -> ctypes.CDLL | None:
    """``native/mask_ops.cpp``, or None where it cannot be built."""
    library = native.load("mask_ops", tune_for_host=True)
    if library is not None:
        tensor: list[Any] = [_POINTER, _INT]  # with its storage type
        # count, offset, scale, temperature, noise, stream, threads
        scalars: list[Any] = [_INT64, _INT64, _FLOAT, _FLOAT, _INT, *_STREAM, _INT]
        library.leap_mask_forward.argtypes = [*tensor, *tensor, _POINTER, _POINTER, *scalars]
        library.leap_mask_backward.argtypes = [*tensor, *tensor, *tensor, _POINTER, _POINTER, *scalars]
        library.leap_philox_words.argtypes = [_POINTER, _INT64, _INT64, *_STREAM]
        for function in (library.leap_mask_forward, library.leap_mask_backward, library.leap_philox_words):
            function.restype = None
    return library


def _native_tensor(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), native.DTYPE_CODES[tensor.dtype]


def _native_scalars(count: int, s: MaskScalars) -> tuple[int | float, ...]:
    threads = torch.get_num_threads()
    return (count, s.offset, s.scale, s.temperature, s.noise, s.seed, s.layer, s.step, threads)


def _check_tensor(name: str, tensor: Tensor, weight: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.shape != weight.shape or tensor.device != weight.device:
        raise ValueError(
            f"{name} is {tuple(tensor.shape)} on {tensor.device}, weight {tuple(weight.shape)} on {weight.device}"
        )
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype}; allowed: {', '.join(map(str, dtypes))}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous")


def mask_forward(
    weight: Tensor,
    logits: Tensor,
    *,
    scale: float,
    temperature: float,
    seed: int,
    layer: int,
    step: int,
    noise: bool,
    offset: int = 0,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``M * W`` with ``M = sigmoid((scale * P + g) / temperature)``, and sums over it.

    weight: frozen W, any shape, float32 / bfloat16 / float16, contiguous.
    logits: P, same shape, float32 / bfloat16.
    noise: sample g from Logistic(0, 1) by (seed, layer, step); False means g = 0.
    offset: flat index of the first element in the whole weight matrix, for shards of it.
    out: where to write the masked weight (like weight); allocated when None.

    Returns (masked weight like weight, stats): stats is float64 [3] on the same device, ``[sum M, sum (M W)^2,
    sum sigmoid(scale * P)]``, from float32 values before they are rounded to weight's dtype.
    Not differentiable by itself: pair it with :func:`mask_backward`. Raises ValueError for arguments that do not fit.
    """
    scalars = MaskScalars(
        scale=scale, temperature=temperature, seed=seed, layer=layer, step=step, noise=noise, offset=offset
    )
    _check_tensor("weight", weight, weight, tuple(native.DTYPE_CODES))
    _check_tensor("logits", logits, weight, _LOGITS_DTYPES)
    if out is None:
        out = torch.empty_like(weight, requires_grad=False)
    _check_tensor("out", out, weight, (weight.dtype,))

    if weight.is_cuda:
        from leap_kernels.mask_forward_triton import (
            mask_forward_triton,
        )  # here, because Triton is not on every platform

        return out, mask_forward_triton(weight, logits, out, scalars)
    if weight.device.type == "cpu" and (library := native_library()) is not None:
        stats = torch.empty(3, dtype=torch.float64)
        library.leap_mask_forward(
            *_native_tensor(weight),
            *_native_tensor(logits),
            out.data_ptr(),
            stats.data_ptr(),
            *_native_scalars(weight.numel(), scalars),
        )
        return out, stats
    return out, mask_forward_reference(weight, logits, out, scalars)


def mask_backward(
    grad_masked_weight: Tensor,
    weight: Tensor,
    logits: Tensor,
    stats_grad: Tensor,
    *,
    scale: float,
    temperature: float,
    seed: int,
    layer: int,
    step: int,
    noise: bool,
    offset: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """dL/dP from the gradients of :func:`mask_forward`'s two results; the noise is drawn again, not stored.

    grad_masked_weight: dL/d(M W), shape of weight, float32 / bfloat16 / float16.
    stats_grad: dL/dstats, float [3].
    out: where to write (like logits); it may be ``grad_masked_weight`` itself when the dtypes agree.
    The other arguments as given to forward. Returns dL/dP with the dtype of logits.
    """
    scalars = MaskScalars(
        scale=scale, temperature=temperature, seed=seed, layer=layer, step=step, noise=noise, offset=offset
    )
    _check_tensor("weight", weight, weight, tuple(native.DTYPE_CODES))
    _check_tensor("grad_masked_weight", grad_masked_weight, weight, tuple(native.DTYPE_CODES))
    _check_tensor("logits", logits, weight, _LOGITS_DTYPES)
    if stats_grad.shape != (3,):
        raise ValueError(f"stats_grad is {tuple(stats_grad.shape)}, expected (3,)")
    if out is None:
        out = torch.empty_like(logits, requires_grad=False)
    _check_tensor("out", out, weight, (logits.dtype,))

    if weight.is_cuda:
        from leap_kernels.mask_backward_triton import mask_backward_triton

        mask_backward_triton(grad_masked_weight, weight, logits, stats_grad, out, scalars)
    elif weight.device.type == "cpu" and (library := native_library()) is not None:
        stats_grad = stats_grad.detach().to("cpu", torch.float64).contiguous()
        library.leap_mask_backward(
            *_native_tensor(grad_masked_weight),
            *_native_tensor(weight),
            *_native_tensor(logits),
            stats_grad.data_ptr(),
            out.data_ptr(),
            *_native_scalars(weight.numel(), scalars),
        )
    else:
        mask_backward_reference(grad_masked_weight, weight, logits, stats_grad, out, scalars)
    return out


def random_words(
    count: int, *, seed: int, layer: int, step: int, offset: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """The random words of weights ``offset .. offset + count`` as int32 bit patterns [count], see ``philox``.

    For whoever needs randomness of the masks' kind: give it numbers of ``layer`` that no masked layer has.
    """
    philox.check_stream(seed, layer, step, offset)
    if torch.device(device).type == "cpu" and (library := native_library()) is not None:
        words = torch.empty(count, dtype=torch.int32)
        library.leap_philox_words(words.data_ptr(), count, offset, seed, layer, step)
        return words
    return philox.random_words(count, seed=seed, layer=layer, step=step, offset=offset, device=device).to(torch.int32)
