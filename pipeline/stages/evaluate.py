"""Perplexity, zero-shot accuracy and generated text of one variant, each a cell of the table."""

from __future__ import annotations

import functools
import json
import logging
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from pipeline.config import ClozeConfig, EvaluateConfig, ModelConfig, SamplesConfig
from pipeline.errors import UserError
from pipeline.evaluation.perplexity import Perplexity
from pipeline.evaluation.scores import Sample, ZeroShot
from pipeline.model import loading
from pipeline.model.sizes import Sizes
from pipeline.stages.calibrate import Calibrate
from pipeline.stages.cost import Cost, Machine
from pipeline.stages.stage import PinnedModel, Place, Result, Stage
from pipeline.stages.variant import Variant

_RESULT = "result.json"
#: A question of a zero-shot task: choices times tokens of each with its context.
_TASK_TOKENS = 4 * 100


@functools.lru_cache(maxsize=1)
def _model(model: ModelConfig, directory: str | None) -> PreTrainedModel:
    """Loaded once for all measurements of a variant that this worker process gets."""
    loaded: Any = loading.load_model(model, directory)  # transformers' wrapper hides the signature of ``cuda``
    return loaded.cuda() if torch.cuda.is_available() else loaded


@dataclass(frozen=True, eq=False)
class Cloze(Stage[str]):
    """A cloze task from the documents of a corpus; its result is the directory of an lm-eval task."""

    KIND = "cloze"
    PHASE = "evaluate"
    VERSION = 2
    PLACE = Place.DRIVER

    model: PinnedModel
    text: Calibrate
    config: ClozeConfig
    seed: int

    @property
    def item(self) -> str:
        return ""

    def inputs(self) -> list[object]:
        return [self.config, self.text.key, self.seed]

    @property
    def tokens(self) -> int:
        """Tokens of all questions with all their continuations."""
        return self.config.questions * 4 * (self.config.context_tokens + self.config.continuation_tokens)

    def run(self) -> None:
        """See :meth:`Stage.run`.

        Raises:
            UserError: the documents do not make so many questions.
        """
        from pipeline.evaluation.cloze import write_cloze_task

        texts = self.text.texts()
        with self.directory.work() as (directory, facts):
            try:
                write_cloze_task(
                    texts,
                    loading.load_tokenizer(self.model.config),
                    directory,
                    questions=self.config.questions,
                    context_tokens=self.config.context_tokens,
                    continuation_tokens=self.config.continuation_tokens,
                    seed=self.seed,
                )
            except ValueError as error:
                raise UserError(f"evaluate.cloze: {error}") from error
            facts["questions"] = self.config.questions

    def read(self) -> str:
        return str(self.directory.path())


@dataclass(frozen=True, eq=False)
class Cell(Stage[Result]):
    """One measurement of one variant, written as JSON."""

    KIND = PHASE = "evaluate"
    VERSION = 2

    model: PinnedModel
    variant: Variant

    @property
    @abstractmethod
    def subject(self) -> str:
        """Name of the text or the task."""

    @abstractmethod
    def measured_on(self) -> list[object]:
        """All that decides the result, besides the variant."""

    @abstractmethod
    def tokens(self) -> int | None:
        """Tokens that the model sees or writes; none: not known before."""

    @abstractmethod
    def measure(self) -> Result:
        """The result."""

    @property
    def item(self) -> str:
        return f"{self.variant.name}.{self.subject}"

    @property
    def label(self) -> str:
        return self.variant.name

    def inputs(self) -> list[object]:
        return [self.model.key, self.variant.key, *self.measured_on()]

    def cost(self, sizes: Sizes, machine: Machine) -> Cost:
        tokens = self.tokens()
        return Cost(seconds=None if tokens is None else 2 * sizes.linear * tokens / machine.speed)

    def run(self) -> None:
        """Measure and write the result."""
        with self.directory.work() as (directory, _):
            (directory / _RESULT).write_text(json.dumps(self.measure()))

    def read(self) -> Result:
        result: Result = json.loads((self.directory.path() / _RESULT).read_text())
        return result

    def loaded(self) -> PreTrainedModel:
        """The dense or pruned model."""
        export = self.variant.export
        return _model(self.model.config, str(export.directory.path()) if export else None)


@dataclass(frozen=True, eq=False)
class TextPerplexity(Cell[Perplexity]):
    """Perplexity on all rows of a corpus."""

    text: Calibrate
    batch_rows: int

    @property
    def subject(self) -> str:
        return self.text.role

    def measured_on(self) -> list[object]:
        return [self.text.key, self.batch_rows]

    def tokens(self) -> int:
        return self.text.corpus.tokens

    def measure(self) -> Perplexity:
        from pipeline.evaluation.perplexity import perplexity

        rows = self.text.read()
        return perplexity(self.loaded(), torch.from_numpy(rows.take(0, len(rows))), batch_rows=self.batch_rows)


@dataclass(frozen=True, eq=False)
class Samples(Cell[list[Sample]]):
    """What the variant makes of the beginnings of some documents."""

    text: Calibrate
    config: SamplesConfig
    seed: int

    @property
    def subject(self) -> str:
        return "samples"

    def measured_on(self) -> list[object]:
        return [self.text.key, self.config, self.seed]

    def tokens(self) -> int:
        return self.config.prompts * (self.config.prompt_tokens + self.config.new_tokens)

    def measure(self) -> list[Sample]:
        from pipeline.evaluation.samples import beginnings, continuations

        tokenizer, config = loading.load_tokenizer(self.model.config), self.config
        end = tokenizer.eos_token_id
        prompts = beginnings(self.text.read(), end, config.prompts, config.prompt_tokens)
        texts = continuations(self.loaded(), prompts, config.new_tokens, config.temperature, end, self.seed)
        return [
            Sample(
                prompt=str(tokenizer.decode(prompt)), continuation=str(tokenizer.decode(text, skip_special_tokens=True))
            )
            for prompt, text in zip(prompts, texts, strict=True)
        ]


@dataclass(frozen=True, eq=False)
class TaskAccuracy(Cell[ZeroShot]):
    """Zero-shot accuracy on one lm-eval task, or on the cloze task of the run."""

    task: str
    """Its name."""
    source: str | Cloze
    """What lm-eval is asked for."""
    content: object
    """What results depend on besides the name: a local task's files, or the version of lm-eval."""
    config: EvaluateConfig
    seed: int

    @property
    def subject(self) -> str:
        return self.task

    def measured_on(self) -> list[object]:
        content = [self.source.key] if isinstance(self.source, Cloze) else [self.task, self.content]
        return [content, [self.config.documents_for(self.task), self.config.skip_first, self.seed]]

    def tokens(self) -> int | None:
        if isinstance(self.source, Cloze):
            return self.source.tokens
        documents = self.config.documents_for(self.task)
        return documents * _parts(self.source) * _TASK_TOKENS if documents else None

    def measure(self) -> ZeroShot:
        from pipeline.evaluation.zero_shot import zero_shot

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        loaded, model = self.loaded(), self.model.config
        return zero_shot(
            loaded,
            loading.load_tokenizer(model),
            self.source.read() if isinstance(self.source, Cloze) else self.source,
            limit=self.config.documents_for(self.task),
            batch_size=self.config.batch_size,
            device=loaded.device,
            max_length=min(loaded.config.get_text_config().max_position_embeddings, 2048),
            seed=self.seed,
            skip_first=self.config.skip_first,
            trust_remote_code=model.trust_remote_code,
        )


def _parts(spec: str) -> int:
    """Single tasks that a task stands for; those of the hub count as one, reading their list takes too long."""
    if "/" not in spec:
        return 1
    from pipeline.evaluation.tasks import resolve_task

    try:
        return len(resolve_task(spec).entries)
    except ValueError:  # the checks before a run say what is wrong with it
        return 1
