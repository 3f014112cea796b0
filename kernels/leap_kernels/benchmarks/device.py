"""What a record of GPU measurements has to say about the machine."""

import importlib.metadata
import shutil
import subprocess
from datetime import UTC, datetime

import torch

from leap_kernels.benchmarks.timing import cpu_name
from leap_kernels.dispatch import bytes_per_clock


def facts(device: torch.device) -> dict[str, str | float]:
    """Device, clocks in MHz, driver, versions and the time, the same keys on every machine; "" where there is none."""
    about: dict[str, str | float] = {
        "device": cpu_name(),
        "processors": torch.get_num_threads(),
        "clock_mhz": "",
        "memory_clock_mhz": "",
        "bytes_per_clock_and_sm": "",
        "driver": "",
        "cuda": torch.version.cuda or "",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        about |= {
            "device": gpu.name,
            "processors": gpu.multi_processor_count,
            "clock_mhz": gpu.clock_rate / 1000,
            "memory_clock_mhz": gpu.memory_clock_rate / 1000,
            "bytes_per_clock_and_sm": round(bytes_per_clock(gpu), 2),
            "driver": _driver(),
        }
    return about


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _driver() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    return lines[0] if lines else ""
