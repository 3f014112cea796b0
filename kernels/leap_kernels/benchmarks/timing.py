"""Timing shared by the benchmarks."""

import platform
import random
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

import torch


def clock(device_type: str = "cpu") -> Callable[[], float]:
    """What calls are timed by: a thread's CPU time where there is one thread, else the wall clock.

    CPU time leaves out the time in which other processes had the core; the wall clock wants an idle machine. For a GPU
    it is the wall clock once all that was started there has ended.
    """
    if device_type == "cuda":

        def when_idle() -> float:
            torch.cuda.synchronize()
            return time.perf_counter()

        return when_idle
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


def cpu_timer() -> Callable[[Callable[[], object]], float]:
    """Seconds of a call by :func:`clock`."""
    now = clock()

    def measure(call: Callable[[], object]) -> float:
        start = now()
        call()
        return now() - start

    return measure


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    seconds: float,
) -> dict[str, list[float]]:
    """Sorted durations of every variant, called in turn for about ``seconds`` in all, after a warm-up.

    In turn, so that whatever else the machine does in the meantime falls on all of them alike, and in a new random
    order every round, because a call's time depends on what ran before it (seen: 0.55 or 0.70 ms).
    """
    measure = cpu_timer()
    for call in variants.values():
        call()
    durations: dict[str, list[float]] = {name: [] for name in variants}
    order = random.Random(0)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or not all(durations.values()):
        for name, call in order.sample(list(variants.items()), len(variants)):
            durations[name].append(measure(call))
    return {name: sorted(values) for name, values in durations.items()}


def quantile(ordered: list[float], q: float) -> float:
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def cpu_name() -> str:
    """As the kernel names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def machine() -> str:
    """One line that says where and when the numbers were taken."""
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"{gpu}{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {now}"
