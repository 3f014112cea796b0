"""Which op is chosen, and that sparse_linear calls that one."""

from types import SimpleNamespace

import pytest
import torch
from leap_kernels import dispatch, pack, sparse_linear
from leap_kernels.dispatch import choose_format, choose_op
from leap_kernels.idx8 import from_bmp128

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("device", "rows", "dtype", "expected"),
    [
        ("cpu", 1, BF16, "gemv_bitmap_cpu"),
        ("cpu", 16, FP32, "gemv_bitmap_cpu"),
        ("cpu", 17, FP32, "dense"),
        ("cpu", 1, FP16, "dense"),
        ("cuda", 0, BF16, "dense"),
        ("cuda", 1, FP16, "gemv_bitmap_triton"),
        ("cuda", 2, BF16, "spmm_bitmap_triton"),
        ("cuda", 32, FP16, "spmm_bitmap_triton"),
        ("cuda", 33, BF16, "dense"),
        ("cuda", 4, FP32, "gemv_bitmap_triton"),
        ("cuda", 5, FP32, "dense"),
        ("mps", 1, FP16, "dense"),
    ],
)
def test_choice_for_bmp128(device, rows, dtype, expected):
    assert choose_op(device, rows, dtype) == expected
    assert choose_op(device, rows, dtype, differentiable=True) == "dense"


def test_choice_for_idx8_and_without_native_code():
    assert choose_op("cpu", 1, BF16, native=False) == "dense"
    assert choose_op("cpu", 1, BF16, matrix_format="idx8") == "dense"
    assert choose_op("cuda", 4, BF16, matrix_format="idx8") == "gemv_idx8_triton"
    assert choose_op("cuda", 5, BF16, matrix_format="idx8") == "dense"


@pytest.mark.parametrize(
    ("mhz", "bus", "processors", "memory_mhz", "expected"),
    [
        (2520, 384, 128, 10501, "bmp128"),  # RTX 4090
        (1695, 384, 82, 9751, "bmp128"),  # RTX 3090
        (1410, 5120, 108, 1215, "idx8"),  # A100 40 GB
        (1980, 5120, 132, 2619, "idx8"),  # H100 SXM
    ],
)
def test_format_by_bandwidth_per_clock(mhz, bus, processors, memory_mhz, expected):
    gpu = SimpleNamespace(
        clock_rate=mhz * 1000,
        memory_bus_width=bus,
        multi_processor_count=processors,
        memory_clock_rate=memory_mhz * 1000,
    )
    bandwidth = dispatch.bytes_per_clock(gpu)
    assert bandwidth == pytest.approx(2 * memory_mhz * bus / 8 / (processors * mhz))
    assert choose_format(bandwidth, itemsize=2, columns=4096) == expected
    assert choose_format(bandwidth, itemsize=4, columns=4096) == "bmp128"
    assert choose_format(bandwidth, itemsize=2, columns=2**16 + 1) == "bmp128"


def test_the_format_follows_the_device(monkeypatch):
    monkeypatch.setattr(dispatch, "_bytes_per_clock", lambda _: 13.0)
    assert dispatch.format_for(torch.device("cpu"), BF16, 4096) == "bmp128"
    assert dispatch.format_for(torch.device("cuda", 0), BF16, 4096) == "idx8"
    assert dispatch.format_for(torch.device("cuda", 0), FP32, 4096) == "bmp128"


def test_idx8_on_a_cpu_is_unpacked():
    packed = pack(torch.randn(6, 300), torch.rand(6, 300) < 0.5)
    x = torch.randn(3, 300)
    dense = torch.nn.functional.linear(x, packed.unpack())
    assert torch.equal(sparse_linear(x, from_bmp128(packed)), dense)
