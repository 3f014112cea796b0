"""Whether the kernels and the learning path are right on this GPU, and how fast: one command, one budget.

    python -m leap.benchmarks.gpu_check --out DIR --budget 540 [--smoke] [--steps ceilings products ...]

Writes DIR/gpu_check.jsonl, a line for each result, as soon as it exists, and ends with exit code 1 if a check failed.
Needs torch, triton, transformers and safetensors. A step that an error or its time ends does not keep the others from
running: after an error that the CUDA context does not survive, and after a hang, they go on in a new process.
``--smoke`` takes small shapes and runs on a CPU too; its times mean nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from leap_kernels.benchmarks.checkrun import LOST, CheckRun, Records

import leap  # noqa: F401 - finds leap_kernels in a source checkout


@dataclass(frozen=True)
class Step:
    """A part of the check."""

    name: str
    seconds: float
    """Share of a budget of 540 seconds."""
    run: Callable[[CheckRun, dict[str, float]], Any]


def _ceilings(run: CheckRun, _: dict[str, float]) -> dict[str, float]:
    from leap_kernels.benchmarks.gpu_ceilings import ceilings

    return ceilings(run)


def _correctness(run: CheckRun, _: dict[str, float]) -> None:
    from leap_kernels.benchmarks.gpu_correctness import correctness

    correctness(run)


def _products(run: CheckRun, rates: dict[str, float]) -> None:
    from leap_kernels.benchmarks.gpu_products import products

    products(run, rates)


def _configurations(run: CheckRun, rates: dict[str, float]) -> None:
    from leap_kernels.benchmarks.gpu_products import configurations

    configurations(run, rates)


def _learning(run: CheckRun, rates: dict[str, float]) -> None:
    from leap_kernels.benchmarks.gpu_learning import learning

    learning(run, rates)


def _decode(run: CheckRun, _: dict[str, float]) -> None:
    from leap.benchmarks.gpu_decode import decoding

    decoding(run)


def _training(run: CheckRun, _: dict[str, float]) -> None:
    from leap.benchmarks.gpu_training import training

    training(run)


def _prune(run: CheckRun, _: dict[str, float]) -> None:
    from leap.benchmarks.gpu_prune import pruning

    pruning(run)


# Imported when a step starts: what one of them lacks does not keep the others from running.
STEPS = (
    Step("ceilings", 40, _ceilings),
    Step("correctness", 90, _correctness),
    Step("products", 100, _products),
    Step("configurations", 30, _configurations),
    Step("learning", 30, _learning),
    Step("decode", 110, _decode),
    Step("training", 90, _training),
    Step("prune", 50, _prune),
)


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for gpu_check.jsonl")
    parser.add_argument("--budget", type=float, default=540, help="seconds for everything")
    parser.add_argument("--smoke", action="store_true", help="small shapes, on a CPU where there is no GPU")
    parser.add_argument("--steps", nargs="+", choices=[step.name for step in STEPS], metavar="STEP")
    parser.add_argument("--goes-on", type=float, nargs=2, help=argparse.SUPPRESS)  # seconds used, checks that failed
    return parser.parse_args(given)


def main(command: Sequence[str] | None = None) -> int:
    given = arguments(command)
    if not torch.cuda.is_available() and not given.smoke:
        print("There is no CUDA device here. --smoke runs the same on a CPU with small shapes.")
        return 2
    used, failures = given.goes_on or (0.0, 0.0)
    began = time.monotonic() - used
    path = given.out / "gpu_check.jsonl"
    if given.goes_on is None:
        path.unlink(missing_ok=True)
    records = Records(path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps = [step for step in STEPS if given.steps is None or step.name in given.steps]
    rates = {"copy": float("nan"), "read": float("nan"), "product": float("nan")}
    failed: list[str] = []
    share = (given.budget - used) / max(1.0, sum(step.seconds for step in steps))
    for number, step in enumerate(steps):
        end = time.monotonic() + share * step.seconds
        run = CheckRun(device, given.smoke, records, step.name, min(end, began + given.budget), failed)
        rest = [other.name for other in steps[number + 1 :]]
        watch = watchdog(run, rest, given, began, failures, hang=share * step.seconds + 60)
        started = time.monotonic()
        try:
            found = step.run(run, rates)
            rates |= found or {}
        except Exception as error:
            run.check(LOST, False, error=f"{type(error).__name__}: {error}"[:600], where=traceback.format_exc()[-600:])
            if device.type == "cuda" and not _alive():
                _go_on(rest, given, time.monotonic() - began, failures + len(failed))
        finally:
            watch.cancel()
        run.figure("step done", seconds=time.monotonic() - started)
    total = int(failures) + len(failed)
    records.write({"step": "end", "name": "failed checks", "number": total, "of_this_process": failed})
    return 1 if total else 0


def _alive() -> bool:
    try:
        torch.cuda.synchronize()
        return bool(torch.ones(1, device="cuda").sum() == 1)
    except RuntimeError:
        return False


def watchdog(
    run: CheckRun, rest: list[str], given: argparse.Namespace, began: float, failures: float, hang: float
) -> threading.Timer:
    """Ends a step that is still running ``hang`` seconds after its start."""

    def hung() -> None:
        run.check(LOST, False, error=f"still running {hang:.0f} s after its start")
        _go_on(rest, given, time.monotonic() - began, failures + len(run.failed))

    timer = threading.Timer(hang, hung)
    timer.daemon = True
    timer.start()
    return timer


def _go_on(rest: list[str], given: argparse.Namespace, used: float, failures: float) -> None:
    """Replace this process by one that runs the steps that are left."""
    command = [sys.executable, "-m", "leap.benchmarks.gpu_check", "--out", str(given.out)]
    command += ["--budget", str(given.budget), *(["--smoke"] if given.smoke else [])]
    command += ["--goes-on", str(used), str(failures)]
    sys.stdout.flush()
    if not rest:
        os._exit(1)
    os.execv(sys.executable, [*command, "--steps", *rest])


if __name__ == "__main__":
    sys.exit(main())
