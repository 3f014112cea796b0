"""Where a run took place."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version

import torch


def environment() -> dict[str, str | int | None]:
    """Versions and hardware, for the records."""
    packages = ["torch", "ray", "deepspeed", "transformers", "datasets", "triton", "lm-eval", "mlflow"]
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        **{package: version(package) for package in packages},
    }
