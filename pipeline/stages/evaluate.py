"""Perplexity, zero-shot accuracy and generated text of one variant, as Ray tasks."""

from __future__ import annotations

import functools
import json
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from pipeline import models
from pipeline.config import ClozeConfig, EvaluateConfig, ModelConfig, SamplesConfig
from pipeline.rows import PackedRows
from pipeline.stages.calibrate import TEXTS
from pipeline.storage import StageDir, local_copy

VERSION = 2
RESULT = "result.json"


@functools.lru_cache(maxsize=1)
def _model(model: ModelConfig, directory: str | None) -> PreTrainedModel:
    """Loaded once for all measurements of a variant that this worker process gets."""
    loaded: Any = models.load_model(model, directory)  # transformers' wrapper hides the signature of ``cuda``
    return loaded.cuda() if torch.cuda.is_available() else loaded


def _variant(model: ModelConfig, export: StageDir | None) -> PreTrainedModel:
    return _model(model, str(export.path()) if export else None)


def perplexity(
    stage: StageDir, model: ModelConfig, export: StageDir | None, rows: StageDir, batch_rows: int
) -> dict[str, Any]:
    """Perplexity of the dense model (``export`` is none) or of an export on all rows of a corpus."""
    from pipeline.evaluation.perplexity import perplexity as measure

    with stage.work() as (directory, _):
        packed = PackedRows(rows.path())
        loaded = _variant(model, export)
        result = measure(loaded, torch.from_numpy(packed.take(0, len(packed))), batch_rows=batch_rows)
        (directory / RESULT).write_text(json.dumps(result))
    return stage.manifest() or {}


def zero_shot(
    stage: StageDir, model: ModelConfig, export: StageDir | None, task: str, settings: EvaluateConfig, seed: int
) -> dict[str, Any]:
    """Zero-shot accuracy on one lm-eval task."""
    from pipeline.evaluation.zero_shot import zero_shot as measure

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with stage.work() as (directory, _):
        loaded = _variant(model, export)
        result = measure(
            loaded,
            models.load_tokenizer(model),
            str(local_copy(task)) if "://" in task else task,
            limit=settings.documents_for(task),
            batch_size=settings.batch_size,
            device=loaded.device,
            max_length=min(loaded.config.get_text_config().max_position_embeddings, 2048),
            seed=seed,
            skip_first=settings.skip_first,
            trust_remote_code=model.trust_remote_code,
        )
        (directory / RESULT).write_text(json.dumps(result))
    return stage.manifest() or {}


def samples(
    stage: StageDir, model: ModelConfig, export: StageDir | None, rows: StageDir, settings: SamplesConfig, seed: int
) -> dict[str, Any]:
    """What a variant makes of the beginnings of some documents."""
    from pipeline.evaluation.samples import beginnings, continuations

    with stage.work() as (directory, _):
        tokenizer = models.load_tokenizer(model)
        packed = PackedRows(rows.path())
        prompts = beginnings(packed, tokenizer.eos_token_id, settings.prompts, settings.prompt_tokens)
        texts = continuations(
            _variant(model, export), prompts, settings.new_tokens, settings.temperature, tokenizer.eos_token_id, seed
        )
        result = [
            {"prompt": tokenizer.decode(prompt), "continuation": tokenizer.decode(text, skip_special_tokens=True)}
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        (directory / RESULT).write_text(json.dumps(result))
    return stage.manifest() or {}


def write_cloze(stage: StageDir, model: ModelConfig, corpus: StageDir, cloze: ClozeConfig, seed: int) -> dict[str, Any]:
    """Build the cloze task from the documents of a corpus."""
    from pipeline.evaluation.cloze import write_cloze_task

    texts = json.loads((corpus.path() / TEXTS).read_text())
    with stage.work() as (directory, facts):
        write_cloze_task(
            texts,
            models.load_tokenizer(model),
            directory,
            questions=cloze.questions,
            context_tokens=cloze.context_tokens,
            continuation_tokens=cloze.continuation_tokens,
            seed=seed,
        )
        facts["questions"] = cloze.questions
    return stage.manifest() or {}


def result(stage: StageDir) -> Any:
    """What a finished measurement found."""
    return json.loads((Path(stage.path()) / RESULT).read_text())
