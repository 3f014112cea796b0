"""Timing shared by the benchmarks."""

import platform
import random
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

import torch


def clock() -> Callable[[], float]:
    """What calls are timed by: a thread's CPU time where there is one thread, else the wall clock.

    CPU time leaves out the time in which other processes had the core; the wall clock wants an idle machine.
    """
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


def interleaved(variants: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Sorted durations in seconds of every variant, called in turn for about ``seconds`` in all, after a warm-up.

    In turn, so that whatever else the machine does in the meantime falls on all of them alike, and in a new random
    order every round, because a call's time depends on what ran before it (seen: 0.55 or 0.70 ms).
    """
    now = clock()
    for call in variants.values():
        call()
    durations: dict[str, list[float]] = {name: [] for name in variants}
    order = random.Random(0)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, call in order.sample(list(variants.items()), len(variants)):
            start = now()
            call()
            durations[name].append(now() - start)
    return {name: sorted(values) for name, values in durations.items()}


def quantile(ordered: list[float], q: float) -> float:
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def machine() -> str:
    """One line that says where and when the numbers were taken."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    cpu = names[0].split(":")[1].strip() if names else platform.processor()
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"{cpu}, {torch.get_num_threads()} threads, torch {torch.__version__}, {now}"
