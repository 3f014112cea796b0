"""Microseconds of Python that a product on a GPU takes, with no GPU.

    python -m leap_kernels.benchmarks.launch

Everything runs as it does on a GPU, the allocation of the result included, on a CPU's memory; only Triton's compiled
launcher, which hands the arguments to the driver, is replaced by a function that does nothing. It prints the CPU.
"""

import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from leap_kernels import SparseLinear, dispatch, gemv_bitmap_cpu, gemv_bitmap_triton, gemv_idx8_triton, pack, product
from leap_kernels.idx8 import from_bmp128


class _Kernel:
    """In place of a kernel of Triton's: compiles to code that does nothing."""

    def __getitem__(self, _grid: Any) -> Callable[..., SimpleNamespace]:
        compiled = SimpleNamespace(run=lambda *_: None, function=0, packed_metadata=())
        return lambda *_, **__: compiled


@contextmanager
def no_driver() -> Iterator[None]:
    """Take tensors in a CPU's memory for ones on a GPU, and start nothing."""

    def choose_op(_device_type: str, *arguments: Any, **options: Any) -> dispatch.Op:
        return dispatch.choose_op("cuda", *arguments, **options)

    driver = SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda _: 0))
    with (
        patch.object(product, "choose_op", choose_op),
        patch.object(gemv_bitmap_cpu, "native_library", lambda: None),
        patch.object(gemv_idx8_triton._launch, "kernel", _Kernel()),
        patch.object(gemv_bitmap_triton._launch, "kernel", _Kernel()),
        patch("leap_kernels.triton_launch.driver", driver),
        patch("torch.cuda.current_device", lambda: -1),
    ):
        yield


def microseconds(function: Callable[[], object], seconds: float = 0.3) -> float:
    """Of this thread, a call, in the fastest group of 100 calls: other work on the machine only adds to it."""
    groups: list[float] = []
    end = time.thread_time() + seconds
    while not groups or time.thread_time() < end:
        start = time.thread_time()
        for _ in range(100):
            function()
        groups.append((time.thread_time() - start) * 1e4)
    return min(groups)


def layers(size: int = 256) -> dict[str, tuple[nn.Module, Tensor]]:
    """Name, layer and one row of x."""
    weight = pack(torch.randn(size, size, dtype=torch.bfloat16), torch.rand(size, size) < 0.5)
    bias = torch.randn(size, dtype=torch.bfloat16)
    x = torch.randn(1, 1, size, dtype=torch.bfloat16)
    return {
        "bitmap": (SparseLinear(weight), x),
        "idx8": (SparseLinear(from_bmp128(weight)), x),
        "idx8, bias": (SparseLinear(from_bmp128(weight), bias), x),
    }


@torch.no_grad()
def main() -> None:
    names = [line.partition(":")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    print(f"{names[0].strip() if names else platform.processor()}, Python {platform.python_version()}")
    print(f"torch {torch.__version__}, one row of x, microseconds of a call of SparseLinear:")
    with no_driver():
        for name, (layer, x) in layers().items():
            layer(x)
            print(f"{name:12} {microseconds(partial(layer, x)):5.1f}")
        print(f"{'torch.empty':12} {microseconds(lambda: torch.empty((1, 256), dtype=torch.bfloat16)):5.1f}")


if __name__ == "__main__":
    main()
