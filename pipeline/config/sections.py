"""The configuration of a run. The docstring under a field is its help text."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from leap.families import FAMILIES
from leap.methods import METHODS, LayerScope
from leap.scopes import PriorScope, layer_scope, scope_name
from leap.settings import LearnSettings
from leap.validation import OneOf
from pipeline.config import dtypes
from pipeline.config.mappings import merge

Sparsity = Annotated[float, Field(ge=0, lt=1)]
Dtype = Literal["float32", "bfloat16", "float16"]
Method = Annotated[str, OneOf(METHODS)]
Seed = Annotated[int, Field(ge=0, lt=2**64)]

#: Bytes of a name that directories and runs are named after.
NAME_BYTES = 100
#: Bytes of a path and of a part of one, which file systems allow at most.
_PATH_BYTES, _PART_BYTES = 4000, 255


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @field_validator("*")
    @classmethod
    def _texts_fit_a_file_system(cls, value: Any, field: ValidationInfo) -> Any:
        if field.field_name != "why":
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str):
                    _check_text(text)
        return value


def _check_text(text: str) -> None:
    """Every text of a recipe may become a path or a name.

    Raises:
        ValueError: no file system takes it.
    """
    if "\0" in text:
        raise ValueError(f"must not hold the character NUL, not {text!r}")
    if len(text.encode()) > _PATH_BYTES:
        raise ValueError(f"must be at most {_PATH_BYTES} bytes long, not {len(text.encode())}")
    # A URI may hold a long password.
    longest = 0 if "://" in text else max(len(part.encode()) for part in text.split("/"))
    if longest > _PART_BYTES:
        raise ValueError(f"must be at most {_PART_BYTES} bytes long between slashes, not {longest}")


class ModelConfig(Section):
    source: str = "nano"
    """``nano`` (embedded), a directory, a Hugging Face name, a GGUF file, or ``gguf:PACKAGE``, a package with one."""
    revision: str | None = None
    """Revision of a Hugging Face name."""
    dtype: Dtype = "float32"
    """Number type of the frozen weights, of training and of evaluation.

    ``auto`` stands for bfloat16 where the CPU that reads the recipe has matrix units for it, for float32 elsewhere.
    """
    trust_remote_code: bool = False
    """Run code that comes with a model or data set from the hub."""
    allow_dense: bool = False
    """Prune a model although less than nine tenths of its decoder blocks' weights are prunable, as where experts are
    fused in one tensor. Sparsities are shares of the prunable ones."""

    @field_validator("dtype", mode="before")
    @classmethod
    def _choose_dtype(cls, value: Any) -> Any:
        return dtypes.fastest() if value == "auto" else value


class CorpusConfig(Section):
    source: str | list[str] = "embedded"
    """``embedded``, ``hub:DATASET``, or files: txt, jsonl, parquet; globs, URIs and $VARIABLES are expanded."""
    fallback: Literal["embedded"] | None = None
    """What to read, with a warning, where no file of ``source`` exists. In the table it has the name ``embedded``."""
    text_field: str = "text"
    """Field of a json or parquet record that holds the document."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    split: str = "train"
    """Split of a hub data set."""
    share: tuple[int, int] = (0, 100)
    """Percent range of the hash of a document: ranges that do not overlap share no document.

    By default the embedded text is divided among its uses and any other is taken whole.
    """
    tokens: int = Field(default=65536, gt=0)
    """Tokens to take; rows of context_length tokens are filled up to at least this many."""

    @model_validator(mode="after")
    def _share_is_a_range(self) -> CorpusConfig:
        low, high = self.share
        if not 0 <= low < high <= 100:
            raise ValueError(f"share must be two rising numbers within 0 and 100, not {list(self.share)}")
        return self

    @model_validator(mode="after")
    def _lists_are_of_files(self) -> CorpusConfig:
        if isinstance(self.source, list) and (
            not self.source or any(s == "embedded" or s.startswith("hub:") for s in self.source)
        ):
            raise ValueError(f"source must be one of embedded and hub:DATASET, or files, not {self.source}")
        return self


class DataConfig(Section):
    context_length: int = Field(default=256, gt=1)
    """Tokens in a row, for training and for perplexity."""
    calibration: CorpusConfig = CorpusConfig(share=(76, 88))
    """Text that priors and masks are learned from."""
    heldout: CorpusConfig = CorpusConfig(share=(88, 92), tokens=16384)
    """Text that training is watched on and settings are chosen on."""
    evaluation: dict[str, CorpusConfig] = {"docs": CorpusConfig(share=(92, 100), tokens=32768)}
    """Texts for the perplexities of the final table, by the name they get there."""
    shards: int = Field(default=8, gt=0)
    """Pieces that a corpus is read in, in parallel; the rows are the same for any number of them."""
    tokenizer_workers: int | None = Field(default=None, gt=0)
    """Upper limit on parallel tokenisers; none: what the cluster has."""


class PriorConfig(Section):
    methods: list[Method] = ["magnitude", "wanda"]
    """Layer-wise methods that get a row in the table. The priors of ``learn`` are computed in any case."""
    scope: PriorScope | list[PriorScope] = "native"
    """Within what methods with a row in the table compare the weights of a matrix: ``native``, as the authors of each
    have it (Wanda and OPTIMA the row, SparseGPT blocks of 128 columns, the others the layer), ``row`` or ``layer``. Of
    several, a row of the table each, named METHOD-row or METHOD-layer where that is not native. Magnitude always
    compares within the layer. Where learning starts is its own affair: ``settings.prior_scope``."""
    pattern: tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]] | None = None
    """N:M: keep N of every M consecutive columns, as in ``[2, 4]``. The sparsities have to be 1 - N/M."""
    options: dict[Method, dict[str, Any]] = {}
    """Options of methods, by name of the method: ``{admm: {schedule: cubic, precision: float64}}``."""
    rows: int = Field(default=128, gt=0)
    """Calibration rows that the statistics are taken from."""
    batch_rows: int = Field(default=8, gt=0)
    """Rows in one forward pass."""
    spill: bool = False
    """Hold the hidden states of all rows in a temporary file in place of memory."""

    def scopes_of(self, method: Method) -> list[LayerScope]:
        """Within what a method compares weights, a row of the table each."""
        requested = self.scope if isinstance(self.scope, list) else [self.scope]
        return list(dict.fromkeys(self._scope(method, scope) for scope in requested))

    def start_scope(self, settings: LearnSettings) -> LayerScope:
        """Within what the method that learning starts from compares weights."""
        return self._scope(settings.prior, settings.prior_scope)

    def _scope(self, method: str, requested: PriorScope) -> LayerScope:
        # A pattern holds in its groups; within what else weights are compared makes no difference.
        return layer_scope(method, "native" if self.pattern else requested)

    def scope_name(self, method: str, scope: LayerScope) -> str:
        """``row``, ``layer``, ``block`` or a pattern such as ``2:4``."""
        return self.pattern_name if self.pattern else scope_name(method, scope)

    @property
    def pattern_name(self) -> str:
        """``2:4``, say, or ``unstructured``."""
        return "{}:{}".format(*self.pattern) if self.pattern else "unstructured"

    @staticmethod
    def row_name(method: str, scope: LayerScope) -> str:
        """What the table calls a method at a scope: its own name where its authors have it so."""
        return method if scope == METHODS.native(method) else f"{method}-{scope}"

    @property
    def row_names(self) -> list[str]:
        """The layer-wise rows of the table."""
        return [self.row_name(method, scope) for method in self.methods for scope in self.scopes_of(method)]

    @model_validator(mode="after")
    def _methods_are_named_once(self) -> PriorConfig:
        if len(set(self.methods)) != len(self.methods):
            raise ValueError(f"methods must be different names, not {self.methods}")
        if not self.scope or (isinstance(self.scope, list) and len(set(self.scope)) != len(self.scope)):
            raise ValueError(f"scope must be one or more of native, row and layer, each once, not {self.scope}")
        return self


class LearnConfig(Section):
    like: str | None = None
    """Name of another entry of ``learn``: whatever is not given here is as there."""
    published: bool = False
    """Take the published settings of the family, in place of this project's defaults, where ``settings`` gives none."""
    settings: LearnSettings = LearnSettings()
    """Objective, schedules, optimiser."""
    seeds: list[Seed] = []
    """Learn once with each of these in place of ``settings.seed``, from the same prior and calibration rows.

    Several make a variant NAME.seedN each, and one row of the table with their mean and standard deviation.
    """
    nested: bool = False
    """One run for all ``sparsities``: each step trains one of them, on the same logits with another cut.

    What is kept at a sparsity is then kept at every lower one.
    """
    workers: int = Field(default=1, gt=0)
    """Data-parallel workers that the logits are sharded over."""
    threads: int = Field(default=1, gt=0)
    """CPU threads of a worker, reserved from Ray."""
    gpu: bool = False
    """Give each worker a GPU (nccl) instead of CPUs (gloo)."""
    activation_checkpointing: bool = False
    """Keep only the inputs of decoder blocks and compute the rest again in the backward pass."""
    checkpoint_every: int = Field(default=50, gt=0)
    """Steps between checkpoints."""
    watch_every: int = Field(default=25, gt=0)
    """Steps between measurements of the sampled, mean and hard mask on held-out text."""
    watch_rows: int = Field(default=16, gt=0)
    """Held-out rows of such a measurement."""
    max_failures: int = Field(default=2, ge=0)
    """How often a lost worker is replaced before the run fails."""

    def with_seed(self, seed: int) -> LearnConfig:
        """The learning run of one seed."""
        settings = dataclasses.replace(self.settings, seed=seed)
        return self.model_copy(update={"settings": settings, "seeds": []})

    @model_validator(mode="before")
    @classmethod
    def _complete_settings(cls, entry: Any) -> Any:
        """Fill in what partly given settings leave open, schedules among them."""
        if not isinstance(entry, dict):
            return entry
        given = entry.get("settings", {})
        if not isinstance(given, dict):
            return entry
        family = given.get("family", {})
        kind = family.get("kind", "leap") if isinstance(family, dict) else "leap"
        if kind not in FAMILIES:
            raise ValueError(f"settings.family.kind must be one of {', '.join(FAMILIES)}, not {kind!r}")
        published = entry.get("published") is True
        defaults = LearnSettings.published(kind) if published else LearnSettings(family=FAMILIES[kind]())
        return {**entry, "settings": merge(dataclasses.asdict(defaults), given)}

    @model_validator(mode="after")
    def _seeds_are_named_once(self) -> LearnConfig:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds must be different numbers, not {self.seeds}")
        return self

    @model_validator(mode="after")
    def _batch_divides(self) -> LearnConfig:
        microbatches = self.settings.batch_rows // self.settings.microbatch_rows
        if microbatches % self.workers:
            raise ValueError(
                f"a global batch of {microbatches} micro-batches cannot be shared by {self.workers} workers; "
                "change settings.batch_rows, settings.microbatch_rows or workers"
            )
        return self

    @model_validator(mode="after")
    def _nested_cuts_go_through_the_model(self) -> LearnConfig:
        if self.nested and not self.settings.family.shares_sparsity:
            scope = self.settings.family.scope_name
            raise ValueError(f"nested wants masks whose sparsity is shared over the model, and it is by {scope}")
        return self


class ClozeConfig(Section):
    questions: int = Field(default=200, gt=0)
    """Questions, each with the true continuation and three from other documents."""
    context_tokens: int = Field(default=64, gt=0)
    """Tokens of text before the continuation."""
    continuation_tokens: int = Field(default=16, gt=0)
    """Tokens of each continuation."""


class SamplesConfig(Section):
    prompts: int = Field(default=3, gt=0)
    """Beginnings of documents of the first evaluation text that are continued."""
    prompt_tokens: int = Field(default=32, gt=0)
    """Tokens of such a beginning."""
    new_tokens: int = Field(default=48, gt=0)
    """Tokens to generate after it."""
    temperature: float = Field(default=0.8, gt=0)
    """Temperature of the sampling, whose seed is the same for all variants."""


class EvaluateConfig(Section):
    batch_rows: int = Field(default=8, gt=0)
    """Rows in one forward pass for perplexity."""
    tasks: list[str] = []
    """Zero-shot tasks: names in ``task_directory``, or tasks that lm-eval knows from the hub."""
    task_directory: str | None = None
    """Directory of lm-eval task YAML files. $VARIABLES are expanded."""
    documents: int | None = Field(default=None, gt=0)
    """Documents per task (per subject of a group), drawn at random but the same for all variants; none: all."""
    documents_of: dict[str, Annotated[int, Field(gt=0)] | None] = {}
    """``documents`` of single tasks that need another number, by name."""
    skip_first: int = Field(default=0, ge=0)
    """Leave out the first documents of each task (those settings were chosen on)."""
    batch_size: Annotated[int, Field(gt=0)] | Literal["auto"] = "auto"
    """Sequences in one forward pass of a task."""
    cloze: ClozeConfig | None = None
    """Build and run a cloze task from the first evaluation text."""
    samples: SamplesConfig | None = SamplesConfig()
    """Text that every variant generates, for the report; null: none."""

    def documents_for(self, task: str) -> int | None:
        """Documents of a task by its name, or by a path that ends in it."""
        return self.documents_of.get(task.rsplit("/", 1)[-1], self.documents)

    @model_validator(mode="after")
    def _tasks_are_named_once(self) -> EvaluateConfig:
        if len(set(self.tasks)) != len(self.tasks):
            raise ValueError(f"tasks must be different names, not {self.tasks}")
        unknown = [name for name in self.documents_of if name not in self.tasks]
        if unknown:
            raise ValueError(f"documents_of: {unknown[0]} is none of the tasks ({', '.join(self.tasks) or 'none'})")
        return self


class BenchmarkConfig(Section):
    dtypes: list[Dtype] = ["bfloat16", "float32"]
    """Number types to measure in, whatever the model's own is."""
    threads: int = Field(default=1, gt=0)
    """CPU threads of the products. All CPUs of a node are reserved in any case: nothing runs beside a measurement."""
    seconds: float = Field(default=0.25, gt=0)
    """Time for the products with one matrix shape in one number type, dense and packed in turn."""
    tokens: int = Field(default=64, gt=0)
    """Tokens that each model decodes, one at a time, in one round."""
    rounds: int = Field(default=3, gt=0)
    """Rounds of decoding, in which the dense and the sparse model take turns."""

    @model_validator(mode="after")
    def _dtypes_are_named_once(self) -> BenchmarkConfig:
        if not self.dtypes or len(set(self.dtypes)) != len(self.dtypes):
            raise ValueError(f"dtypes must be one or more different number types, not {self.dtypes}")
        return self


class TrackingConfig(Section):
    stores: list[str] = ["mlflow"]
    """Where records go besides the run's own directory; an empty list: nowhere."""
    uri: str | None = None
    """MLflow tracking URI; null: SQLite beside the runs; ``none``: no store, as an empty list of ``stores``."""
    experiment: str = "leap"
    """MLflow experiment."""
    register_as: str | None = Field(default=None, min_length=1, pattern=r"^[^/:]+$")
    """Name in MLflow's model registry: the best variant of each sparsity becomes a version of it; none: no versions.

    "Best" is the lowest perplexity on the first evaluation text. The best of all versions measured on the same text
    has the alias best-SPARSITY, such as best-50 for 50 %.
    """

    @property
    def active_stores(self) -> list[str]:
        """The stores that records go to, each once."""
        return [] if self.uri == "none" else list(dict.fromkeys(self.stores))


class RunConfig(Section):
    name: str
    """Name of the recipe; results lie below ``output``/name."""
    base: str | None = None
    """Recipe that this one was derived from."""
    why: str = ""
    """Why the recipe departs from the defaults."""
    output: str = "runs"
    """Directory or URI that all results go to."""
    seed: Seed = 0
    """Seed of everything that is drawn."""
    sparsities: list[Sparsity] = [0.5, 0.6]
    """Shares of the prunable weights to remove; each is a run of its own, unless an entry of ``learn`` is nested."""
    model: ModelConfig = ModelConfig()
    """The model to prune."""
    data: DataConfig = DataConfig()
    """Text for learning, watching and measuring."""
    prior: PriorConfig = PriorConfig()
    """Layer-wise methods."""
    learn: dict[str, LearnConfig] = {"leap": LearnConfig()}
    """Mask learning, by the name the variant gets in the table."""
    reconstruct: list[str] = []
    """Entries of ``learn`` whose kept weights are also fitted to the dense layers' outputs, block by block, on
    ``prior.rows`` rows: one more variant each, NAME+weights."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Perplexity and zero-shot accuracy."""
    benchmark: BenchmarkConfig | None = None
    """Speed of the learned variants with packed weights, against the dense model; null: not measured."""
    tracking: TrackingConfig = TrackingConfig()
    """Experiment tracking."""

    def least_rows(self, role: str) -> int:
        """Rows without which a text is of no use: one batch to learn from, of others a single one."""
        batches = [entry.settings.batch_rows for entry in self.learn.values()]
        return max(batches, default=1) if role == "calibration" else 1

    @field_validator("name")
    @classmethod
    def _is_a_folder_name(cls, value: str) -> str:
        if not value.strip() or value.startswith(".") or any(c in "/\\" or not c.isprintable() for c in value):
            raise ValueError(f"must be the name of one folder, without slashes and not with a dot first, not {value!r}")
        if len(value.encode()) > NAME_BYTES:
            raise ValueError(f"must be at most {NAME_BYTES} bytes long, not {len(value.encode())}")
        return value

    @field_validator("output")
    @classmethod
    def _is_a_place(cls, value: str) -> str:
        if not value.strip() or not value.isprintable():
            raise ValueError(f"must be a directory or a URI, not {value!r}; . is the current directory")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if self.learn and self.model.dtype == "float16":
            raise ValueError(
                "model.dtype: gradients underflow in float16 without loss scaling, which learning does not do; "
                "choose bfloat16 or float32, or learn: null for each entry"
            )
        # Names of variants and directories show six digits.
        if not self.sparsities or len({f"{sparsity:g}" for sparsity in self.sparsities}) != len(self.sparsities):
            raise ValueError(
                f"sparsities must be one or more numbers that differ in their first six digits, not {self.sparsities}"
            )
        if self.prior.pattern:
            keep, group = self.prior.pattern
            if any(abs(sparsity - (1 - keep / group)) > 1e-6 for sparsity in self.sparsities):
                raise ValueError(
                    f"prior.pattern: {keep}:{group} has a sparsity of {1 - keep / group:g}, and sparsities is "
                    f"{self.sparsities}"
                )
        for name, entry in self.learn.items():
            pattern = entry.settings.family.pattern
            if pattern is not None and pattern != self.prior.pattern:
                raise ValueError(f"learn.{name} makes {pattern[0]}:{pattern[1]} masks: set prior.pattern={[*pattern]}")
        unknown = [name for name in self.reconstruct if name not in self.learn]
        if unknown:
            raise ValueError(f"reconstruct: {unknown[0]} is none of learn ({', '.join(self.learn) or 'none'})")
        fitted = [name for name in self.reconstruct if self.learn[name].settings.weights == "prior"]
        if fitted:
            raise ValueError(f"reconstruct: {fitted[0]} is learned over weights that its prior has fitted already")
        taken = {
            "learn": {"dense", *self.prior.row_names},
            "data.evaluation": {"calibration", "heldout", *self.evaluate.tasks},
        }
        for section, entries in (("learn", self.learn), ("data.evaluation", self.data.evaluation)):
            for name in entries:
                # They become names of directories and of metrics.
                if name in taken[section] or not name.replace("-", "").replace("_", "").isalnum():
                    raise ValueError(f"{section}.{name}: choose another name, of letters, digits, - and _")
                if len(name.encode()) > NAME_BYTES:
                    raise ValueError(f"{section}: a name is at most {NAME_BYTES} bytes long, not {len(name.encode())}")
        return self
