"""Every kernel against float64 at the shapes of real layers, in memory that was poisoned before."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leap_kernels.adam8bit import NO_MOMENTS, AdamStep, adam8bit, adam8bit_reference
from leap_kernels.benchmarks.checkrun import CheckRun, poisoned_memory, relative_error
from leap_kernels.benchmarks.graph_timing import synchronize
from leap_kernels.benchmarks.matrices import SHAPES, random_matrix
from leap_kernels.bmp128 import BMP128
from leap_kernels.idx8 import IDX8, from_bmp128
from leap_kernels.mask_ops import mask_backward, mask_forward, random_words
from leap_kernels.mask_reference import MaskScalars, mask_backward_reference, mask_forward_reference
from leap_kernels.output_losses import (
    output_losses,
    output_losses_backward,
    output_losses_backward_reference,
    output_losses_reference,
)
from leap_kernels.radix_counts import count_high, count_low
from leap_kernels.sparse_linear import SparseLinear, sparse_linear

_ODD = ((4097, 4099), (1, 129), (3, 100))
_ROWS = (1, 2, 4, 8, 12, 13, 16, 32, 33)
# Largest relative error: of the rounding of the result to its dtype, with room for float32 sums in another order.
_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def correctness(run: CheckRun) -> None:
    """The whole step."""
    with run.guarded("products"):
        _products(run)
    with run.guarded("masks"):
        _masks(run)
    with run.guarded("Adam"):
        _adam(run)
    with run.guarded("losses"):
        _losses(run)
    with run.guarded("counts"):
        _counts(run)
    with run.guarded("graph"):
        _graph(run)
    with run.guarded("compute-sanitizer"):
        _sanitizer(run)


def _products(run: CheckRun) -> None:
    shapes = run.pick(SHAPES + _ODD, ((64, 300), (5, 129)))
    cases = [(shape, dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32) for shape in shapes]
    for shape, dtype in run.affordable(cases):
        packed = random_matrix(shape, 0.6, dtype, run.device)
        dense = packed.unpack()
        exact = dense.double()
        matrices: list[BMP128 | IDX8] = [packed, from_bmp128(packed)]
        errors: dict[str, float] = {}
        for matrix in matrices:
            kind = "idx8" if isinstance(matrix, IDX8) else "bmp128"
            for rows in run.pick(_ROWS, (1, 2, 33)):
                x = torch.randn(rows, shape[1], device=run.device).to(dtype)
                bias = torch.randn(shape[0], device=run.device).to(dtype) if rows % 2 else None
                with poisoned_memory():
                    y = sparse_linear(x, matrix, bias)
                reference = x.double() @ exact.T + (0 if bias is None else bias.double())
                errors[f"{kind} {rows}"] = relative_error(y, reference)
        worst = max(errors, key=lambda name: errors[name])
        label = f"product {shape[0]}x{shape[1]} {str(dtype).removeprefix('torch.')}"
        run.check(label, errors[worst] < _TOLERANCE[dtype], error=errors[worst], worst=worst)
        if errors[worst] >= _TOLERANCE[dtype]:
            run.figure(f"{label}, all", **errors)


def _masks(run: CheckRun) -> None:
    count = run.pick(14336 * 4096, 5000)
    device = run.device
    words = random_words(4096, seed=2**40 + 7, layer=3, step=5, offset=2**33 + 1)
    there = random_words(4096, seed=2**40 + 7, layer=3, step=5, offset=2**33 + 1, device=device)
    run.check("Philox words equal the CPU's", torch.equal(words, there.cpu()))
    weight = torch.randn(count, device=device).bfloat16()
    logits = torch.randn(count, device=device) * 0.05
    grad = torch.randn(count, device=device).bfloat16()
    stats_grad = torch.tensor([0.1, 0.2, 0.3], device=device)
    for noise, offset in ((True, 0), (True, 2**33 + 1), (False, 0)):
        scalars = MaskScalars(scale=20.0, temperature=0.5, seed=9, layer=2, step=3, noise=noise, offset=offset)
        given = {name: getattr(scalars, name) for name in MaskScalars.__slots__}
        with poisoned_memory():
            masked, stats = mask_forward(weight, logits, **given)
            back = mask_backward(grad, weight, logits, stats_grad, **given)
        exact, exact_back = torch.empty_like(weight), torch.empty_like(logits)
        exact_stats = mask_forward_reference(weight, logits, exact, scalars, compute_dtype=torch.float64)
        mask_backward_reference(grad, weight, logits, stats_grad, exact_back, scalars, compute_dtype=torch.float64)
        label = f"{'noise' if noise else 'no noise'}, offset {offset}, {count} weights"
        errors = {
            "masked": relative_error(masked, exact),
            "sums": relative_error(stats, exact_stats),
            "gradient": relative_error(back, exact_back),
        }
        passed = errors["masked"] < 1e-3 and errors["sums"] < 1e-6 and errors["gradient"] < 1e-4
        run.check(f"mask {label}", passed, **errors)


def _adam(run: CheckRun) -> None:
    count = run.pick(1 << 24, 5000)
    for dtype in (torch.float32, torch.bfloat16):
        logits = (torch.randn(count, device=run.device) * 0.1).to(dtype)
        moments = torch.full((count,), NO_MOMENTS, dtype=torch.int16, device=run.device)
        other, other_moments = logits.clone(), moments.clone()
        for step in range(3):
            grad = (torch.randn(count, device=run.device) * 10.0 ** (step - 4)).bfloat16()
            s = AdamStep(1e-3, (0.9, 0.95), 1, 2, step, offset=5, shift=1e-4)
            adam8bit(logits, grad, moments, s)
            adam8bit_reference(other, grad, other_moments, s)
        # A value on a boundary may round to the neighbouring code: what differs has to be rare.
        share = float((moments != other_moments).double().mean())
        error = relative_error(logits, other)
        run.check(f"Adam {str(dtype).removeprefix('torch.')}", share < 1e-3 and error < 1e-3, codes=share, error=error)


def _losses(run: CheckRun) -> None:
    tokens, vocabulary = run.pick((512, 128256), (7, 300))
    student, teacher = (torch.randn(tokens, vocabulary, device=run.device) * 3 for _ in range(2))
    targets = torch.randint(vocabulary, (tokens,), device=run.device)
    targets[::5] = -100
    for dtype in (torch.bfloat16, torch.float32):
        s, t = student.to(dtype), teacher.to(dtype)
        exact, exact_sums = output_losses_reference(s.double(), targets, t.double())
        exact_grad = output_losses_backward_reference(s.double(), targets, t.double(), exact_sums, 0.3, 0.7)
        with poisoned_memory():
            losses, sums = output_losses(s, targets, t)
            grad = output_losses_backward(s, targets, t, sums, 0.3, 0.7)
        errors = {"losses": relative_error(losses, exact), "gradient": relative_error(grad, exact_grad)}
        tolerance = 4e-3 if dtype == torch.bfloat16 else 1e-5
        label = f"losses {tokens}x{vocabulary} {str(dtype).removeprefix('torch.')}"
        run.check(label, errors["losses"] < 1e-5 and errors["gradient"] < tolerance, **errors)


def _counts(run: CheckRun) -> None:
    values = torch.randn(run.pick(1 << 26, 5000), device=run.device)
    high = count_high(values)
    upper = int(high.argmax())
    same = torch.equal(high.cpu(), count_high(values.cpu()))
    same &= torch.equal(count_low(values, upper).cpu(), count_low(values.cpu(), upper))
    run.check(f"counts of {values.numel()} values equal the CPU's", same)


def _graph(run: CheckRun) -> None:
    if run.device.type != "cuda":
        run.figure("capture in a graph", skipped="there are no graphs on a CPU")
        return
    packed = random_matrix((4096, 4096), 0.6, torch.bfloat16, run.device)
    for kind, matrix in (("bmp128", packed), ("idx8", from_bmp128(packed))):
        layer = SparseLinear(matrix)
        for rows in (1, 16, 64):
            with run.guarded(f"capture in a graph, {kind}, {rows} rows"):
                x = torch.randn(rows, 4096, device=run.device).bfloat16()
                run.check(f"capture in a graph, {kind}, {rows} rows", *_replayed_equals(layer, x))


def _replayed_equals(layer: SparseLinear, x: Tensor) -> tuple[bool]:
    """Whether a replayed graph gives what the eager call gives, for an x that was written after the capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layer(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    synchronize(x.device)
    return (torch.equal(y, layer(x)),)


def _sanitizer(run: CheckRun) -> None:
    tool = shutil.which("compute-sanitizer")
    if tool is None or run.device.type != "cuda":
        run.figure("compute-sanitizer", skipped="not installed" if tool is None else "no card")
        return
    small = Path(__file__).with_name("sanitized_case.py")
    command = [tool, "--tool", "memcheck", "--error-exitcode", "7", sys.executable, str(small)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    tail = (done.stdout + done.stderr).strip().splitlines()[-3:]
    run.check("compute-sanitizer memcheck", done.returncode == 0, code=done.returncode, tail=tail)


def smallest_case(device: torch.device) -> None:
    """Each kernel once on odd shapes, for a memory checker."""
    for dtype in (torch.bfloat16, torch.float32):
        packed = random_matrix((131, 259), 0.6, dtype, device)
        for matrix in (packed, from_bmp128(packed)):
            for rows in (1, 5, 33):
                sparse_linear(torch.randn(rows, 259, device=device).to(dtype), matrix)
    weight, logits = torch.randn(2, 1001, device=device)
    scalars: dict[str, Any] = {
        "scale": 20.0,
        "temperature": 0.5,
        "seed": 9,
        "layer": 2,
        "step": 3,
        "noise": True,
        "offset": 3,
    }
    mask_forward(weight, logits, **scalars)
    mask_backward(weight, weight, logits, torch.ones(3, device=device), **scalars)
    moments = torch.full((1001,), NO_MOMENTS, dtype=torch.int16, device=device)
    adam8bit(logits, weight, moments, AdamStep(1e-3, (0.9, 0.95), 1, 2, 3))
    student, targets = torch.randn(5, 1003, device=device), torch.tensor([1, 2, -100, 4, 1002], device=device)
    _, sums = output_losses(student, targets, student)
    output_losses_backward(student, targets, student, sums, 0.5, 0.5)
    count_low(logits, int(count_high(logits).argmax()))
    synchronize(device)
