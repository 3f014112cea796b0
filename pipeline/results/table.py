"""The table of results: every variant, the mean over seeds, and the differences between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev

from pipeline.evaluation.scores import Sample, ZeroShot
from pipeline.evaluation.speed import DecodeSpeed, Speed
from pipeline.results import differences, schema
from pipeline.results.measurements import Measured, mean
from pipeline.results.row import Row
from pipeline.stages.harden import Exported
from pipeline.stages.mask_map import Tiles
from pipeline.stages.variant import Variant


@dataclass(frozen=True)
class Finding:
    """What a run found of one variant."""

    variant: Variant
    measured: Measured
    export: Exported | None = None
    seconds: float | None = None
    """Time to make the mask."""
    mask_map: Tiles | None = None
    samples: Sequence[Sample] | None = None
    speed: Speed | None = None


@dataclass(frozen=True)
class Table:
    rows: list[Row]
    chance: dict[str, float]
    """Accuracy of guessing, by task."""
    clear: list[str]
    """The tasks on which the dense model is clearly above it."""


def make_table(findings: Sequence[Finding], share: float, dtype: str) -> Table:
    """The table of a run.

    Args:
        findings: of the dense model, then of the pruned ones.
        share: of the decoder blocks' weights that is prunable.
        dtype: the model's own: a variant's tokens a second are those in it, where they were measured.
    """
    dense, *pruned = findings
    clear = differences.clear_tasks(dense.measured.tasks)
    rows = _Rows(dense, pruned, clear, share, dtype)
    return Table(
        rows=[rows.dense(), *(row for group in _by_method(pruned) for row in rows.of_group(group))],
        chance={task: scored["chance"] for task, scored in dense.measured.tasks.items()},
        clear=clear,
    )


class _Rows:
    def __init__(self, dense: Finding, pruned: Sequence[Finding], clear: list[str], share: float, dtype: str) -> None:
        self._dense, self._pruned, self._clear, self._share, self._dtype = dense, pruned, clear, share, dtype

    def dense(self) -> Row:
        """The row of the model as it was. It was measured beside each variant: its speed is the median."""
        speeds = [self._decode(finding.speed)["dense"] for finding in self._pruned if finding.speed]
        return Row(
            name=self._dense.variant.name,
            method=self._dense.variant.method,
            origin=self._dense.variant.origin,
            target_sparsity=None,
            real_sparsity=0.0,
            block_sparsity=0.0,
            scope="",
            weights_changed=False,
            training_tokens=0,
            decode_tokens_per_second=median(speed["tokens_per_second"] for speed in speeds) if speeds else None,
            samples=self._dense.samples,
            **self._scores(self._dense.measured),
        )

    def of_group(self, group: list[Finding]) -> list[Row]:
        """The rows of variants that differ in their seed alone: of several, their mean comes first."""
        if len(group) == 1:
            return [self._of(group[0])]
        name = f"{group[0].variant.method}@{group[0].variant.sparsity:g}"
        members = [self._of(finding, mean=name) for finding in group]
        return [self._mean(name, group, members), *members]

    def _of(self, finding: Finding, mean: str | None = None) -> Row:
        variant, export = finding.variant, finding.export
        assert variant.export is not None
        assert export is not None
        speed = finding.speed if mean is None else None  # stands in the row of the mean
        learn = variant.learned
        return Row(
            name=variant.name,
            method=variant.method,
            origin=variant.origin,
            target_sparsity=variant.sparsity,
            real_sparsity=export.real_sparsity,
            block_sparsity=export.real_sparsity * self._share,
            scope=variant.scope,
            weights_changed=export.weights_changed,
            training_tokens=learn.tokens if learn else 0,
            seed=learn.config.settings.seed if learn else None,
            mean=mean,
            seconds=finding.seconds,
            speed=speed,
            decode_tokens_per_second=self._decode(speed)["sparse"]["tokens_per_second"] if speed else None,
            directory=variant.export.directory.uri_of(),
            sparsity_per_layer=export.sparsity_per_layer,
            mask_map=finding.mask_map,
            samples=finding.samples,
            **self._scores(finding.measured),
            **self._compared(variant, finding.measured),
        )

    def _mean(self, name: str, group: list[Finding], members: list[Row]) -> Row:
        """The mean over seeds; its speed is that of the seed that was measured."""
        first, together = members[0], mean([finding.measured for finding in group])
        real = fmean(row.real_sparsity for row in members)
        speed = next((finding.speed for finding in group if finding.speed), None)
        return Row(
            name=name,
            method=first.method,
            origin=first.origin,
            target_sparsity=first.target_sparsity,
            real_sparsity=real,
            block_sparsity=real * self._share,
            scope=first.scope,
            weights_changed=first.weights_changed,
            training_tokens=first.training_tokens,
            seeds=[finding.variant.seed or 0 for finding in group],
            spread=_spread(members),
            seconds=fmean(row.seconds or 0.0 for row in members),
            speed=speed,
            decode_tokens_per_second=self._decode(speed)["sparse"]["tokens_per_second"] if speed else None,
            **self._scores(together),
            **self._compared(group[0].variant, together),
        )

    def _decode(self, speed: Speed) -> DecodeSpeed:
        return speed["decode"].get(self._dtype) or next(iter(speed["decode"].values()))

    def _scores(self, measured: Measured) -> schema.Scores:
        return schema.Scores(
            perplexity={
                text: schema.Perplexity(
                    perplexity=scored["perplexity"], stderr_nll=scored["nll_stderr"] or 0.0, tokens=scored["tokens"]
                )
                for text, scored in measured.texts.items()
            },
            tasks={
                task: schema.TaskAccuracy(
                    acc=scored["metrics"]["acc"] or 0.0,
                    acc_stderr=scored["metrics"]["acc_stderr"],
                    documents=scored["documents"],
                )
                for task, scored in measured.tasks.items()
            },
            mean_accuracy=_mean_accuracy(list(measured.tasks.values())),
            mean_above_chance=_mean_accuracy([measured.tasks[task] for task in self._clear]),
        )

    def _compared(self, variant: Variant, measured: Measured) -> schema.Compared:
        """A variant, or a mean over its seeds, against those that it has to be better than."""
        layer_wise = {
            other.variant.name: other
            for other in self._pruned
            if other.variant.sparsity == variant.sparsity and other.variant.origin == "layer-wise"
        }
        if variant.origin == "layer-wise":
            rival, bases = None, []
        else:
            rival = differences.best({name: other.measured for name, other in layer_wise.items()})
            # ADMM is what the published figures are compared with, whether or not it is the best here.
            of_admm = [other for other in layer_wise.values() if other.variant.layer_wise_method == "admm"]
            admm = differences.best({other.variant.name: other.measured for other in of_admm})
            bases = [layer_wise[name] for name in dict.fromkeys((rival, admm)) if name]
        dense = self._dense.measured
        against = {
            base.variant.name: differences.difference(dense, base.measured, measured, self._clear) for base in bases
        }
        against[self._dense.variant.name] = differences.difference(None, dense, measured, self._clear)
        return schema.Compared(rival=rival, against=against)


def _by_method(findings: Sequence[Finding]) -> list[list[Finding]]:
    """Variants that differ in their seed alone stand together, where the first of them was."""
    groups: dict[tuple[str, float | None], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.variant.method, finding.variant.sparsity), []).append(finding)
    return list(groups.values())


def _spread(members: Sequence[Row]) -> schema.Spread:
    """Standard deviations between seeds: of the nll by text, of the accuracy by task and of its mean."""
    first = members[0]
    spread = schema.Spread(
        nll={text: stdev(math.log(row.perplexity[text]["perplexity"]) for row in members) for text in first.perplexity},
        tasks={task: stdev(row.tasks[task]["acc"] for row in members) for task in first.tasks},
    )
    if first.mean_accuracy:
        spread["mean_accuracy"] = stdev(row.mean_accuracy["acc"] for row in members if row.mean_accuracy)
    if first.mean_above_chance:
        spread["mean_above_chance"] = stdev(row.mean_above_chance["acc"] for row in members if row.mean_above_chance)
    return spread


def _mean_accuracy(tasks: Sequence[ZeroShot]) -> schema.MeanAccuracy | None:
    if not tasks:
        return None
    errors = [task["metrics"]["acc_stderr"] or 0.0 for task in tasks]
    mean_of_tasks = fmean(task["metrics"]["acc"] or 0.0 for task in tasks)
    return schema.MeanAccuracy(acc=mean_of_tasks, stderr=math.sqrt(sum(e * e for e in errors)) / len(errors))
