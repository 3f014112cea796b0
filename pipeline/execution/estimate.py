"""How fast this machine computes, which estimates of time go by."""

from __future__ import annotations

import functools
import time

import torch

from pipeline.config import RunConfig
from pipeline.stages.cost import Machine

#: Share of the speed of a plain matrix product that training reached: SmolLM2-135M, 512 tokens a step with
#: distillation, in 7 to 9 s on a core that multiplies at 130 GFLOP/s.
EFFICIENCY = 0.5


def machine_of(config: RunConfig) -> Machine:
    """What a recipe's work is done on, as far as this machine shows it."""
    cpu = EFFICIENCY * cpu_speed(1, config.model.dtype)
    return Machine(cpu, gpus=any(learn.gpu for learn in config.learn.values()))


@functools.cache
def cpu_speed(threads: int, dtype: str) -> float:
    """Operations a second of a large matrix product in ``dtype`` on this machine, measured for about 0.2 s."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a, b = torch.randn(2, 768, 768, dtype=getattr(torch, dtype))
        a @ b  # the first call sets the library up
        best, began = 0.0, time.perf_counter()
        while (at := time.perf_counter()) - began < 0.2:
            a @ b
            best = max(best, 2 * 768**3 / (time.perf_counter() - at))
    finally:
        torch.set_num_threads(before)
    return best
