"""Durations of GPU work by replaying a CUDA graph: the launch path of Python has no part in them.

A graph holds many calls in turn over rotating copies of their inputs, more than the second-level cache holds, so that
each call reads from memory. On a CPU the same calls are timed one after the other, for smoke runs.
"""

import itertools
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

T = TypeVar("T")
Call = Callable[[], object]
_CALLS_IN_A_GRAPH = 64  # launching a graph takes some microseconds, which these share


def rotating(make: Callable[[], T], nbytes: int, device: torch.device, most: int = 64) -> list[T]:
    """Copies that together are larger than twice the second-level cache of ``device``."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return [make() for _ in range(min(most, max(1, 2 * cache // max(1, nbytes) + 1)))]


def replayed(
    variants: Mapping[str, Sequence[Call]], device: torch.device, rounds: int = 16, calls: int = _CALLS_IN_A_GRAPH
) -> dict[str, list[float]]:
    """Sorted seconds of a call of each variant, whose calls take turns over copies of its inputs.

    Each is the mean over the calls of one graph.

    Variants are replayed in a new random order every round. Raises what a call raises, capture included.

    Args:
        rounds: replays of each graph.
        calls: at least so many in a graph, unless the variant's are slow.
    """
    if device.type != "cuda":
        return {name: _timed_on_cpu(sequence) for name, sequence in variants.items()}
    graphs = {name: _capture(sequence, calls) for name, sequence in variants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    order = random.Random(0)
    for number in range(rounds + 1):
        for name, (graph, count) in order.sample(list(graphs.items()), len(graphs)):
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if number:  # the first round warms up
                seconds[name].append(start.elapsed_time(end) / 1e3 / count)
    return {name: sorted(values) for name, values in seconds.items()}


def launch_seconds(call: Call, device: torch.device, calls: int = 200) -> dict[str, float]:
    """Microseconds of an eager call: ``host_us`` until Python has it back, ``eager_us`` with the GPU's work done."""
    for _ in range(3):
        call()
    synchronize(device)
    began = time.perf_counter()
    for _ in range(calls):
        call()
    returned = time.perf_counter() - began
    synchronize(device)
    return {"host_us": 1e6 * returned / calls, "eager_us": 1e6 * (time.perf_counter() - began) / calls}


def event_seconds(call: Call, device: torch.device, repeats: int, calls: int = 1) -> list[float]:
    """Sorted seconds of a call that is too long, or too varied, for a graph; after one that warms up.

    Args:
        calls: made in a row, so that starting them hides behind the GPU's work; their mean is taken.
    """
    call()
    seconds = []
    for _ in range(repeats):
        synchronize(device)
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
        began = time.perf_counter()
        for _ in range(calls):
            call()
        if device.type == "cuda":
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3 / calls)
        else:
            seconds.append((time.perf_counter() - began) / calls)
    return sorted(seconds)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _capture(sequence: Sequence[Call], calls: int) -> tuple[torch.cuda.CUDAGraph, int]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in sequence:  # compiles what has to be compiled, fills workspaces
            call()
        torch.cuda.synchronize()
        began = time.perf_counter()
        sequence[0]()
        torch.cuda.synchronize()
        slow = time.perf_counter() - began > 2e-3
    torch.cuda.current_stream().wait_stream(stream)
    count = len(sequence) if slow else max(len(sequence), calls)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in itertools.islice(itertools.cycle(sequence), count):
            call()
    return graph, count


def _timed_on_cpu(sequence: Sequence[Call]) -> list[float]:
    seconds = []
    for call in sequence:
        call()
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return sorted(seconds)
