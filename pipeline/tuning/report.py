"""A search as one page that needs nothing besides itself, and as a table on the terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import yaml
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from pipeline.config import RunConfig
from pipeline.formatting import count, duration, perplexity, short_percent
from pipeline.reporting.html import page
from pipeline.reporting.markup import definitions, details, escape, figure, section, table
from pipeline.reporting.svg import inline_svg
from pipeline.tracking.redaction import redact
from pipeline.tuning import outcome
from pipeline.tuning.confirm import Comparison
from pipeline.tuning.search import Search
from pipeline.tuning.space import Space
from pipeline.tuning.trial_records import Record

#: Rows of the table on the terminal.
SHOWN = 12


@dataclass(frozen=True)
class Summary:
    """A search that has ended."""

    config: RunConfig
    learn: str
    sparsity: float
    space: Space
    search: Search
    trials: Sequence[Record]
    reference: dict[str, Record]
    """The finished trials of the published and of the recipe's own values."""
    winners: Sequence[Record]
    """The best trial, or those that no other one beats on both objectives."""
    recipes: Sequence[str]
    """Files of the winners' recipes."""
    comparisons: Sequence[Comparison] = ()

    def sentences(self) -> list[str]:
        """What was found."""
        ended = {status: sum(t.status == status for t in self.trials) for status in ("finished", "stopped", "failed")}
        text = "{} trials: {finished} finished, {stopped} stopped early, {failed} failed.".format(
            len(self.trials), **ended
        )
        if not self.winners:
            return [text, "No trial finished."]
        best = self.winners[-1] if self.search.options.against == "tokens" else self.winners[0]
        found = [text]
        if self.search.options.against:
            found.append(f"{len(self.winners)} trials are beaten by no other one on both perplexity and cost.")
        else:
            rows = [f"{name} {_ppl(t)} (loss {t.loss:.4f})" for name, t in self.reference.items()]
            beside = f"; {', '.join(rows)}" if rows else ""
            found.append(f"Best held-out perplexity: {_ppl(best)} (loss {best.loss:.4f}), trial {best.number}{beside}.")
        return found + [c.sentence() for c in self.comparisons]


def print_summary(summary: Summary, console: Console) -> None:
    """The table of the best trials and what was found."""
    trials = summary.winners if summary.search.options.against else _ranked(summary.trials)[:SHOWN]
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for header in ("trial", "loss", "perplexity", "tokens", "sparsity", "time", "status"):
        shown.add_column(header, justify="left" if header == "status" else "right")
    for trial in trials:
        shown.add_row(str(trial.number), *_measures(trial), duration(trial.seconds), trial.status)
    console.print(shown)
    for trial in summary.winners:
        values = ", ".join(f"{key} {_value(value)}" for key, value in trial.values.items())
        console.print(f"trial {trial.number}: {values}", highlight=False)
    for sentence in summary.sentences():
        console.print(sentence, soft_wrap=True, highlight=False)


def render(summary: Summary, figures: Mapping[str, Figure]) -> str:
    """The page as text."""
    svgs = {name: inline_svg(drawn, name) for name, drawn in figures.items()}
    body = "\n".join(
        part
        for part in (
            _header(summary),
            _found(summary, svgs),
            _fields(summary, svgs),
            _trials(summary),
            _provenance(summary),
        )
        if part
    )
    return page(f"{summary.config.name}: search {summary.space.name}", body)


def _header(summary: Summary) -> str:
    trials, settings = summary.trials, summary.config.learn[summary.learn].settings
    started = [t.start_up for t in trials if t.start_up is not None]
    steady = [t.seconds for t in trials]
    tiles = [
        (short_percent(summary.sparsity), "sparsity"),
        (str(len(trials)), "trials"),
        (str(settings.steps), "steps at most"),
        (count(settings.steps * settings.batch_rows * summary.config.data.context_length), "tokens at most"),
        (duration(max((t.ended for t in trials), default=0.0)), "of search"),
        (duration(median(steady) if steady else None), "a trial, median"),
        (duration(median(started) if started else None), "of it starting workers, median"),
    ]
    cells = "".join(f"<div><b>{escape(value)}</b>{escape(name)}</div>" for value, name in tiles)
    verdicts = "".join(f'<p class="verdict">{escape(text)}</p>' for text in summary.sentences())
    origin = f"recipe {summary.config.name} · space {summary.space.name} · {time.strftime('%-d %B %Y, %H:%M')}"
    return f"""<header>
<p class="origin">{escape(origin)}</p>
<h1>{escape(f"Search on {summary.config.model.source}")}</h1>
{verdicts}
<p class="done">{escape(summary.space.why)}</p>
<div class="tiles">{cells}</div>
</header>"""


def _found(summary: Summary, svgs: Mapping[str, str]) -> str:
    comparisons = [
        [
            escape(c.text),
            escape(c.other),
            f"{c.gain:.4f}",
            f"{c.spread:.4f}",
            ", ".join(f"{gain:.4f}" for gain in c.gains),
            "yes" if c.larger else "no",
        ]
        for c in summary.comparisons
    ]
    headers = ("text", "winner against", "gain, nats a token", "spread (95 %)", "gain by seed", "gain larger")
    return section(
        "What was found",
        table(headers, comparisons, text_columns=2) if comparisons else "",
        _figure(svgs, "front", "Perplexity against cost. The line joins what no other trial beats on both."),
        _figure(
            svgs, "best-so-far", "Loss of each trial when it ended; pale: stopped early. The line is the best so far."
        ),
        _figure(svgs, "curves", "Loss of each trial while it learned."),
    )


def _fields(summary: Summary, svgs: Mapping[str, str]) -> str:
    step = outcome.common_step(summary.trials)
    at = "" if step is None else f" at step {step + 1}, the last one that all trials reached"
    return section(
        "Which fields matter",
        _figure(
            svgs, "parallel", "Values and loss of the finished trials, the stronger the better; pale: stopped early."
        ),
        _figure(
            svgs,
            "importance",
            f"Share of the differences in held-out loss{at}, by fANOVA over {len(summary.trials)} trials.",
        ),
    )


def _trials(summary: Summary) -> str:
    keys = list(summary.search.domains)
    named = {t.id: name for name, t in summary.reference.items()}
    winners = {t.id for t in summary.winners}
    ranked = _ranked(summary.trials)
    rows = [
        [
            escape(f"{t.number}{f' ({named[t.id]})' if t.id in named else ''}"),
            escape(t.status),
            *map(escape, _measures(t)),
            escape(duration(t.seconds)),
            *(escape(_value(t.values[key])) for key in keys),
        ]
        for t in ranked
    ]
    headers = ("trial", "status", "loss", "perplexity", "tokens", "sparsity", "time", *keys)
    failed = [f"<li>{escape(f'trial {t.number}: {t.error}')}</li>" for t in summary.trials if t.error]
    return section(
        "Trials",
        table(headers, rows, text_columns=2, row_classes=["learned" if t.id in winners else "" for t in ranked]),
        f'<div class="warnings"><b>Failed</b><ul>{"".join(failed)}</ul></div>' if failed else "",
    )


def _provenance(summary: Summary) -> str:
    search = summary.search
    asked = {
        "proposed by": search.options.proposer,
        "stopped early by": "ASHA" if search.stops_early else "nobody",
        "second objective": search.options.against or "none",
        "domains": {key: str(domain) for key, domain in search.domains.items()},
    }
    return section(
        "Provenance",
        definitions([("recipe of a winner", path) for path in summary.recipes]),
        details("Search", f"<pre>{escape(_yaml(asked))}</pre>"),
        details("Resolved recipe", f"<pre>{escape(_yaml(redact(summary.config.model_dump(mode='json'))))}</pre>"),
    )


def _ranked(trials: Sequence[Record]) -> list[Record]:
    """Finished ones by loss, then those that got less far."""
    done = outcome.finished(trials)
    rest = [t for t in trials if t not in done]
    return done + sorted(rest, key=lambda t: (-(t.steps[-1] if t.steps else -1), t.loss or 0.0))


def _measures(trial: Record) -> list[str]:
    loss = "–" if trial.loss is None else f"{trial.loss:.4f}"
    return [loss, _ppl(trial), count(trial.tokens or None), short_percent(trial.sparsity) if trial.sparsity else "–"]


def _ppl(trial: Record) -> str:
    return perplexity(trial.perplexity)


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _figure(svgs: Mapping[str, str], name: str, caption: str) -> str:
    return figure(svgs[name], caption) if name in svgs else ""


def _yaml(data: Any) -> str:
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=110)
