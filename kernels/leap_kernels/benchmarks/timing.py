"""Timing shared by the benchmarks."""

import platform
import random
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

import torch


def interleaved(variants: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Sorted durations in seconds of every variant, called in turn for about ``seconds`` in all, after a warm-up.

    In turn, so that whatever else the machine does in the meantime falls on all of them alike, and in a new random
    order every round, because a call's time depends on what ran before it (seen: 0.55 or 0.70 ms).

    Calls on one thread are timed by its CPU time, which leaves out the time in which other processes had the core;
    calls on several by the wall clock, which wants an idle machine.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    for call in variants.values():
        call()
    durations: dict[str, list[float]] = {name: [] for name in variants}
    order = random.Random(0)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, call in order.sample(list(variants.items()), len(variants)):
            start = clock()
            call()
            durations[name].append(clock() - start)
    return {name: sorted(values) for name, values in durations.items()}


def quantile(ordered: list[float], q: float) -> float:
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def machine() -> str:
    """One line that says where and when the numbers were taken."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    cpu = names[0].split(":")[1].strip() if names else platform.processor()
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"{cpu}, {torch.get_num_threads()} threads, torch {torch.__version__}, {now}"
