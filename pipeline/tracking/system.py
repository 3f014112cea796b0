"""How busy the driver's machine is, sampled with MLflow's own meters, so that its UI shows it as system metrics."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any

from pipeline.tracking.tracker import Run


class SystemMetrics:
    """Logs ``system/…`` metrics of ``run`` from a thread while the block runs.

    They pass through the run's records, unlike those of MLflow's own monitor, and so survive the loss of a server.

    Args:
        every: seconds between samples.
    """

    def __init__(self, run: Run, every: float = 10.0) -> None:
        self._run, self._every = run, every
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="system metrics", daemon=True)

    def __enter__(self) -> SystemMetrics:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        meters = _meters()
        step = self._run.last_step
        while not self._stop.is_set():
            step += 1
            found: dict[str, float] = {}
            for meter in meters:
                meter.collect_metrics()
                found |= meter.aggregate_metrics()
                meter.clear_metrics()
            self._run.log_metrics({f"system/{name}": value for name, value in found.items()}, step)
            self._stop.wait(self._every)


def _meters() -> list[Any]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    meters = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    try:
        return [*meters, GPUMonitor()]
    except Exception:  # no library for it, or no GPU
        return meters
