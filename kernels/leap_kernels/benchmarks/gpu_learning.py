"""Speed of the kernels of a learning step: bytes a second against a copy's on the same card."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from leap_kernels.adam8bit import NO_MOMENTS, AdamStep, adam8bit
from leap_kernels.benchmarks.checkrun import CheckRun
from leap_kernels.benchmarks.graph_timing import event_seconds, launch_seconds, replayed
from leap_kernels.benchmarks.timing import quantile
from leap_kernels.mask_ops import mask_backward, mask_forward
from leap_kernels.mask_reference import MaskScalars
from leap_kernels.output_losses import output_losses, output_losses_backward
from leap_kernels.radix_counts import BUCKETS, count_high, count_low


def learning(run: CheckRun, ceilings: dict[str, float]) -> None:
    """Microseconds, and GB/s of the fewest bytes that each op has to move."""
    for name, (count, least_bytes, call) in _cases(run).items():
        with run.guarded(name):
            seconds = event_seconds(call, run.device, run.pick(7, 2), calls=4)
            median = seconds[len(seconds) // 2]
            run.figure(name, us=1e6 * median, us_min=1e6 * seconds[0], elements=count,
                       bytes_per_element=least_bytes / count, gb_s=least_bytes / median / 1e9,
                       share_of_copy=least_bytes / median / ceilings["copy"])  # fmt: skip
        torch.cuda.empty_cache()
    host_seconds(run)
    configurations_of_learning(run)


def configurations_of_learning(run: CheckRun) -> None:
    """Microseconds of each configuration of the kernels of learning, for choosing the defaults."""
    if run.device.type != "cuda":
        run.figure("configurations of learning", skipped="the kernels run on a GPU only")
        return
    from leap_kernels import mask_forward_triton

    both: dict[str, Any] = {"scale": 20.0, "temperature": 0.5, "seed": 1, "layer": 2, "step": 3}
    for count in (14336 * 4096, 4096 * 4096, 1536 * 576):
        weight = torch.randn(count, device=run.device).bfloat16()
        logits, out = torch.randn(count, device=run.device) * 0.05, torch.empty_like(weight)
        for noise in (True, False):
            scalars = MaskScalars(noise=noise, **both)
            calls = {}
            for config in run.affordable(mask_forward_triton.candidates(), repr):
                with run.guarded(f"mask forward {config}"):
                    call = partial(mask_forward_triton.mask_forward_triton, weight, logits, out, scalars, config)
                    call()
                    calls[repr(config)] = [call]
            timed = {name: 1e6 * quantile(seconds, 0.5) for name, seconds in replayed(calls, run.device, 8, 8).items()}
            run.figure(f"mask forward of {count}{', noise' * noise}", **dict(sorted(timed.items(), key=lambda t: t[1])))


def host_seconds(run: CheckRun) -> None:
    """Microseconds of Python of each call on matrices so small that the GPU waits for it."""
    count = 576 * 192
    weight = torch.randn(count, device=run.device).bfloat16()
    logits, grad_logits = torch.randn(2, count, device=run.device)
    grad, out = torch.randn_like(weight), torch.empty_like(weight)
    stats_grad = torch.ones(3, dtype=torch.float64, device=run.device)
    moments = torch.full((count,), NO_MOMENTS, dtype=torch.int16, device=run.device)
    both: dict[str, Any] = {"scale": 20.0, "temperature": 0.5, "seed": 1, "layer": 2, "noise": True}
    step = itertools.count()  # another one for each call, as in a run
    calls: dict[str, Callable[[], object]] = {
        "mask forward": lambda: mask_forward(weight, logits, step=next(step), out=out, **both),
        "mask backward": lambda: mask_backward(
            grad,
            weight,
            logits,
            stats_grad,
            step=next(step),
            out=grad_logits,
            **both,
        ),
        "Adam": lambda: adam8bit(logits, grad_logits, moments, AdamStep(0.01, (0.9, 0.95), 1, 2, next(step))),
    }
    for name, call in calls.items():
        with run.guarded(f"host time of {name}"):
            run.figure(f"host time of {name}", **launch_seconds(call, run.device, run.pick(200, 2)))


def _cases(run: CheckRun) -> dict[str, tuple[int, int, Callable[[], object]]]:
    """(elements, bytes that have to move, call) by name."""
    device, count = run.device, run.pick(14336 * 4096, 5000)
    weight = torch.randn(count, device=device).bfloat16()
    logits = torch.randn(count, device=device) * 0.05
    grad, out = torch.randn_like(weight), torch.empty_like(weight)
    grad_logits, stats_grad = torch.empty_like(logits), torch.tensor([0.1, 0.1, 0.0], device=device)
    moments, step = (
        torch.full((count,), NO_MOMENTS, dtype=torch.int16, device=device),
        AdamStep(0, (0.9, 0.95), 1, 2, 3),
    )
    bf16_logits = logits.bfloat16()
    tokens, vocabulary = run.pick((4096, 128256), (64, 300))
    student, teacher = (torch.randn(tokens, vocabulary, device=device).bfloat16() for _ in range(2))
    targets = torch.randint(vocabulary, (tokens,), device=device)
    _, sums = output_losses(student, targets, teacher)
    upper, equal = int(count_high(logits).argmax()), torch.zeros_like(logits)
    both: dict[str, Any] = {"scale": 20.0, "temperature": 0.5, "seed": 1, "layer": 2, "step": 3}
    size = student.numel()

    def forward(noise: bool) -> object:
        return mask_forward(weight, logits, noise=noise, out=out, **both)

    def backward(noise: bool) -> object:
        return mask_backward(grad, weight, logits, stats_grad, noise=noise, out=grad_logits, **both)

    return {
        "mask forward, noise": (count, 8 * count, lambda: forward(True)),
        "mask forward": (count, 8 * count, lambda: forward(False)),
        "mask backward, noise": (count, 12 * count, lambda: backward(True)),
        "mask backward": (count, 12 * count, lambda: backward(False)),
        "Adam, float32 logits": (count, 16 * count, lambda: adam8bit(logits, grad_logits, moments, step)),
        "Adam, bfloat16 logits": (count, 10 * count, lambda: adam8bit(bf16_logits, grad, moments, step)),
        "losses forward": (size, 4 * size, lambda: output_losses(student, targets, teacher)),
        "losses backward": (size, 6 * size, lambda: output_losses_backward(student, targets, teacher, sums, 0.5, 0.5)),
        "counts, upper half": (count, 4 * count, lambda: count_high(logits)),
        "counts, lower half": (count, 4 * count, lambda: count_low(logits, upper)),
        "counts of equal values, upper half": (count, 4 * count, lambda: count_high(equal)),
        "counts of equal values, lower half": (count, 4 * count, lambda: count_low(equal, BUCKETS // 2)),
    }
