"""What the command line shows of a run without starting it: what it will consist of, and what it will cost."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.commands.text_tables import plain_table, sparsities
from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.execution import preflight
from pipeline.execution.estimate import machine_of
from pipeline.execution.plan import make_plan
from pipeline.formatting import NBSP, count
from pipeline.model.sizes import Sizes, measure
from pipeline.stages.cost import GPU_SPEED, Cost, Machine
from pipeline.stages.learn import Learn
from pipeline.stages.planned import Plan
from pipeline.stages.stage import Stage
from pipeline.tracking.redaction import redact, remember


@dataclass(frozen=True)
class Line:
    """Work on one line of the plan: pieces of one kind, and what they take together."""

    kind: str
    label: str
    stages: list[Stage[Any]]
    cost: Cost


def show_plan(config: RunConfig) -> None:
    """Stages, what is finished, disk, memory, tokens and an estimate of the time. Starts nothing.

    Raises:
        UserError: the run would not start; what could be found out is printed before.
    """
    console = Console()
    for address in (config.tracking.uri, config.output):
        remember(address or "")
    plan = make_plan(config)
    config = plan.config
    trouble: UserError | None = None
    try:
        sizes = measure(config)
    except UserError as error:
        sizes, trouble = None, error
    _head(console, plan, sizes)
    machine = machine_of(config)
    console.print(_stage_table([_line(stages, sizes, machine) for stages in _on_one_line(plan)]))
    if config.learn:
        console.print()
        console.print(_learn_table(plan, sizes, machine))
    console.print()
    if sizes is None:
        if not _on_hub(config):
            raise trouble or AssertionError
        text = f"model.source: the configuration of {config.model.source} cannot be read from here; no sizes, no times."
        console.print(Text(text, style="yellow"), soft_wrap=True)
        return
    console.print(Text(_explanation(machine), style="dim"))
    for warning in preflight.check(plan)[1]:
        console.print(Text.assemble(("warning: ", "bold yellow"), redact(warning)))


def _head(console: Console, plan: Plan, sizes: Sizes | None) -> None:
    config = plan.config
    known = f", {count(sizes.parameters)} parameters, {sizes.weights}" if sizes else ""
    console.print(Text.assemble((config.name, "bold"), f": {config.model.source}, {config.model.dtype}{known}"))
    console.print(f"sparsities {sparsities(config)}, context of {config.data.context_length} tokens")
    console.print(Text(redact(f"results in {plan.directory}")), soft_wrap=True)
    console.print()


def _on_one_line(plan: Plan) -> Iterator[list[Stage[Any]]]:
    """The work of the plan in order, what is shown together in one list."""
    for _, stages in itertools.groupby(plan.stages, key=lambda stage: (stage.KIND, stage.label)):
        yield list(stages)


def _line(stages: list[Stage[Any]], sizes: Sizes | None, machine: Machine) -> Line:
    costs = [stage.cost(sizes, machine) if sizes else Cost() for stage in stages]
    together = Cost(_sum(cost.seconds for cost in costs), _sum(cost.disk for cost in costs))
    return Line(stages[0].KIND, stages[0].label, stages, together)


def _sum(numbers: Iterable[float | None]) -> float | None:
    """None where one is not known."""
    total = 0.0
    for number in numbers:
        if number is None:
            return None
        total += number
    return total


def _stage_table(lines: list[Line]) -> Table:
    table = plain_table("stage", "item", "state", ">disk", ">time, about")
    previous, total_bytes, total_seconds = "", 0.0, 0.0
    for line in lines:
        done, all_ = sum(stage.finished for stage in line.stages), len(line.stages)
        state = Text("finished", style="green") if done == all_ else Text(f"{done} of {all_} done")
        if not done:
            state = Text("to do" if all_ == 1 else f"{all_} to do")
        disk, seconds = line.cost.disk, line.cost.seconds
        if done < all_:
            total_bytes += disk or 0
            total_seconds += (seconds or 0) * (1 - done / all_)
        table.add_row(line.kind if line.kind != previous else "", line.label, state, _bytes(disk), _about(seconds))
        previous = line.kind
    if total_seconds:
        table.add_row()
        table.add_row("still to do", "", "", _bytes(total_bytes), _about(total_seconds), style="bold")
    return table


def _learn_table(plan: Plan, sizes: Sizes | None, machine: Machine) -> Table:
    """A column for each entry of ``learn``; of more than four, a row for each."""
    config, learns = plan.config, plan.of(Learn)
    of_entry = [next(learn for learn in learns if learn.entry == name) for name in config.learn]
    runs = [learn.config for learn in of_entry]
    rows_there = -(-config.data.calibration.tokens // config.data.context_length)
    passes = (r.settings.steps * r.settings.batch_rows / rows_there for r in runs)
    facts = {
        "steps": [count(r.settings.steps) for r in runs],
        "rows a step": [count(r.settings.batch_rows) for r in runs],
        "tokens in all": [count(learn.tokens) for learn in of_entry],
        "passes over the text": [f"{p:.2g}" for p in passes],
        "workers": [f"{r.workers} {'GPU' if r.gpu else f'× {r.threads} CPU'}" for r in runs],
    }
    memory = [learn.cost(sizes, machine).memory for learn in of_entry] if sizes else []
    together = [_bytes(sum(m.values())) for m in memory]
    if len(runs) > 4:
        if memory:
            facts["memory of a worker"] = together
        table = plain_table("learning", *(f">{label.split()[0]}" for label in facts))
        for name, *cells in zip(config.learn, *facts.values(), strict=True):
            table.add_row(name, *cells)
        return table
    table = plain_table("learning", *(f">{name}" for name in config.learn))
    for label, cells in facts.items():
        table.add_row(label, *cells)
    if memory:
        table.add_row("memory of a worker", *("" for _ in runs))
        for label in memory[0]:
            table.add_row(f"  {label}", *(_bytes(m[label]) for m in memory))
        table.add_row("  together", *together, style="bold")
    return table


def _explanation(machine: Machine) -> str:
    speeds = f"{machine.cpu / 1e9:.3g} GFLOP/s a CPU (half of a matrix product measured now)"
    if machine.gpus:
        speeds = f"{GPU_SPEED / 1e12:.3g} TFLOP/s a GPU (published runs, H100) and {speeds}"
    return (
        f"Times are estimates: floating-point operations at {speeds}, one piece of work after another. Reading text, "
        "loading models and starting Ray come on top."
    )


def _on_hub(config: RunConfig) -> bool:
    """Whether the model is one that another machine may well reach: not a directory, not a package."""
    return "/" in config.model.source and not config.model.source.startswith(("gguf:", ".", "/", "~", "$"))


def _about(seconds: float | None) -> str:
    """A duration that claims no more than an estimate can."""
    if seconds is None:
        return "–"
    if seconds < 1:
        return f"< 1{NBSP}s"
    if seconds < 60:
        return f"{seconds:.0f}{NBSP}s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes}{NBSP}min"
    return f"{minutes // 60}{NBSP}h" if minutes >= 600 else f"{minutes // 60}{NBSP}h {minutes % 60}{NBSP}min"


def _bytes(number: float | None) -> str:
    if number is None:
        return "–"
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= size:
            return f"{number / size:.3g}{NBSP}{unit}"
    return f"{number:.0f}{NBSP}B"
