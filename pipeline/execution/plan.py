"""From a recipe to all work of a run. Nothing here starts anything or reads a corpus."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from leap.methods import LayerScope
from pipeline.config import LearnConfig, Method, RunConfig
from pipeline.config.paths import expand_variables
from pipeline.data import corpora, fallbacks
from pipeline.errors import UserError
from pipeline.model import loading
from pipeline.stages.benchmark import Benchmark
from pipeline.stages.calibrate import Calibrate
from pipeline.stages.evaluate import Cell, Cloze, Samples, TaskAccuracy, TextPerplexity
from pipeline.stages.harden import Harden
from pipeline.stages.learn import Learn
from pipeline.stages.mask_map import MaskMap
from pipeline.stages.planned import Plan
from pipeline.stages.prior import Prior, PriorKey
from pipeline.stages.reconstruct import Reconstruct
from pipeline.stages.source import MaskSource
from pipeline.stages.stage import PinnedModel
from pipeline.stages.variant import Variant


def make_plan(config: RunConfig) -> Plan:
    """All work of a run.

    Raises:
        UserError: the model or a file does not exist.
    """
    config, notes = fallbacks.resolve(config)
    return _Planner(config).plan(notes)


class _Planner:
    """Makes the pieces of work of one recipe; what several others need is made once."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        output = config.output if "://" in config.output else str(Path(config.output).expanduser().resolve())
        self.store = f"{output}/{config.name}"
        self.model = PinnedModel(config.model, loading.identity(config.model))
        self.corpora: dict[str, Calibrate] = {}
        self.priors: dict[PriorKey, Prior] = {}
        self.learns: dict[str, Learn] = {}
        self.reconstructions: list[Reconstruct] = []

    def plan(self, notes: list[str]) -> Plan:
        """All of it, in the order in which it is done."""
        self._pack()
        chosen = self.config.prior
        methods = [(method, scope) for method in chosen.methods for scope in chosen.scopes_of(method)]
        starts = [(c.settings.prior, chosen.start_scope(c.settings)) for c in self.config.learn.values()]
        for method, scope in [*methods, *starts]:
            for sparsity in self.config.sparsities:
                self._prior(method, scope, sparsity)
        variants = [Variant()]
        for sparsity in self.config.sparsities:
            priors = [self._prior(method, scope, sparsity) for method, scope in methods]
            variants += [self._export(prior.row_name, None, sparsity, prior) for prior in priors]
            for name, seed, learned in _learning_runs(self.config):
                variants += self._learned(name, seed, learned, sparsity)
        cloze = self._cloze()
        tasks = {name: (spec, _task_content(self.config, spec)) for name, spec in task_specs(self.config).items()}
        return Plan(
            config=self.config,
            notes=notes,
            stages=[
                *self.corpora.values(),
                *self.priors.values(),
                *self.learns.values(),
                *self.reconstructions,
                *(variant.export for variant in variants if variant.export),
                *([cloze] if cloze else []),
                *(cell for variant in variants for cell in self._cells(variant, tasks, cloze)),
                *self._benchmarks(variants),
            ],
            variants=variants,
        )

    def _pack(self) -> None:
        data = self.config.data
        roles = {**data.evaluation, "heldout": data.heldout, "calibration": data.calibration}
        for role, corpus in roles.items():
            section = f"data.evaluation.{role}" if role in data.evaluation else f"data.{role}"
            try:
                content = corpora.content_key(corpus)
            except UserError as error:
                raise UserError(f"{section}.{error}") from None
            self.corpora[role] = Calibrate(
                store=self.store,
                role=role,
                section=section,
                corpus=corpus,
                content=content,
                data=data,
                model=self.model,
                apart=() if role in data.evaluation else tuple(self.corpora.values()),
                keep_texts=self.config.evaluate.cloze is not None and role == self._first_text,
                least=self.config.least_rows(role),
            )

    @property
    def _first_text(self) -> str:
        return next(iter(self.config.data.evaluation), "heldout")

    def _prior(self, method: Method, scope: LayerScope, sparsity: float) -> Prior:
        if (method, scope, sparsity) not in self.priors:
            self.priors[method, scope, sparsity] = Prior(
                store=self.store,
                model=self.model,
                method=method,
                compared=scope,
                sparsity=sparsity,
                config=self.config.prior,
                calibration=self.corpora["calibration"],
                seed=self.config.seed,
            )
        return self.priors[method, scope, sparsity]

    def _learn(self, name: str, seed: int | None, learned: LearnConfig, sparsity: float) -> Learn:
        """The learning run that serves an entry of ``learn`` at a sparsity."""
        nested = learned.nested and len(self.config.sparsities) > 1
        sparsities = tuple(self.config.sparsities) if nested else (sparsity,)
        settings = learned.settings
        learn = Learn(
            store=self.store,
            model=self.model,
            entry=name,
            config=learned,
            shown_seed=seed,
            sparsities=sparsities,
            seed=self.config.seed,
            # Of several, the highest: its mask loses most by starting elsewhere (docs/log.md).
            prior=self._prior(settings.prior, self.config.prior.start_scope(settings), max(sparsities)),
            calibration=self.corpora["calibration"],
            heldout=self.corpora["heldout"],
        )
        return self.learns.setdefault(learn.name, learn)

    def _learned(self, name: str, seed: int | None, learned: LearnConfig, sparsity: float) -> Iterator[Variant]:
        """The variants of a learning run at one sparsity."""
        learn = self._learn(name, seed, learned, sparsity)
        yield self._export(name, seed, sparsity, learn)
        if name in self.config.reconstruct:
            fitted = Reconstruct(
                store=self.store,
                model=self.model,
                method=f"{name}+weights",
                sparsity=sparsity,
                learned_by=learn,
                config=self.config.prior,
                calibration=self.corpora["calibration"],
                seed=self.config.seed,
            )
            self.reconstructions.append(fitted)
            yield self._export(fitted.method, seed, sparsity, fitted)

    def _export(self, method: str, seed: int | None, sparsity: float, source: MaskSource[Any]) -> Variant:
        return Variant(
            Harden(store=self.store, model=self.model, method=method, seed=seed, sparsity=sparsity, source=source)
        )

    def _cloze(self) -> Cloze | None:
        cloze, seed = self.config.evaluate.cloze, self.config.seed
        text = self.corpora[self._first_text]
        return Cloze(store=self.store, model=self.model, text=text, config=cloze, seed=seed) if cloze else None

    def _cells(
        self, variant: Variant, tasks: dict[str, tuple[str, object]], cloze: Cloze | None
    ) -> Iterator[Cell[Any] | MaskMap]:
        """What is measured of a variant.

        Args:
            tasks: what lm-eval is asked for and what that depends on, by the name of the task.
        """
        config, settings = self.config, self.config.evaluate
        store, model, seed = self.store, self.model, config.seed
        for role in config.data.evaluation:
            text = self.corpora[role]
            yield TextPerplexity(store=store, model=model, variant=variant, text=text, batch_rows=settings.batch_rows)
        if settings.samples and config.data.evaluation:
            text = self.corpora[self._first_text]
            yield Samples(store=store, model=model, variant=variant, text=text, config=settings.samples, seed=seed)
        if variant.export:
            yield MaskMap(store=store, export=variant.export)
        sources: dict[str, tuple[str | Cloze, object]] = {**tasks, **({"cloze": (cloze, None)} if cloze else {})}
        for name, (source, content) in sources.items():
            yield TaskAccuracy(
                store=store,
                model=model,
                variant=variant,
                task=name,
                source=source,
                content=content,
                config=settings,
                seed=seed,
            )

    def _benchmarks(self, variants: list[Variant]) -> Iterator[Benchmark]:
        """Of learned masks, the first of each sparsity and scope: others of one model are as fast within the noise."""
        measured = set()
        for variant in variants:
            kind = (variant.sparsity, variant.scope)
            if self.config.benchmark and variant.export and variant.origin == "learned" and kind not in measured:
                measured.add(kind)
                yield Benchmark(store=self.store, model=self.model, export=variant.export, config=self.config.benchmark)


def _learning_runs(config: RunConfig) -> Iterator[tuple[str, int | None, LearnConfig]]:
    """Entry, seed where it has several, and settings of each learning run at one sparsity."""
    for name, entry in config.learn.items():
        seeds = entry.seeds or [entry.settings.seed]
        for seed in seeds:
            yield name, seed if len(seeds) > 1 else None, entry.with_seed(seed)


def task_specs(config: RunConfig) -> dict[str, str]:
    """What lm-eval is asked for, by the name of each task; none where the local tasks do not exist."""
    directory = task_directory(config)
    if directory is None:
        return {} if config.evaluate.task_directory else {name: name for name in config.evaluate.tasks}
    return {name: f"{directory}/{name}" for name in config.evaluate.tasks}


def _task_content(config: RunConfig, spec: str) -> object:
    """What a task's results depend on besides its name: a local one's files, else the version of lm-eval."""
    if config.evaluate.task_directory is None:
        return version("lm-eval")
    from pipeline.evaluation.tasks import task_content  # lm-eval takes seconds to import

    try:
        return task_content(spec)
    except ValueError:  # there is no such task, which the checks before a run say
        return spec


def task_directory(config: RunConfig) -> Path | None:
    """The directory of local tasks, if it is set and exists."""
    if config.evaluate.task_directory is None:
        return None
    path = Path(expand_variables(config.evaluate.task_directory)).expanduser().resolve()
    return path if path.is_dir() else None
