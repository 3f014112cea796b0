"""How Triton kernels are started: in a few microseconds, on the device that holds their tensors.

Triton's own launch binds and inspects every argument anew, which takes longer than the GPU needs for a small matrix.
Which compiled code fits depends on types, sizes and constants alone, so it is looked up by them and started directly.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver

_ALIGNED = 16  # bytes; compiled code relies on what its first arguments were


class Launcher:
    """Starts one kernel, whose parameters are tensors, then integers, then numbers, then constants.

    The kernel says the type of each of its numbers, and that Triton is not to specialise in them, nor in pointers to
    single elements.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._compiled: dict[tuple[Any, ...], tuple[Any, ...]] = {}

    def __call__(
        self,
        programs: int,
        tensors: Sequence[Tensor],
        integers: tuple[int, ...],
        constants: tuple[Any, ...],
        warps: int,
        numbers: tuple[float, ...] = (),
        singles: Sequence[Tensor] = (),
        types: Any = None,
    ) -> None:
        """Start ``programs`` programs on the device and the current stream of ``tensors[0]``. Waits for nothing.

        Args:
            tensors: on one device.
            integers: few different ones; other code may be compiled for each.
            numbers: any; the code does not depend on them.
            singles: tensors of few elements, which may lie anywhere; the kernel's parameters after ``tensors``.
            types: what the dtypes of all tensors follow from; None if from that of ``tensors[0]``.
        """
        first = tensors[0]
        device = first.get_device()
        pointers = []
        together = 0
        for tensor in tensors:
            pointer = tensor.data_ptr()
            together |= pointer
            pointers.append(pointer)
        key = (device, types or first.dtype, integers, constants, warps, together % _ALIGNED == 0)
        found = self._compiled.get(key)
        if found is None or device != torch.cuda.current_device():
            self._first(key, programs, (*tensors, *singles), numbers)
            return
        if singles:
            pointers.extend([single.data_ptr() for single in singles])
        run, function, metadata, stream_of = found
        arguments = (*pointers, *integers, *numbers, *constants)
        run(programs, 1, 1, stream_of(device), function, metadata, None, None, None, *arguments)

    def _first(
        self, key: tuple[Any, ...], programs: int, tensors: Sequence[Tensor], numbers: tuple[float, ...]
    ) -> None:
        """The launch through Triton, which compiles; remembers the code where it fits all aligned tensors."""
        device, _, integers, constants, warps, aligned = key
        with torch.cuda.device(device):  # a device of -1, a CPU's in the interpreter, changes nothing
            compiled = self.kernel[(programs,)](*tensors, *integers, *numbers, *constants, num_warps=warps)
        if aligned and not knobs.runtime.interpret:
            stream_of = driver.active.get_current_stream
            self._compiled[key] = (compiled.run, compiled.function, compiled.packed_metadata, stream_of)
