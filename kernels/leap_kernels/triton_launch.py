"""How the Triton kernels for products are started: in a few microseconds, on the device that holds x.

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
    """Starts one kernel, whose parameters are tensors, then integers, then constants."""

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
    ) -> None:
        """Start ``programs`` programs on the device and the current stream of ``tensors[0]``. Waits for nothing.

        The dtypes of all tensors have to follow from that of ``tensors[0]``, and their devices are the same.
        """
        first = tensors[0]
        device = first.get_device()
        pointers = []
        together = 0
        for tensor in tensors:
            pointer = tensor.data_ptr()
            together |= pointer
            pointers.append(pointer)
        key = (device, first.dtype, integers, constants, warps, together % _ALIGNED == 0)
        found = self._compiled.get(key)
        if found is None or device != torch.cuda.current_device():
            self._first(key, programs, tensors)
            return
        run, function, metadata, stream_of = found
        run(programs, 1, 1, stream_of(device), function, metadata, None, None, None, *pointers, *integers, *constants)

    def _first(self, key: tuple[Any, ...], programs: int, tensors: Sequence[Tensor]) -> None:
        """The launch through Triton, which compiles; remembers the code where it fits all aligned tensors."""
        device, _, integers, constants, warps, aligned = key
        with torch.cuda.device(device):  # a device of -1, a CPU's in the interpreter, changes nothing
            compiled = self.kernel[(programs,)](*tensors, *integers, *constants, num_warps=warps)
        if aligned and not knobs.runtime.interpret:
            stream_of = driver.active.get_current_stream
            self._compiled[key] = (compiled.run, compiled.function, compiled.packed_metadata, stream_of)
