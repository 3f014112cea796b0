"""What the command line shows of a run without starting it: what it will consist of, and what it will cost."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline import estimate, preflight
from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.plan import Measurement, Plan, make_plan
from pipeline.redaction import redact
from pipeline.reporting.formatting import NBSP, count
from pipeline.sizes import Sizes, measure
from pipeline.storage import StageDir
from pipeline.text_tables import plain_table, sparsities

#: A piece of work on one line of the plan: what it is, its stages, bytes it will write, seconds it will take.
Line = tuple[str, str, list[StageDir], float | None, float | None]


def show_plan(config: RunConfig) -> None:
    """Stages, what is finished, disk, memory, tokens and an estimate of the time. Starts nothing.

    Raises:
        UserError: the run would not start; what could be found out is printed before.
    """
    console = Console()
    plan = make_plan(config)
    config = plan.config
    trouble: UserError | None = None
    try:
        sizes = measure(config)
    except UserError as error:
        sizes, trouble = None, error
    _head(console, plan, sizes)
    cpu = estimate.EFFICIENCY * estimate.cpu_speed(1, config.model.dtype) if sizes else 0.0
    lines = list(_lines(plan, sizes, cpu))
    console.print(_stage_table(lines))
    if config.learn:
        console.print()
        console.print(_learn_table(config, sizes))
    console.print()
    if sizes is None:
        if not _on_hub(config):
            raise trouble or AssertionError
        text = f"model.source: the configuration of {config.model.source} cannot be read from here; no sizes, no times."
        console.print(Text(text, style="yellow"), soft_wrap=True)
        return
    console.print(Text(_explanation(config, cpu), style="dim"))
    for warning in preflight.check(plan)[1]:
        console.print(Text.assemble(("warning: ", "bold yellow"), redact(warning)))


def _head(console: Console, plan: Plan, sizes: Sizes | None) -> None:
    config = plan.config
    known = f", {count(sizes.parameters)} parameters, {sizes.weights}" if sizes else ""
    console.print(Text.assemble((config.name, "bold"), f": {config.model.source}, {config.model.dtype}{known}"))
    console.print(f"sparsities {sparsities(config)}, context of {config.data.context_length} tokens")
    console.print(Text(redact(f"results in {plan.directory}")), soft_wrap=True)
    console.print()


def _lines(plan: Plan, sizes: Sizes | None, cpu: float) -> Iterable[Line]:
    """The plan in the order in which it is worked off."""
    config = plan.config
    for stage, corpus, _ in plan.corpora.values():
        yield "calibrate", f"{stage.item}, {count(corpus.tokens)} tokens", [stage], 4.0 * corpus.tokens, None
    for (method, *_), stage in plan.priors.items():
        written = preflight.prior_bytes(method, sizes) if sizes else None
        seconds = estimate.prior_seconds(config, method, sizes, cpu) if sizes else None
        yield "prior", stage.item, [stage], written, seconds
    for work in plan.learns:
        written = preflight.learn_bytes(sizes) if sizes else None
        seconds = estimate.learn_seconds(config, work.config, sizes, cpu) if sizes else None
        yield "learn", work.stage.item, [work.stage], written, seconds
    for fit in plan.reconstructions:
        written = preflight.reconstruct_bytes(sizes) if sizes else None
        seconds = estimate.reconstruct_seconds(config, sizes, cpu) if sizes else None
        yield "reconstruct", fit.stage.item, [fit.stage], written, seconds
    for variant in plan.variants:
        if variant.export:
            yield "harden", variant.export.item, [variant.export], sizes.export if sizes else None, None
    if plan.cloze:
        yield "cloze", "", [plan.cloze], None, None
    for variant in plan.variants:
        cells = [m for m in plan.measurements if m.variant is variant]
        seconds = _evaluation_seconds(config, cells, sizes, cpu)
        yield "evaluate", variant.name, [m.stage for m in cells], None, seconds

    for speed in plan.speeds:
        yield (
            "benchmark",
            speed.stage.item,
            [speed.stage],
            None,
            estimate.benchmark_seconds(config, sizes) if sizes else None,
        )


def _evaluation_seconds(config: RunConfig, cells: list[Measurement], sizes: Sizes | None, cpu: float) -> float | None:
    if sizes is None:
        return None
    seconds = [estimate.evaluate_seconds(config, cell, sizes, cpu) for cell in cells]
    return None if None in seconds else sum(s for s in seconds if s is not None)


def _stage_table(lines: list[Line]) -> Table:
    table = plain_table("stage", "item", "state", ">disk", ">time, about")
    previous, total_bytes, total_seconds = "", 0.0, 0.0
    for stage, item, pieces, written, seconds in lines:
        done = sum(piece.manifest() is not None for piece in pieces)
        state = Text("finished", style="green") if done == len(pieces) else Text(f"{done} of {len(pieces)} done")
        if not done:
            state = Text("to do" if len(pieces) == 1 else f"{len(pieces)} to do")
        if done < len(pieces):
            total_bytes += written or 0
            total_seconds += (seconds or 0) * (1 - done / len(pieces))
        table.add_row(stage if stage != previous else "", item, state, _bytes(written), _about(seconds))
        previous = stage
    if total_seconds:
        table.add_row()
        table.add_row("still to do", "", "", _bytes(total_bytes), _about(total_seconds), style="bold")
    return table


def _learn_table(config: RunConfig, sizes: Sizes | None) -> Table:
    """A column for each entry of ``learn``; of more than four, a row for each."""
    runs = list(config.learn.values())
    rows_there = -(-config.data.calibration.tokens // config.data.context_length)
    passes = (r.settings.steps * r.settings.batch_rows / rows_there for r in runs)
    facts = {
        "steps": [count(r.settings.steps) for r in runs],
        "rows a step": [count(r.settings.batch_rows) for r in runs],
        "tokens in all": [count(estimate.training_tokens(config, r)) for r in runs],
        "passes over the text": [f"{p:.2g}" for p in passes],
        "workers": [f"{r.workers} {'GPU' if r.gpu else f'× {r.threads} CPU'}" for r in runs],
    }
    memory = [estimate.worker_memory(config, r, sizes) for r in runs] if sizes else []
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


def _explanation(config: RunConfig, cpu: float) -> str:
    speeds = f"{cpu / 1e9:.3g} GFLOP/s a CPU (half of a matrix product measured now)"
    if any(learn.gpu for learn in config.learn.values()):
        speeds = f"{estimate.GPU_SPEED / 1e12:.3g} TFLOP/s a GPU (published runs, H100) and {speeds}"
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
