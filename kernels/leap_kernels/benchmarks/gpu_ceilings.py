"""The card, and what it can do: the rates that everything else is held against."""

import shutil
import subprocess

import torch

from leap_kernels.benchmarks.checkrun import CheckRun
from leap_kernels.benchmarks.device import facts
from leap_kernels.benchmarks.graph_timing import event_seconds

_STATE = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,temperature.gpu,power.draw,power.limit"


def ceilings(run: CheckRun) -> dict[str, float]:
    """Record facts and ceilings; returns bytes a second of a copy and of a read, and FLOP/s of a bfloat16 product."""
    run.figure("facts", **facts(run.device), **_card(run.device))
    run.figure("state before", state=_state())
    size, n = run.pick((2**32, 8192), (2**22, 256))
    copied, read = _streams(run, size)
    a, b = (torch.randn(n, n, device=run.device).bfloat16() for _ in range(2))
    product = event_seconds(lambda: a @ b, run.device, run.pick(10, 2))
    result = {"copy": 2 * size / copied, "read": size / read, "product": 2 * n**3 / product[len(product) // 2]}
    run.figure("ceilings", copy_gb_s=result["copy"] / 1e9, read_gb_s=result["read"] / 1e9,
               bf16_tflop_s=result["product"] / 1e12, copy_bytes=2 * size, product_size=n)  # fmt: skip
    run.figure("state after", state=_state())
    return result


def _streams(run: CheckRun, size: int) -> tuple[float, float]:
    """Median seconds of copying and of reading ``size`` bytes."""
    source = torch.randint(-(2**31), 2**31 - 1, (size // 4,), dtype=torch.int32, device=run.device)
    target = torch.empty_like(source)
    copied = event_seconds(lambda: target.copy_(source), run.device, run.pick(10, 2))
    values = source.view(torch.float32).nan_to_num_(0.0, 0.0, 0.0)
    read = event_seconds(values.amax, run.device, run.pick(10, 2))
    return copied[len(copied) // 2], read[len(read) // 2]


def _card(device: torch.device) -> dict[str, float | str]:
    if device.type != "cuda":
        return {}
    gpu = torch.cuda.get_device_properties(device)
    return {
        "capability": f"{gpu.major}.{gpu.minor}",
        "l2_bytes": gpu.L2_cache_size,
        "memory_bytes": gpu.total_memory,
        "shared_memory_per_sm": gpu.shared_memory_per_multiprocessor,
    }


def _state() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    command = [tool, f"--query-gpu={_STATE}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=20).stdout.strip()
