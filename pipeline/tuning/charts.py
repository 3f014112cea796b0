"""The figures of a search."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import median
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from pipeline import formatting
from pipeline.reporting import theme
from pipeline.reporting.svg import tooltip
from pipeline.reporting.theme import ACCENT, FAINT, GROUND, INK, LINE, MUTED, SECOND
from pipeline.tuning import outcome
from pipeline.tuning.domains import Choice, Domain, Span
from pipeline.tuning.search import Cost
from pipeline.tuning.trial_records import Record

LOSS_LABEL = "held-out loss, hard mask (nats per token)"
#: Space between the names beside lines, as a fraction of the height.
LABEL_GAP = 0.06
#: The axis of the loss reaches from the best trial so many times as far as the median.
REACH = 3


def make_figures(
    trials: Sequence[Record], domains: dict[str, Domain], reference: dict[str, Record], against: Cost | None
) -> dict[str, Figure]:
    """The figures that the trials allow, by name.

    Args:
        reference: finished trials that others are compared with, by what they are called.
    """
    with matplotlib.rc_context(theme.STYLE):
        figures = {
            "best-so-far": best_so_far(trials, reference),
            "curves": curves(trials),
            "parallel": parallel(trials, domains),
            "importance": importance(trials, domains),
            "front": front(trials, against) if against else None,
        }
    return {name: figure for name, figure in figures.items() if figure is not None}


def best_so_far(trials: Sequence[Record], reference: dict[str, Record]) -> Figure | None:
    """The loss of each trial at the time it ended, and the best up to then."""
    done = sorted(outcome.finished(trials), key=lambda t: t.ended)
    if not done:
        return None
    figure, axes = _axes(3.2)
    unit, size = ("hours", 3600) if done[-1].ended >= 2 * 3600 else ("minutes", 60)
    for trial in done:
        _dot(axes, trial.ended / size, trial.loss, trial, ACCENT)
    best = [min(t.loss or 0.0 for t in done[: i + 1]) for i in range(len(done))]
    axes.step([t.ended / size for t in done], best, where="post", color=ACCENT)
    low, high = axes.get_ylim()
    for trial in trials:
        if trial.status == "stopped" and trial.loss is not None:
            # Stopped trials have a loss of their own time only; those above the picture lie on its edge.
            _dot(axes, trial.ended / size, min(trial.loss, high), trial, FAINT)
    axes.set_ylim(low, high)
    axes.set_xlim(0, axes.get_xlim()[1])
    axes.set_xlabel(f"{unit} of search")
    axes.set_ylabel(LOSS_LABEL)
    ends = [("best so far", best[-1], ACCENT)]
    for name, trial in reference.items():
        axes.axhline(trial.loss or 0.0, color=FAINT, linewidth=1, linestyle=(0, (3, 3)), zorder=0)
        ends.append((name, trial.loss or 0.0, MUTED))
    _label_ends(axes, ends)
    return figure


def curves(trials: Sequence[Record]) -> Figure | None:
    """The loss of each trial while it learned: what stopping early is decided on."""
    shown = [t for t in trials if t.steps]
    if not shown:
        return None
    done = outcome.finished(trials)
    figure, axes = _axes(3.2)
    for trial in shown:
        best = bool(done) and trial is done[0]
        colour = SECOND if best else ACCENT if trial.status == "finished" else FAINT
        (line,) = axes.plot([s + 1 for s in trial.steps], trial.losses, color=colour, alpha=1 if best else 0.7)
        line.set(linewidth=2.2 if best else 0.9, zorder=3 if best else 2)
        line.set(marker="o" if len(trial.steps) == 1 else "", markersize=3)
        line.set_gid(tooltip(_describe(trial)))
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel(LOSS_LABEL)
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.yaxis.set_minor_formatter(lambda y, _: f"{y:g}")
    for text, colour, at in (("best", SECOND, 0.95), ("finished", ACCENT, 0.88), ("stopped early", FAINT, 0.81)):
        axes.text(0.98, at, text, transform=axes.transAxes, ha="right", color=colour if colour != FAINT else MUTED)
    return figure


def parallel(trials: Sequence[Record], domains: dict[str, Domain]) -> Figure | None:
    """A vertical axis for each field and one for the loss; each trial is a line through its values."""
    done = outcome.finished(trials)
    if not done:
        return None
    figure, axes = _axes(4.4)
    losses = [t.loss or 0.0 for t in done]
    # A few bad trials would press all others together: what lies far beyond the median is drawn at the upper end.
    best_loss, reach = losses[0], REACH * (median(losses) - losses[0])
    worst = min(losses[-1], best_loss + reach) if reach else losses[-1]
    ends = Span(best_loss, worst) if worst > best_loss else None
    columns = list(domains)
    for trial in sorted(trials, key=lambda t: (t.status == "finished", -(t.loss or 0.0))):
        heights = [domains[key].position(trial.values[key]) for key in columns]
        best = trial is done[0]
        if trial.status == "finished":
            place = ends.position(min(trial.loss or 0.0, worst)) if ends else 0.5
            # The better, the stronger.
            (line,) = axes.plot([*heights, place], color=SECOND if best else ACCENT)
            # By rank: a single bad trial would make all others look alike.
            line.set(alpha=1 - 0.85 * done.index(trial) / len(done), linewidth=2.4 if best else 1.1)
        else:
            (line,) = axes.plot(heights, color=FAINT, linewidth=0.6, alpha=0.6)
        line.set_gid(tooltip(_describe(trial)))
    for x, key in enumerate(columns):
        _ticks(axes, x, domains[key])
    beyond = "≥ " if worst < losses[-1] else ""
    axes.text(len(columns), 1.02, f"{beyond}{worst:.3f}", ha="center", fontsize=8, color=MUTED)
    axes.text(len(columns), -0.02, f"{best_loss:.3f}", ha="center", va="top", fontsize=8, color=MUTED)
    for x in range(len(columns) + 1):
        axes.axvline(x, color=LINE, linewidth=1, zorder=0)
    names = [*columns, "held-out loss"]
    axes.set_xticks(range(len(names)), [re.sub("[._ ]", "\n", name) for name in names], fontsize=8 - len(names) / 12)
    axes.tick_params(axis="x", length=0, pad=14)
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set_ylim(-0.02, 1.02)
    return figure


def importance(trials: Sequence[Record], domains: dict[str, Domain]) -> Figure | None:
    """How much of the differences between trials each field explains."""
    found = outcome.importance(trials, domains)
    if not found:
        return None
    figure, axes = _axes(0.9 + 0.26 * len(found))
    for y, share in enumerate(found.values()):
        axes.barh(y, 100 * share, height=0.62, color=ACCENT, linewidth=0)
        axes.annotate(
            f"{100 * share:.0f} %", (100 * share, y), (5, 0), textcoords="offset points", va="center", color=INK
        )
    axes.set_yticks(range(len(found)), list(found))
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.set_xlim(0, 112 * max(found.values()))
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("% of the variance of the loss")
    return figure


def front(trials: Sequence[Record], against: Cost) -> Figure | None:
    """Perplexity against what it costs; the line joins the trials that no other one beats on both."""
    done, best = outcome.finished(trials), outcome.front(trials, against)
    if not done:
        return None

    def cost(trial: Record) -> float:
        return trial.tokens if against == "tokens" else 100 * trial.sparsity

    figure, axes = _axes(3.6)
    for trial in done:
        _dot(axes, cost(trial), trial.perplexity, trial, ACCENT if trial in best else FAINT)
    line = sorted((cost(t), t.perplexity or 0.0, t.number) for t in best)
    axes.plot([x for x, _, _ in line], [y for _, y, _ in line], color=ACCENT)
    for x, y, number in line:
        axes.annotate(
            f"trial {number}: {formatting.perplexity(y)}", (x, y), (6, -10),
            textcoords="offset points", fontsize=8.5, color=INK,
        )  # fmt: skip
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.yaxis.set_minor_formatter(lambda y, _: f"{y:g}")
    axes.margins(x=0.12)
    if against == "tokens":
        axes.xaxis.set_major_formatter(lambda x, _: formatting.count(x))
    axes.set_xlabel("tokens learned from" if against == "tokens" else "% of weights removed")
    axes.set_ylabel("held-out perplexity, hard mask")
    return figure


def _axes(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(10, height), layout="constrained")
    axes = figure.subplots()
    axes.xaxis.set_major_locator(MaxNLocator(8))
    return figure, axes


def _dot(axes: Axes, x: float, y: Any, trial: Record, colour: str) -> None:
    (dot,) = axes.plot([x], [y], marker="o", markersize=5, color=colour, linestyle="")
    dot.set_gid(tooltip(_describe(trial)))


def _describe(trial: Record) -> str:
    values = ", ".join(
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in trial.values.items()
    )
    loss = "" if trial.loss is None else f", loss {trial.loss:.4f} at step {trial.steps[-1] + 1}"
    return f"trial {trial.number}, {trial.status}{loss}: {values}"


def _ticks(axes: Axes, x: int, domain: Domain) -> None:
    if isinstance(domain, Choice):
        for value in domain.values:
            text = axes.text(x + 0.04, domain.position(value), str(value), va="center", fontsize=7.5, color=MUTED)
            text.set_path_effects([withStroke(linewidth=3, foreground=GROUND)])
        return
    axes.text(x, 1.02, f"{domain.high:g}", ha="center", fontsize=8, color=MUTED)
    axes.text(x, -0.02, f"{domain.low:g}", ha="center", va="top", fontsize=8, color=MUTED)


def _label_ends(axes: Axes, ends: list[tuple[str, float, str]]) -> None:
    low, high = axes.get_ylim()
    floor = 0.0
    for name, value, colour in sorted(ends, key=lambda end: end[1]):
        if low <= value <= high:
            height = max((value - low) / (high - low), floor)
            axes.annotate(name, (1.01, height), xycoords="axes fraction", va="center", fontsize=8.5, color=colour)
            floor = height + LABEL_GAP
