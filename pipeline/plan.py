"""What a run consists of: every piece of work, what it depends on, and where its result lies.

A piece's fingerprint covers its settings, its inputs' fingerprints and the version of its code. Nothing here starts
anything or reads a corpus.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from leap.layerwise import METHODS
from leap.scopes import LayerScope
from pipeline import corpora, fallbacks, models
from pipeline.config import CorpusConfig, LearnConfig, Method, RunConfig
from pipeline.errors import UserError
from pipeline.origin import BY_STAGE, Origin
from pipeline.paths import expand_variables
from pipeline.stages import benchmark, calibrate, evaluate, harden, learn, mask_map, prior
from pipeline.storage import StageDir, fingerprint

#: Settings of a learning run that do not change what it learns.
_FREE = {
    "like",
    "published",
    "seeds",
    "workers",
    "threads",
    "gpu",
    "activation_checkpointing",
    "checkpoint_every",
    "max_failures",
}


#: Method, within what it compares weights, sparsity.
PriorKey = tuple[str, LayerScope, float]


@dataclass(frozen=True)
class Variant:
    """A row of the table."""

    method: str
    sparsity: float | None = None
    scope: str = ""
    export: StageDir | None = None
    made_by: StageDir | None = None
    """The prior, learn or reconstruct stage that the mask comes from."""
    seed: int | None = None
    """Of the learning run, where there are others that differ in nothing else."""
    weights: StageDir | None = None
    """The prior stage whose new weights the mask was learned over; None for the dense ones."""

    @property
    def name(self) -> str:
        return variant_name(self.method, self.seed, self.sparsity)

    @property
    def origin(self) -> Origin:
        """How it comes about."""
        return BY_STAGE[self.made_by.stage] if self.made_by else "dense"


@dataclass(frozen=True)
class LearnWork:
    stage: StageDir
    name: str
    sparsities: tuple[float, ...]
    """Several for a nested run."""
    config: LearnConfig
    prior: StageDir
    seed: int | None = None
    """Of the run, where there are others that differ in nothing else."""


@dataclass(frozen=True)
class Reconstruction:
    """New weights for a learned mask."""

    stage: StageDir
    learned: LearnWork
    sparsity: float


@dataclass(frozen=True)
class Measurement:
    """One cell of the table: a variant on a text or a task."""

    stage: StageDir
    variant: Variant
    kind: str
    """``perplexity``, ``task``, ``samples`` (generated text) or ``map`` (of where the mask has its zeros)."""
    subject: str
    """Name of the text or the task."""
    spec: str = ""
    """What lm-eval is asked for."""


@dataclass(frozen=True)
class SpeedWork:
    """How fast a variant is."""

    stage: StageDir
    variant: Variant


@dataclass
class Plan:
    config: RunConfig
    """With the embedded text in place of files that do not exist."""
    notes: list[str] = field(default_factory=list)
    """What a user has to be told of that."""
    corpora: dict[str, tuple[StageDir, CorpusConfig, list[str]]] = field(default_factory=dict)
    """By role: stage, settings, roles it must share no document with; in the order they have to be made."""
    priors: dict[PriorKey, StageDir] = field(default_factory=dict)
    learns: list[LearnWork] = field(default_factory=list)
    reconstructions: list[Reconstruction] = field(default_factory=list)
    cloze: StageDir | None = None
    variants: list[Variant] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)
    speeds: list[SpeedWork] = field(default_factory=list)

    @property
    def stages(self) -> list[StageDir]:
        """All pieces of work in order."""
        return [
            *(stage for stage, _, _ in self.corpora.values()),
            *self.priors.values(),
            *(work.stage for work in self.learns),
            *(work.stage for work in self.reconstructions),
            *(v.export for v in self.variants if v.export),
            *([self.cloze] if self.cloze else []),
            *(m.stage for m in self.measurements),
            *(work.stage for work in self.speeds),
        ]

    def learned(self, variant: Variant) -> LearnWork | None:
        """The learning run that a variant's mask comes from, if it was learned."""
        origins = {work.stage: work for work in self.learns}
        origins |= {work.stage: work.learned for work in self.reconstructions}
        return origins.get(variant.made_by) if variant.made_by else None

    @property
    def directory(self) -> str:
        """Where the run keeps its own records and its report."""
        return f"{self.config.output.rstrip('/')}/{self.config.name}"


def make_plan(config: RunConfig) -> Plan:
    """All work of a run.

    Raises:
        UserError: the model or a file does not exist.
    """
    config, notes = fallbacks.resolve(config)
    plan = Plan(config, notes)
    uri = config.output if "://" in config.output else str(Path(config.output).expanduser().resolve())
    uri = f"{uri}/{config.name}"
    identity = models.identity(config.model)
    model = [identity, config.model.dtype]

    def place(stage: str, item: str, *parts: object) -> StageDir:
        return StageDir(uri, stage, item, fingerprint(stage, item, *parts))

    roles = {**config.data.evaluation, "heldout": config.data.heldout, "calibration": config.data.calibration}
    documents: dict[str, str] = {}
    for role, corpus in roles.items():
        apart = [other for other in plan.corpora if role not in config.data.evaluation]
        try:
            content = corpora.content_key(corpus)
        except UserError as error:
            raise UserError(f"data.{corpus_key(config, role)}.{error}") from None
        key = [corpus, content, config.data.context_length, [documents[other] for other in apart]]
        # Keeping the texts for a cloze task changes the artifact, not what others have to stay apart from.
        documents[role] = fingerprint(identity, key)
        keep_texts = config.evaluate.cloze is not None and role == _first_text(config)
        stage = place("calibrate", role, calibrate.VERSION, identity, key, keep_texts)
        plan.corpora[role] = (stage, corpus, apart)
    calibration, heldout = plan.corpora["calibration"][0], plan.corpora["heldout"][0]

    methods: list[tuple[Method, LayerScope]] = [(m, s) for m in config.prior.methods for s in config.prior.scopes_of(m)]
    starts: list[tuple[Method, LayerScope]] = [
        (c.settings.prior, config.prior.start_scope(c.settings)) for c in config.learn.values()
    ]
    wanted = [(m, scope, s) for some in (methods, starts) for m, scope in some for s in config.sparsities]
    rows = [calibration.key, config.prior.rows, config.prior.batch_rows, config.seed]
    for method, scope, sparsity in dict.fromkeys(wanted):
        inputs = rows if METHODS[method].needs != "none" else []
        asked = [sparsity, config.prior.scope_name(method, scope), config.prior.options.get(method, {})]
        key = [prior.VERSION, model, method, asked, inputs]
        name = variant_name(config.prior.row_name(method, scope), None, sparsity)
        plan.priors[method, scope, sparsity] = place("prior", name, *key)

    def learn_work(name: str, seed: int | None, learned: LearnConfig, sparsity: float) -> LearnWork:
        """The learning run that serves an entry of ``learn`` at a sparsity."""
        nested = learned.nested and len(config.sparsities) > 1
        sparsities = tuple(config.sparsities) if nested else (sparsity,)
        # Of several, the highest: its mask loses most by starting elsewhere (docs/log.md).
        settings = learned.settings
        start = plan.priors[settings.prior, config.prior.start_scope(settings), max(sparsities)]
        decisive = learned.model_dump(mode="json", exclude=_FREE)
        key = [model, decisive, sparsities, config.seed, start.key, calibration.key, heldout.key]
        stage = place("learn", variant_name(name, seed, None if nested else sparsity), learn.VERSION, *key)
        return LearnWork(stage, name, sparsities, learned, start, seed)

    plan.variants.append(Variant("dense"))
    for sparsity in config.sparsities:
        for method, scope in methods:
            made = plan.priors[method, scope, sparsity]
            row = config.prior.row_name(method, scope)
            export = place("harden", variant_name(row, None, sparsity), harden.VERSION, made.key)
            plan.variants.append(Variant(row, sparsity, config.prior.scope_name(method, scope), export, made))
        for name, seed, learned in _learning_runs(config):
            work = learn_work(name, seed, learned, sparsity)
            if work not in plan.learns:
                plan.learns.append(work)
            made_by = {name: work.stage}
            if name in config.reconstruct:
                key = [prior.VERSION, work.stage.key, rows]
                fitted = place("reconstruct", variant_name(f"{name}+weights", seed, sparsity), *key)
                plan.reconstructions.append(Reconstruction(fitted, work, sparsity))
                made_by[f"{name}+weights"] = fitted
            for row, made in made_by.items():
                export = place("harden", variant_name(row, seed, sparsity), harden.VERSION, made.key)
                over = work.prior if learned.settings.weights == "prior" else None
                plan.variants.append(Variant(row, sparsity, learned.settings.scope, export, made, seed, over))
    _plan_measurements(plan, place, model)
    if config.benchmark:
        # Learned masks, the first of each sparsity and scope: others of one model are as fast within the noise.
        measured = set()
        for variant in plan.variants:
            kind = (variant.sparsity, variant.scope)
            has_learned_mask = variant.made_by is not None and variant.made_by.stage == "learn"
            if variant.export and has_learned_mask and kind not in measured:
                measured.add(kind)
                key = [benchmark.VERSION, variant.export.key, config.benchmark]
                plan.speeds.append(SpeedWork(place("benchmark", variant.name, *key), variant))
    return plan


def _learning_runs(config: RunConfig) -> Iterator[tuple[str, int | None, LearnConfig]]:
    """Entry, seed where it has several, and settings of each learning run at one sparsity."""
    for name, entry in config.learn.items():
        seeds = entry.seeds or [entry.settings.seed]
        for seed in seeds:
            yield name, seed if len(seeds) > 1 else None, entry.with_seed(seed)


def variant_name(method: str, seed: int | None, sparsity: float | None) -> str:
    """Name of a variant and of the work that makes it: ``leap@0.5``, ``leap.seed1@0.5``. A method's has no dot."""
    return f"{method}{'' if seed is None else f'.seed{seed}'}{'' if sparsity is None else f'@{sparsity:g}'}"


def corpus_key(config: RunConfig, role: str) -> str:
    """Key of a corpus below ``data``."""
    return f"evaluation.{role}" if role in config.data.evaluation else role


def _first_text(config: RunConfig) -> str:
    return next(iter(config.data.evaluation), "heldout")


def _plan_measurements(plan: Plan, place: Callable[..., StageDir], model: list[str]) -> None:
    config, settings = plan.config, plan.config.evaluate
    tasks: dict[str, tuple[str, list[object]]] = {
        name: (spec, [name, _task_content(config, spec)]) for name, spec in task_specs(config).items()
    }
    if settings.cloze:
        corpus = plan.corpora[_first_text(config)][0]
        plan.cloze = place("cloze", "", evaluate.VERSION, settings.cloze, corpus.key, config.seed)
        tasks["cloze"] = (plan.cloze.uri_of(), [plan.cloze.key])
    for variant in plan.variants:
        origin = variant.export.key if variant.export else "dense"
        for text in config.data.evaluation:
            stage = plan.corpora[text][0]
            key = [evaluate.VERSION, model, origin, stage.key, settings.batch_rows]
            where = place("evaluate", f"{variant.name}.{text}", *key)
            plan.measurements.append(Measurement(where, variant, "perplexity", text))
        if settings.samples and config.data.evaluation:
            key = [model, origin, plan.corpora[_first_text(config)][0].key, settings.samples, config.seed]
            where = place("evaluate", f"{variant.name}.samples", evaluate.VERSION, *key)
            plan.measurements.append(Measurement(where, variant, "samples", "samples"))
        if variant.export:
            where = place("evaluate", f"{variant.name}.map", mask_map.VERSION, origin)
            plan.measurements.append(Measurement(where, variant, "map", "map"))
        for name, (spec, key) in tasks.items():
            limits = [settings.documents_for(name), settings.skip_first, config.seed]
            where = place("evaluate", f"{variant.name}.{name}", evaluate.VERSION, model, origin, key, limits)
            plan.measurements.append(Measurement(where, variant, "task", name, spec))


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
